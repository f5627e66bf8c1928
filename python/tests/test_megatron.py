"""regraph.megatron on the CPU: a GPT of two layers by Megatron's own local spec, with its attention
and with ours, side by side. What Megatron asks of CUDA on the way is answered by the CPU."""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
warnings.filterwarnings("ignore")
pytest.importorskip("megatron.core", minversion="0.19", reason="megatron-core 0.19 is not there")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import dot_product_attention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from regraph import RegraphError, megatron  # noqa: E402


@contextlib.contextmanager
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(dot_product_attention.tensor_parallel, "get_cuda_rng_tracker",
                      lambda: SimpleNamespace(fork=contextlib.nullcontext))
        yield


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    with on_the_cpu():
        store = tmp_path_factory.mktemp("store") / "one"
        torch.distributed.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def config(**more):
    return TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        use_cpu_initialization=True, hidden_dropout=0.0, masked_softmax_fusion=False,
        bias_dropout_fusion=False, **{"attention_dropout": 0.0, **more})


def model(ours, **more):
    spec = get_gpt_layer_local_spec()
    made = GPTModel(config(**more), megatron.with_attention(spec) if ours else spec,
                    vocab_size=98, max_sequence_length=64, position_embedding_type="rope")
    torch.manual_seed(0)
    for value in made.parameters():
        torch.nn.init.normal_(value, std=0.2, mean=float(value.dim() == 1))
    return made


def loss_of(made, ids, positions=None, **more):
    length = ids.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(length) if positions is None else positions
    return made(ids, positions.expand(ids.shape), mask, labels=ids, **more)


def close(ours, theirs):
    got, expected = (dict(made.named_parameters()) for made in (ours, theirs))
    assert got.keys() == expected.keys() and len(got) > 10
    for name, value in expected.items():
        assert reference.rel_rms(got[name].grad, value.grad) < 1e-5, name


KINDS = {"plain": {}, "sinks": {"softmax_type": "learnable"},
         "off_by_one": {"softmax_type": "off-by-one"},
         "scaled": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_like_its_own(kind):
    """Losses of every token, and all gradients."""
    own, theirs = model(True, **KINDS[kind]), model(False, **KINDS[kind])
    assert isinstance(own.decoder.layers[0].self_attention.core_attention, megatron.CoreAttention)
    ids = torch.randint(97, (3, 40))
    a, b = loss_of(own, ids), loss_of(theirs, ids)
    assert reference.rel_rms(a, b) < 2e-6
    a.mean().backward()
    b.mean().backward()
    close(own, theirs)


def test_training():
    losses = []
    for ours in (True, False):
        made = model(ours, softmax_type="learnable")
        optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
        g = torch.Generator().manual_seed(1)
        batches = [torch.randint(97, (2, 40), generator=g) for _ in range(3)]
        losses.append([])
        for i in range(50):
            loss = loss_of(made, batches[i % 3]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-3
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_window(monkeypatch):
    """Layers with a window and without one. (Megatron's mask of a window wants a GPU by name.)"""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, device=None, **k: ones(*a, **k))
    more = {"window_size": (9, 0), "window_attn_skip_freq": [1, 0], "softmax_type": "learnable"}
    own, theirs = model(True, **more), model(False, **more)
    windows = [layer.self_attention.core_attention._window for layer in own.decoder.layers]
    assert windows == [9, -1]
    ids = torch.randint(97, (2, 40))
    a, b = loss_of(own, ids), loss_of(theirs, ids)
    assert reference.rel_rms(a, b) < 2e-6
    a.mean().backward()
    b.mean().backward()
    close(own, theirs)


@pytest.mark.parametrize("padded", [False, True])
def test_packed(padded):
    """Sequences in one pack, each as if alone; what pads them is seen by none of their tokens."""
    own, theirs = (model(ours, softmax_type="learnable") for ours in (True, False))
    ids = torch.randint(97, (1, 40))
    starts = torch.tensor([0, 17, 22, 40], dtype=torch.int32)
    lengths = [14, 5, 18] if padded else [17, 5, 18]
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=18,
        max_seqlen_kv=18, **({"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts}
                             if padded else {}))
    loss = loss_of(own, ids, packed_seq_params=params)
    there = torch.cat([torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths)])
    parts = [loss_of(theirs, ids[:, a: a + n]) for a, n in zip(starts.tolist(), lengths)]
    expected = torch.cat(parts, 1)
    assert reference.rel_rms(loss[:, there], expected) < 2e-6
    loss[:, there].sum().backward()
    expected.sum().backward()
    close(own, theirs)


@pytest.mark.parametrize("what", ["tp", "cp"])
def test_two_ranks(what, tmp_path):
    """Two processes that share out the heads, or each sequence: losses and gradients of one."""
    more = {"softmax_type": "learnable", "window_size": (9, 0), "window_attn_skip_freq": [1, 0]}
    made, ids = model(True, **more), torch.randint(97, (2, 64))
    loss = loss_of(made, ids)
    loss.mean().backward()
    torch.save({"config": more, "ids": ids, "loss": loss.detach(),
                "weights": {name: p.data for name, p in made.named_parameters()},
                "grads": {name: p.grad for name, p in made.named_parameters()}}, tmp_path / "one")
    script = Path(__file__).with_name("megatron_ranks.py")
    ranks = [subprocess.Popen([sys.executable, script, what, tmp_path / "one", tmp_path / "store",
                               str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-2000:] for text in said)


def test_checkpoints():
    """Sharded checkpoints name the same tensors."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    own, theirs = (model(ours, softmax_type="learnable").sharded_state_dict(metadata=metadata)
                   for ours in (True, False))
    assert own.keys() == theirs.keys() and any("softmax_offset" in name for name in own)


def test_refused():
    with pytest.raises(RegraphError, match="attention_dropout is 0.1; expected 0"):
        model(True, attention_dropout=0.1)
    with pytest.raises(RegraphError, match="expected no keys after"):
        model(True, window_size=(9, 3))
    made = model(True).decoder.layers[0].self_attention.core_attention
    x = [torch.zeros(8, 1, heads, 16) for heads in (4, 2, 2)]
    with pytest.raises(RegraphError, match="attn_mask_type is padding; expected causal"):
        made(*x, None, attn_mask_type=AttnMaskType.padding)
    with pytest.raises(RegraphError, match="attention_bias"):
        made(*x, None, attention_bias=x[0])
    with pytest.raises(RegraphError, match="8 keys for 1 queries"):
        made(x[0][:1], *x[1:], None)
    with pytest.raises(RegraphError, match='expected "thd"'):
        made(*x, None, packed_seq_params=PackedSeqParams(qkv_format="sbhd"))
