"""regraph.torchtitan on the CPU: a small Llama 3 of torchtitan's, beside the same with torch's
scaled_dot_product_attention."""

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchtitan", minversion="0.3")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402
from regraph import RegraphError, torchtitan  # noqa: E402
from torchtitan.models.common.attention import (ScaledDotProductAttention,  # noqa: E402
                                                create_varlen_metadata_for_document)
from torchtitan.models.gpt_oss import model as gpt_oss  # noqa: E402
from torchtitan.models.llama3 import llama3_configs  # noqa: E402


def config():
    small = llama3_configs["debugmodel"](attn_backend="varlen")
    small.layers = small.layers[:2]
    return small


def model(ours=True):
    if ours:
        made = torchtitan.with_attention(config())
    else:
        made = config()
        for layer in made.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()
    made = made.build()
    made.init_states(buffer_device=torch.device("cpu"))
    torch.manual_seed(0)
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.1, mean=float(value.dim() == 1))
    return made


def batch(seed=0, rows=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2048, (rows, 48), generator=g)


def loss_of(made, ids, positions=None, masks=None):
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
    logits = made(ids, positions, masks)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(),
                                             reduction="none").view(ids.shape)


def gradients(made):
    """By names without those of wrappers."""
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad
             for name, p in made.named_parameters()}
    assert len(found) > 10 and all(grad is not None for grad in found.values())
    return found


def close(ours, theirs):
    got, expected = gradients(ours), gradients(theirs)
    assert got.keys() == expected.keys()
    for name in got:
        assert reference.rel_rms(got[name], expected[name]) < 1e-5, name


def test_like_sdpa():
    own, theirs = model(), model(False)
    assert isinstance(own.layers["0"].attention.inner_attention, torchtitan.Attention)
    a, b = loss_of(own, batch()), loss_of(theirs, batch())
    assert reference.rel_rms(a, b) < 2e-6
    a.mean().backward()
    b.mean().backward()
    close(own, theirs)


def test_documents():
    """Documents of a batch, by torchtitan's own metadata: each as if alone."""
    own, theirs, ids = model(), model(False), batch()
    lengths = [[17, 31], [48]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    masks = own.get_attention_masks(positions)
    assert torch.equal(masks.cu_seq_q, create_varlen_metadata_for_document(positions).cu_seq_q)
    loss = loss_of(own, ids, positions, masks)
    parts = [loss_of(theirs, part) for row, sizes in zip(ids[:, None], lengths)
             for part in row.split(sizes, 1)]
    expected = torch.cat([part.flatten() for part in parts]).view(ids.shape)
    assert reference.rel_rms(loss, expected) < 2e-6
    loss.mean().backward()
    expected.mean().backward()
    close(own, theirs)


def test_training():
    losses = []
    for ours in (True, False):
        made = model(ours)
        optimizer = torch.optim.AdamW(made.parameters(), 1e-3)
        losses.append([])
        for i in range(50):
            loss = loss_of(made, batch(i % 3, rows=1)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-3
    assert losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize("policy, runs", [("FullAC", 2), ("SelectiveAC", 2), ("ours", 1)])
def test_checkpointing(policy, runs, monkeypatch):
    """Who recomputes what: bits are the same, and our SelectiveAC does not attend twice."""
    plain, again, ids = model(), model(), batch()
    module = torchtitan if policy == "ours" else torchtitan.activation_checkpoint
    choice = getattr(module, "SelectiveAC" if policy == "ours" else policy)
    choice.Config().build().apply(again)
    from regraph import programs
    seen, run = [], programs.Variant.run
    monkeypatch.setattr(programs.Variant, "run", lambda self, backward, *rest:
                        (seen.append(backward), run(self, backward, *rest))[1])
    loss = loss_of(again, ids)
    loss.mean().backward()
    assert seen.count(False) == 2 * runs and seen.count(True) == 2  # of two layers
    expected = loss_of(plain, ids)
    expected.mean().backward()
    assert torch.equal(loss, expected)
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, gradients(again)[name]), name


def test_sinks():
    """GPT-OSS of torchtitan puts its sinks in afterwards, by log-sum-exps: as those of the op."""
    torch.manual_seed(0)
    x = [torch.randn(2, 40, heads, 16).requires_grad_() for heads in (4, 2, 2)]
    sinks = torch.randn(4, requires_grad=True)
    layer = torchtitan.Attention.Config(window_size=(6, 0)).build()
    o = layer(*x, out_transform=lambda o, lse: gpt_oss.apply_attention_sink_rescale(o, lse, sinks))
    attend = torchtitan.program("window", crossed=False, sinks=True, H=4, KH=2, D=16, DV=16,
                                window=6, scale=0.25, softcap=0.0)
    starts = torch.tensor([0, 40, 80], dtype=torch.int32)
    expected = attend(*(t.flatten(0, 1) for t in x), starts, sinks).unflatten(0, (2, 40))
    assert reference.rel_rms(o, expected) < 2e-6
    d_o = torch.randn(o.shape)
    for got, want in zip(torch.autograd.grad(o, [*x, sinks], d_o),
                         torch.autograd.grad(expected, [*x, sinks], d_o)):
        assert reference.rel_rms(got, want) < 1e-5


def test_refused():
    flex = config()
    flex.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    with pytest.raises(RegraphError, match='as attn_backend="varlen" gives'):
        torchtitan.with_attention(flex)
    with pytest.raises(RegraphError, match="expected no keys after"):
        torchtitan.Attention.Config(window_size=(-1, -1)).build()


def test_fsdp(tmp_path):
    """FSDP2 by torchtitan over two processes, each with half the batch: gradients of one."""
    made, ids = model(), batch()
    loss_of(made, ids).mean().backward()
    torch.save({"ids": ids, "grads": gradients(made)}, tmp_path / "one")
    ranks = [subprocess.Popen([sys.executable, __file__, tmp_path / "one", tmp_path / "store",
                               str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-2000:] for text in said)


def one_of_two(file, store, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule
    from torchtitan.distributed.fsdp import apply_fsdp_to_decoder

    rank, saved = int(rank), torch.load(file)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    made = model()
    apply_fsdp_to_decoder(made, mesh, param_dtype=torch.float32, reduce_dtype=torch.float32,
                          pp_enabled=False)
    for module in made.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sums that divide
    (loss_of(made, saved["ids"][rank: rank + 1]).sum() / saved["ids"].numel()).backward()
    found = gradients(made)
    for name, expected in saved["grads"].items():
        got = found[name].full_tensor()
        assert reference.rel_rms(got, expected) < 1e-5, name
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_of_two(*sys.argv[1:])
