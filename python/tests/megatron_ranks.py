"""One of two ranks of Megatron: the model that test_megatron.py saved, its heads or its sequences
shared out; every token's loss and every gradient as one rank has them.

    megatron_ranks.py tp|cp FILE STORE RANK
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402
import test_megatron  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.common.embeddings import rotary_pos_embedding  # noqa: E402

RANKS = 2


def share(name, value, like, rank):
    """The part of a weight that a rank has of its heads, columns or words."""
    axis = 0 if name.endswith("softmax_offset") else getattr(like, "partition_dim", -1)
    return value if like.shape == value.shape else value.chunk(RANKS, axis)[rank]


def own_chunks(tensor, axis=0, group=None):
    """What Megatron gives a rank of each sequence: chunks r and 2n - 1 - r."""
    rank = torch.distributed.get_rank()
    chunks = tensor.chunk(2 * RANKS, axis)
    return torch.cat([chunks[rank], chunks[2 * RANKS - 1 - rank]], axis)


def rows_of(starts, length):
    """The rows of this rank: its chunks of each sequence."""
    ends = [0, length] if starts is None else starts.tolist()
    return torch.cat([own_chunks(torch.arange(a, b)) for a, b in zip(ends, ends[1:])])


def run(what, saved, rank):
    tensor, context = (RANKS, 1) if what == "tp" else (1, RANKS)
    made = test_megatron.model(True, saved["nsa"], **saved["config"],
                               tensor_model_parallel_size=tensor, context_parallel_size=context)
    for name, value in made.named_parameters():
        value.data.copy_(share(name, saved["weights"][name], value, rank))
    starts, length = saved["starts"], saved["ids"].shape[1]
    pack = None if starts is None else test_megatron.pack_of(starts)
    rows = torch.arange(length) if what == "tp" else rows_of(starts, length)
    loss = test_megatron.loss_of(made, saved["ids"][:, rows], positions=rows,
                                 packed_seq_params=pack)
    error = reference.rel_rms(loss, saved["loss"][:, rows])
    assert error < 2e-6, error
    (loss.sum() / saved["loss"].numel()).backward()
    for name, value in made.named_parameters():
        grad = value.grad
        if what == "cp":
            torch.distributed.all_reduce(grad)
        error = reference.rel_rms(grad, share(name, saved["grads"][name], value, rank))
        assert error < (1e-5 if saved["nsa"] is None else 2e-5), (name, error)


def main(what, file, store, rank):
    rank = int(rank)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS)
    tensor, context = (RANKS, 1) if what == "tp" else (1, RANKS)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor,
                                             context_parallel_size=context)
    if what == "cp":
        rotary_pos_embedding.get_pos_emb_on_this_cp_rank = own_chunks  # its own asks for a GPU
    for case in torch.load(file):
        run(what, case, rank)
    torch.distributed.barrier()


if __name__ == "__main__":
    with test_megatron.on_the_cpu():
        main(*sys.argv[1:])
