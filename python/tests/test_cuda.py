"""regraph.torch on a GPU. Skips without one."""

import json
import os
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import reference  # noqa: E402
import regraph  # noqa: E402
import regraph.torch  # noqa: E402
from regraph import RegraphError  # noqa: E402

try:
    regraph.device_check("cuda")
except RegraphError as error:
    pytest.skip(str(error), allow_module_level=True)

P = {"H": 8, "KH": 2, "D": 128, "DV": 128, "kernel": 32, "stride": 16, "block": 64, "top_n": 4,
     "init": 1, "local": 2, "window": 100}
T = 640
PACK = (0, 31, 31, 288, 600)
NSA = json.loads(regraph.example("nsa.json").read_text())
WITH_IDX = {**NSA, "name": "nsa_idx", "outputs": {"o": "o", "idx": "idx"}}
GATES = {torch.bfloat16: (6e-3, 1e-2), torch.float16: (8e-4, 1.5e-3), torch.float32: (1e-5, 2e-5)}


def tensors(tokens=T, p=P, dtype=torch.bfloat16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = (p["H"], p["D"]), (p["KH"], p["D"]), (p["KH"], p["DV"]), (p["H"], 3)
    return [torch.randn(tokens, *s, generator=g, device="cuda").to(dtype).requires_grad_()
            for s in shapes]


def starts(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def normal_like(o, seed=5):
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(o.shape, generator=g, device="cuda").to(o.dtype)


def grads(out, x, d_o):
    return torch.autograd.grad(out, x, d_o)


def same(a, b):
    return all(torch.equal(i, j) for i, j in zip(a, b))


@pytest.fixture
def attend():
    return regraph.torch.attention(NSA, **P)


@pytest.mark.parametrize("dtype", list(GATES), ids=str)
@pytest.mark.parametrize("policy", [None, "policies/all.json"])
@pytest.mark.parametrize("pack", [PACK, (0, T)], ids=["pack", "one"])
def test_against_reference(dtype, policy, pack):
    attend = regraph.torch.attention(WITH_IDX, policy and regraph.example(policy), **P)
    x, cu = tensors(dtype=dtype), starts(*pack)
    out = attend(*x, cu)
    d_o = normal_like(out["o"])
    wide = [t.detach().double().requires_grad_() for t in x]
    expected = reference.nsa(*wide, out["idx"], cu, P, dtype)
    assert reference.rel_rms(out["o"], expected) < GATES[dtype][0]
    for name, got, want in zip("qkvg", grads(out["o"], x, d_o),
                               grads(expected, wide, d_o.double())):
        assert got.dtype == dtype and reference.rel_rms(got, want) < GATES[dtype][1], name
    length = pack[-1] - pack[-2]
    first = pack[-2]
    chosen = reference.select(*(t.detach()[first: pack[-1]] for t in wide[:2]), P, dtype)
    idx = out["idx"][first: pack[-1]].tolist()
    agree = sum(set(idx[i][h]) - {-1} == chosen[i][h]
                for i in range(length) for h in range(P["KH"]))
    assert agree >= 0.99 * length * P["KH"]


def test_gradient_is_the_slope(attend):
    x = tensors(dtype=torch.float32)
    d_o = normal_like(attend(*x))
    gradient = grads(attend(*x), x, d_o)
    for at in (2, 3):  # neither v nor gate moves what is selected
        step = 1e-2 * normal_like(x[at])
        there, here = ((attend(*x[:at], x[at] + s * step, *x[at + 1:]).double() * d_o).sum()
                       for s in (1, -1))
        assert abs((there - here) / (2 * (gradient[at].double() * step).sum()) - 1) < 5e-3


def test_hundred_batches_of_one_plan():
    p = {**P, "window": 64}
    attend = regraph.torch.attention(WITH_IDX, **p)
    torch.manual_seed(1)
    for seed in range(100):
        lengths = (torch.rand(6).pow(3) * T / 2).int()
        cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).clamp(max=T).int().cuda()
        x = tensors(seed=seed)
        torch.cuda.set_sync_debug_mode("error")  # the host may not look at the lengths
        try:
            out = attend(*x, cu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wide = [t.detach().double() for t in x]
        expected = reference.nsa(*wide, out["idx"], cu, p, torch.bfloat16)
        assert reference.rel_rms(out["o"], expected) < GATES[torch.bfloat16][0], cu
        assert not out["o"][int(cu[-1]):].any()
    assert len(attend._program._variants) == 1


def test_repeats_and_neighbours(attend):
    x, cu = tensors(), starts(*PACK)
    o = attend(*x, cu)
    d_o = normal_like(o)
    first = [o, *grads(o, x, d_o)]
    for _ in range(5):
        o = attend(*x, cu)
        assert same(first, [o, *grads(o, x, d_o)])
    a, b = PACK[-2:]
    alone = [t.detach()[a:b].clone().requires_grad_() for t in x]
    o = attend(*alone)
    assert same([f[a:b] for f in first], [o, *grads(o, alone, d_o[a:b])])


def test_eager_is_bit_equal(attend):
    x, cu = tensors(), starts(*PACK)
    o = attend(*x, cu)
    replayed = [o, *grads(o, x, normal_like(o))]
    os.environ["REGRAPH_EAGER"] = "1"
    try:
        stepwise = regraph.torch.attention(NSA, threads=1, **P)  # another program, and session
        o = stepwise(*x, cu)
        assert same(replayed, [o, *grads(o, x, normal_like(o))])
    finally:
        del os.environ["REGRAPH_EAGER"]


def test_several_calls_in_flight(attend):
    calls = [tensors(seed=seed) for seed in range(4)]
    d_o = normal_like(attend(*calls[0]))
    alone = [grads(attend(*x), x, d_o) for x in calls]
    flying = [attend(*x) for x in calls]
    for i in (2, 0, 3, 1):
        assert same(alone[i], grads(flying[i], calls[i], d_o))


def test_streams(attend):
    calls = [tensors(seed=seed) for seed in range(3)]
    d_o = normal_like(attend(*calls[0]))
    alone = [grads(attend(*x), x, d_o) for x in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    got = []
    for _ in range(3):
        got = []
        for x, stream in zip(calls, streams):
            with torch.cuda.stream(stream):
                got.append(grads(attend(*x), x, d_o))
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(alone, got))


def test_memory(attend):
    """torch's allocator is asked for the saved block, the scratch of the call and the outputs:
    nothing else."""
    x, cu = tensors(), starts(*PACK)
    attend(*x, cu).sum().backward()
    sizes, o_bytes = attend.plan(*x, cu).sizes, T * P["H"] * P["DV"] * 2

    def asked(what):
        return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]

    before = asked("current")
    torch.cuda.reset_peak_memory_stats()
    o = attend(*x, cu)
    assert asked("peak") - before == o_bytes + sizes.saved + sizes.scratch
    assert asked("current") - before == o_bytes + sizes.saved
    del o
    assert asked("current") == before


def train_step(attend, x, cu, d_o):
    o = attend(*x, cu)
    return [o, *grads(o, x, d_o)]


def test_capture(attend):
    """A whole step captured by torch: other inputs, other lengths, one graph."""
    x, cu = tensors(), starts(*PACK)
    d_o = normal_like(attend(*x, cu))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            train_step(attend, x, cu, d_o)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train_step(attend, x, cu, d_o)
    for seed, pack in ((1, PACK), (2, (0, 100, 200, 300, 640)), (3, (0, 0, 0, 0, 5))):
        fresh, lengths = tensors(seed=seed), starts(*pack)
        with torch.no_grad():
            for t, f in zip(x, fresh):
                t.copy_(f)
            cu.copy_(lengths)
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, train_step(attend, fresh, lengths, d_o))
    with pytest.raises(RegraphError, match="captured"):
        cold = tensors(tokens=64)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            attend(*cold, cu[:2])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(attend, mode):
    def step(q, k, v, gate, cu):
        return torch.nn.functional.silu(attend(q * 2, k, v, gate, cu)) + 1

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    x, cu = tensors(), starts(*PACK)
    d_o = normal_like(step(*x, cu))
    expected = [step(*x, cu)]
    expected += grads(expected[0], x, d_o)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        o = compiled(*x, cu)
        got = [o.clone(), *(g.clone() for g in grads(o, x, d_o))]
        for a, b in zip(got, expected):
            assert reference.rel_rms(a, b) < 5e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_offload(attend, compiled):
    away = regraph.torch.attention(NSA, {"regraph_policy": 1, "nodes": {"*_o": "offload"}}, **P)
    call = torch.compile(away, fullgraph=True, backend="aot_eager") if compiled else away
    cu = starts(*PACK)
    for _ in range(3):
        batches = [tensors(seed=seed) for seed in range(3)]
        outs = [call(*x, cu) for x in batches]  # all wait at once
        for out, x in reversed(list(zip(outs, batches))):
            plain = attend(*x, cu)
            d_o = normal_like(out)
            assert torch.equal(out, plain) and same(grads(out, x, d_o), grads(plain, x, d_o))
    assert away.plan(*batches[0], cu).sizes.host > 0


def test_operators(attend):
    x = [*tensors(tokens=100), starts(0, 17, 100)]
    # fills new memory, and opcheck compares all of the saved block
    torch.use_deterministic_algorithms(True)
    try:
        torch.library.opcheck(torch.ops.regraph.forward, (attend.made_of, "q,k,v,gate", "", x, []))
    finally:
        torch.use_deterministic_algorithms(False)


def test_misaligned_and_strided(attend):
    x, cu = tensors(), starts(*PACK)
    o = attend(*x, cu)
    odd = [torch.cat([t.detach().flatten()[:1], t.detach().flatten()])[1:].view_as(t) for t in x]
    assert odd[0].data_ptr() % 16 and torch.equal(o, attend(*odd, cu))
    strided = [torch.stack([t, t], -1)[..., 0] for t in x]
    assert torch.equal(o, attend(*strided, cu))


def test_wrong_lengths_are_reported():
    attend = regraph.torch.attention(NSA, **{**P, "window": 33})
    x = tensors()
    attend(*x, starts(0, 300, 200, 500))
    with pytest.raises(RegraphError, match=r"cu_seqlens\[2\] was 200") as error:
        attend.synchronize()
    assert error.value.status == "RG_E_DATA"
    attend.synchronize()  # once
    attend(*x, starts(0, 300, 200, 9999))
    torch.cuda.synchronize()
    with pytest.raises(RegraphError, match="cu_seqlens"):
        attend(*x, starts(0, 300, 400, 500))
    attend(*x, starts(0, 300, 400, 500))


def test_lengths_past_the_tokens(attend):
    """Nobody waits for the device, and it tells what it was given: 600 rows, in a plan of 640."""
    x = tensors(600)
    assert attend.plan(*x).of_role(0)[0].shape[0] == 640
    large = torch.tensor([0, 20, 2**32 + 600], device="cuda")
    for wrong, told in ((starts(0, 20, 605), "cu_seqlens.2. was 605 in an earlier run, past the"),
                        (large, "cu_seqlens.2. was 1073741824 or more in an earlier run, past the"),
                        (starts(0, 20, 700), "cu_seqlens.2. was 700 in an earlier run, past the")):
        attend(*x, wrong)
        with pytest.raises(RegraphError, match=told):
            attend.synchronize()
        attend.synchronize()  # once
    with pytest.raises(RegraphError, match="was 2147483647 or more in an earlier run; expected"):
        attend(*tensors(640), torch.tensor([0, 20, 2**32 + 640], device="cuda"))
        attend.synchronize()
    x = tensors(0)
    attend(*x, starts(0)).sum().backward()
    attend.synchronize()
    assert [t.grad.shape for t in x] == [t.shape for t in x]


def test_layer_with_main_grad():
    """Projections, rotary positions and all; one weight's gradient goes to main_grad. Against the
    CPU in float32."""
    p = {"M": 256, "H": 4, "KH": 1, "top_n": 4, "window": 100}  # every block is selected: no ties
    layer = regraph.torch.attention(regraph.example("nsa_layer.json"), **p)
    g = torch.Generator().manual_seed(3)
    shapes = (256,), (512, 256), (128, 256), (128, 256), (12, 256), (256, 512)
    narrow = [(torch.randn(*s, generator=g) / 16).bfloat16() for s in shapes]
    narrow.append(torch.randn(250, 256, generator=g).bfloat16())
    cu, results = torch.tensor([0, 120, 240], dtype=torch.int32), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        *w, x = (t.to(device, dtype).requires_grad_() for t in narrow)
        w[1].main_grad = torch.full(w[1].shape, 2.0, device=device)
        for _ in range(2):
            y = layer(x, *w, cu.to(device))
            y.backward(torch.ones_like(y))
        results.append([y, w[1].main_grad - 2, x.grad / 2,
                        *(t.grad / 2 for i, t in enumerate(w) if i != 1)])
        assert w[1].grad is None
    for i, (a, b) in enumerate(zip(*results)):
        assert reference.rel_rms(b, a) < 2e-2, i


def test_numpy_session():
    """Without torch's memory: arrays in and out."""
    import numpy as np

    p = {**P, "top_n": 3}
    spec = regraph.Spec(NSA, dtype="f32", **p)
    x = {n: t.detach().cpu().numpy()
         for n, t in zip(("q", "k", "v", "gate"), tensors(100, dtype=torch.float32))}
    x["cu_seqlens"] = np.array([0, 40, 90], np.int32)
    results = []
    for device in ("cpu", "cuda"):
        session = regraph.Session(regraph.Plan(spec, device=device, T=100, B=2))
        o = session.forward(**x)["o"]
        results.append([o, *session.backward({"o": np.ones_like(o)}).values()])
    assert all(reference.rel_rms(torch.from_numpy(b), torch.from_numpy(a)) < 2e-5
               for a, b in zip(*results))
