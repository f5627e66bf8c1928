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
import regraph.torch  # noqa: E402
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


NSA = {"kernel": 8, "stride": 4, "block": 8, "top_n": 4, "window": 10}


def model(ours, nsa=None, **more):
    """With Megatron's attention, ours, or, where `nsa` says settings, with that."""
    spec = get_gpt_layer_local_spec()
    if nsa is not None:
        spec = megatron.with_nsa(spec, **{**NSA, **nsa})
    made = GPTModel(config(**more), megatron.with_attention(spec) if ours and nsa is None else spec,
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


def pack_of(starts, padded=False):
    longest = int(starts.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest,
        max_seqlen_kv=longest, **({"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts}
                                  if padded else {}))


@pytest.mark.parametrize("nsa, padded", [(None, False), (None, True),
                                         ({"v_method": "swiglu"}, True)])
def test_packed(nsa, padded):
    """Sequences in one pack, each as if alone; what pads them is seen by none of their tokens."""
    more = {} if nsa else {"softmax_type": "learnable"}
    own, theirs = model(True, nsa, **more), model(False, nsa, **more)
    ids = torch.randint(97, (1, 40))
    starts = torch.tensor([0, 17, 22, 40], dtype=torch.int32)
    lengths = [14, 5, 18] if padded else [17, 5, 18]
    loss = loss_of(own, ids, packed_seq_params=pack_of(starts, padded))
    there = torch.cat([torch.arange(a, a + n) for a, n in zip(starts.tolist(), lengths)])
    parts = [loss_of(theirs, ids[:, a: a + n]) for a, n in zip(starts.tolist(), lengths)]
    expected = torch.cat(parts, 1)
    assert reference.rel_rms(loss[:, there], expected) < 2e-6
    loss[:, there].sum().backward()
    expected.sum().backward()
    close(own, theirs)


@pytest.mark.parametrize("what", ["tp", "cp"])
def test_two_ranks(what, tmp_path):
    """Two processes that share out the heads, or each sequence (of packs, too): losses and
    gradients of one."""
    window = {"softmax_type": "learnable", "window_size": (9, 0), "window_attn_skip_freq": [1, 0]}
    cases = []
    for nsa, starts in ((None, None), ({"k_method": "linear", "policy": "all"}, None),
                        (None, [0, 24, 24, 64]), ({"v_method": "linear"}, [0, 32, 64])):
        starts = starts and torch.tensor(starts, dtype=torch.int32)
        more = window if nsa is None else {}
        made = model(True, nsa, **more)
        ids = torch.randint(97, (2 if starts is None else 1, 64))
        loss = loss_of(made, ids, packed_seq_params=None if starts is None else pack_of(starts))
        loss.mean().backward()
        cases.append({"config": more, "nsa": nsa, "starts": starts, "ids": ids,
                      "loss": loss.detach(),
                      "weights": {name: p.data for name, p in made.named_parameters()},
                      "grads": {name: p.grad for name, p in made.named_parameters()}})
    torch.save(cases, tmp_path / "one")
    script = Path(__file__).with_name("megatron_ranks.py")
    ranks = [subprocess.Popen([sys.executable, script, what, tmp_path / "one", tmp_path / "store",
                               str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-2000:] for text in said)


def test_checkpoints():
    """Sharded checkpoints name the same tensors."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    own, theirs, sparse = (
        made.sharded_state_dict(metadata=metadata)
        for made in (model(True, softmax_type="learnable"), model(False, softmax_type="learnable"),
                     model(True, {"k_method": "linear"})))
    assert own.keys() == theirs.keys() and any("softmax_offset" in name for name in own)
    more = {name.split("self_attention.")[1] for name in sparse.keys() - own.keys()}
    assert more == {"core_attention.k_weight", "linear_gate.weight", "linear_gate.bias",
                    "linear_gate._extra_state"}


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


# ---- NSA ----


def dense_nsa(core):
    """What an NsaCoreAttention computes, in plain torch, with all blocks selected."""
    def compressed(weight):
        def run(x, kernel, stride, storage):
            if x.shape[0] < kernel:
                return x[:0]
            blocks = x.unfold(0, kernel, stride)  # [n, KH, d, kernel]
            flat = blocks.transpose(2, 3).flatten(2)
            return blocks.mean(-1) if weight is None else flat @ weight.T
        return run

    def attend(starts, q, k, v, gate):
        parts = []
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist()):
            weights = iter((core.k_weight, core.v_weight))
            reference.compress = lambda *args: compressed(next(weights))(*args)
            everything = torch.arange(-(-(b - a) // 8))[None, None].expand(b - a, 2, -1)
            parts.append(reference.sequence(q[a:b], k[a:b], v[a:b], gate[a:b], everything, NSA,
                                            None))
        return torch.cat(parts).flatten(1)
    return attend


@pytest.mark.parametrize("method", ["mean", "linear"])
def test_nsa_like_reference(method, monkeypatch):
    """Losses and all gradients, against attention with dense masks in plain torch: all blocks are
    selected, which leaves the choice out of it."""
    own, theirs = (model(True, {"top_n": 5, "k_method": method, "v_method": method})
                   for _ in range(2))
    monkeypatch.setattr(reference, "compress", reference.compress)
    for layer in theirs.decoder.layers:
        core = layer.self_attention.core_attention
        monkeypatch.setattr(core, "_attend", dense_nsa(core))
    ids = torch.randint(97, (2, 40))
    a, b = loss_of(own, ids), loss_of(theirs, ids)
    assert reference.rel_rms(a, b) < 2e-6
    a.mean().backward()
    b.mean().backward()
    close(own, theirs)
    names = [name for name, p in own.named_parameters() if p.grad.norm() > 0]
    assert sum("linear_gate" in name for name in names) == 4  # two layers' weights and biases
    assert sum("core_attention" in name for name in names) == (0 if method == "mean" else 4)


def test_nsa_like_module():
    """The core attention alone: the bits of regraph.torch.Module, that chooses its blocks."""
    core = model(True, {"k_method": "linear", "v_method": "linear"}).decoder.layers[0]
    core = core.self_attention.core_attention
    module = regraph.torch.Module(regraph.example("nsa_linear.json"), H=4, KH=2, D=16, DV=16,
                                  parameters=["k_weight", "v_weight"], **NSA)
    module.load_state_dict(core.state_dict())
    x = [torch.randn(60, heads, 16).requires_grad_() for heads in (4, 2, 2)]
    gate = torch.randn(60, 1, 12).requires_grad_()
    starts = torch.tensor([0, 41, 60], dtype=torch.int32)
    o = core(*x, None, gate=gate, packed_seq_params=pack_of(starts))
    expected = module(*x, gate.view(60, 4, 3), starts).flatten(1)
    assert torch.equal(o, expected)
    d_o = torch.randn(o.shape)
    for got, want in zip(torch.autograd.grad(o, [*x, gate, *core.parameters()], d_o),
                         torch.autograd.grad(expected, [*x, gate, *module.parameters()], d_o)):
        assert torch.equal(got, want)


def test_nsa_training():
    """Losses fall, and are the same whatever is computed again."""
    losses = []
    for policy in (None, "all"):
        made = model(True, {"k_method": "linear", "v_method": "sigmoid_mul", "policy": policy})
        optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
        g = torch.Generator().manual_seed(1)
        batches = [torch.randint(97, (2, 40), generator=g) for _ in range(3)]
        losses.append([])
        for i in range(20):
            loss = loss_of(made, batches[i % 3]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1] and losses[0][-1] < 0.8 * losses[0][0]


def test_nsa_mistakes():
    with pytest.raises(RegraphError, match="there is no 'kernal'; expected some of kernel"):
        model(True, {"kernal": 8})
    with pytest.raises(RegraphError, match="NSA has neither sinks nor windows"):
        model(True, {}, softmax_type="learnable")
