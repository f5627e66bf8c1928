"""regraph.nanovllm on the CPU: the layer by itself, with contexts such as nano-vllm makes, over
steps of prompts, shared prefixes and single tokens, beside attention over whole sequences."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402
import regraph.nanovllm  # noqa: E402
import regraph.torch  # noqa: E402
from regraph import RegraphError  # noqa: E402

H, KH, D, PAGE = 4, 2, 16, 16
NSA = {"kernel": 8, "stride": 4, "block": 16, "top_n": 3, "init": 1, "local": 2, "window": 12}
TABLE = [[3, 7, 1, 8], [3, 7, 0, 4], [6, 2, 5, 9]]  # the second begins as the first
LENGTHS, SHARED = (53, 61, 40), 32


@dataclass
class Context:
    is_prefill: bool
    cu_seqlens_q: object = None
    cu_seqlens_k: object = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    slot_mapping: object = None
    context_lens: object = None
    block_tables: object = None


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


def starts(lengths):
    return torch.nn.functional.pad(i32(lengths).cumsum(0), (1, 0)).to(torch.int32)


@pytest.fixture
def said(monkeypatch):
    """Where nano-vllm keeps the context of a step."""
    now = types.SimpleNamespace(context=None)
    utils = types.ModuleType("nanovllm.utils.context")
    utils.get_context = lambda: now.context
    for name in ("nanovllm", "nanovllm.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nanovllm.utils.context", utils)
    monkeypatch.delitem(sys.modules, "nanovllm.layers.attention", raising=False)
    return now


def slots(b, begin, end):
    return [TABLE[b][t // PAGE] * PAGE + t % PAGE for t in range(begin, end)]


def prefill(batch, tables):
    """Rows begin … end of sequences; [(number, begin, end)]."""
    return Context(True, starts([e - a for _, a, e in batch]), starts([e for *_, e in batch]),
                   max(e - a for _, a, e in batch), max(e for *_, e in batch),
                   i32(sum((slots(*one) for one in batch), [])),
                   block_tables=i32([TABLE[b] for b, *_ in batch]) if tables else None)


def sequences(gate):
    g = torch.Generator().manual_seed(2)
    shapes = [(H, D), (KH, D), (KH, D), *([(H, 3)] if gate else [])]
    made = [[torch.randn(n, *shape, generator=g) for shape in shapes] for n in LENGTHS]
    for one, other in zip(made[0], made[1]):
        other[:SHARED] = one[:SHARED]
    return made


def columns(rows):
    """The same rows, v and the gate as nano-vllm's layers have them: columns of one product."""
    n, parts = len(rows[0]), [x[0].numel() for x in rows]
    one = torch.cat([x.reshape(n, -1) for x in rows], 1).split(parts, 1)
    return [*rows[:2], *(x.view(y.shape) for x, y in zip(one[2:], rows[2:]))]


def whole(x, nsa):
    if nsa:
        attend = regraph.torch.attention(regraph.example("nsa.json"), H=H, KH=KH, D=D, DV=D, **NSA)
        return attend(*x, i32([0, len(x[0])]))
    length = torch.arange(len(x[0]))
    seen = (length[None, :] <= length[:, None])[:, None, :].expand(-1, H, -1)
    return reference.attend(*x, seen)[0]


@pytest.mark.parametrize("nsa", [None, NSA])
def test_steps_give_the_whole(nsa, said):
    regraph.nanovllm.install(nsa, ahead=False)
    layer = sys.modules["nanovllm.layers.attention"].Attention(H, D, D ** -0.5, KH)
    data = sequences(nsa)
    want = [whole(x, nsa) for x in data]

    def step(context, batch):
        said.context = context
        rows = [torch.cat([data[b][i][a:e] for b, a, e in batch]) for i in range(len(data[0]))]
        got = layer(*columns(rows))
        expected = torch.cat([want[b][a:e] for b, a, e in batch])
        if nsa:  # the unpaged graph's bits
            assert torch.equal(got[:len(expected)], expected)
        else:
            assert reference.rel_rms(got[:len(expected)], expected) < 1e-6
        return got

    first = [(0, 0, 50), (2, 0, 33)]
    step(prefill(first, False), first)  # as nano-vllm finds out how much memory a step takes
    layer.k_cache, layer.v_cache = (torch.full((10, PAGE, KH, D), float("nan")) for _ in range(2))
    step(prefill(first, False), first)  # prompts have no tables
    step(prefill([(1, SHARED, 57)], True), [(1, SHARED, 57)])  # those that share pages do
    for t in range(3):
        batch = [(b, at + t, at + t + 1) for b, at in ((0, 50), (1, 57), (2, 33))]
        lived = i32([e for *_, e in batch])
        step(Context(False, slot_mapping=i32(sum((slots(*one) for one in batch), [])),
                     context_lens=lived, block_tables=i32(TABLE)), batch)
    batch = [(2, 36, 37)]  # a captured graph: its other slots are nobody's
    data.append([torch.full_like(x[:2], float("nan")) for x in data[0]])
    said.context = Context(False, slot_mapping=i32(slots(2, 36, 37) + [-1, -1]),
                           context_lens=i32([37, 0, 0]),
                           block_tables=i32([TABLE[2], [-1] * 4, [-1] * 4]))
    got = layer(*(torch.cat([data[2][i][36:37], data[3][i]]) for i in range(len(data[0]))))
    assert reference.rel_rms(got[:1], want[2][36:37]) < 1e-6 and (got[1:] == 0).all()


@pytest.mark.parametrize("nsa", [None, NSA])
def test_layers_share_what_a_step_comes_to(nsa, said):
    """Several layers, one context for several steps with its numbers changed in between, as a
    captured graph's: each layer says what it would say with a context of its own."""
    regraph.nanovllm.install(nsa, ahead=False)
    made = sys.modules["nanovllm.layers.attention"].Attention
    alone, layers = made(H, D, D ** -0.5, KH), [made(H, D, D ** -0.5, KH) for _ in range(2)]
    for layer in (alone, *layers):
        layer.k_cache, layer.v_cache = (torch.zeros(10, PAGE, KH, D) for _ in range(2))
    data = sequences(nsa)
    shared = Context(False, context_lens=i32([0, 0]), block_tables=i32([[-1] * 4] * 2))
    steps = []
    for t in range(20):
        who = [(t % 3, t // 3 + 1), ((t + 1) % 3, (t + 1) // 3 + 1)]
        rows = [torch.cat([data[b][i][e - 1:e] for b, e in who]) for i in range(len(data[0]))]
        shared.context_lens[:] = i32([who[0][1], who[1][1] if t % 4 else 0])  # at times nobody's
        shared.block_tables[:] = i32([TABLE[b] for b, _ in who])
        said.context = shared
        own = Context(False, context_lens=shared.context_lens.clone(),
                      block_tables=shared.block_tables.clone())
        steps.append((own, rows, [layer(*columns(rows)) for layer in layers]))
    for said.context, rows, got in steps:
        want = alone(*rows)
        assert all(torch.equal(o, want) for o in got)  # rows of their own, columns of a product
    assert all(torch.equal(layer.k_cache, alone.k_cache) for layer in layers)


def test_refused(said):
    with pytest.raises(RegraphError, match="there is no 'windows'"):
        regraph.nanovllm.install({"windows": 3})
    layer = regraph.nanovllm.Attention(H, D, D ** -0.5, KH, NSA)
    with pytest.raises(RegraphError, match="goes with nsa"):
        layer(*(torch.zeros(3, h, D) for h in (H, KH, KH)))
    said.context = prefill([(0, 0, 3)], False)
    odd = regraph.nanovllm.Attention(H, D, 1.0, KH, NSA)
    with pytest.raises(RegraphError, match="scale 1.0; expected 1/√16"):
        odd(*(torch.zeros(3, h, D) for h in (H, KH, KH)), torch.zeros(3, H, 3))
    sys.modules["nanovllm.models"] = types.ModuleType("nanovllm.models")
    with pytest.raises(RegraphError, match="before nanovllm's models"):
        regraph.nanovllm.install()
    del sys.modules["nanovllm.models"]
