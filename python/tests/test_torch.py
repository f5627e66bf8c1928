"""regraph.torch on the CPU, against a dense reference in torch."""

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

P = {"H": 4, "KH": 2, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16, "top_n": 4,
     "init": 1, "local": 2, "window": 20}
NSA = json.loads(regraph.example("nsa.json").read_text())
WITH_IDX = {**NSA, "name": "nsa_idx", "outputs": {"o": "o", "idx": "idx"}}
LAYER = regraph.example("nsa_layer.json")
LAYER_P = {"M": 32, "H": 4, "KH": 1, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16,
           "top_n": 4, "window": 20}


def tensors(tokens=150, p=P, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (p["H"], p["D"]), (p["KH"], p["D"]), (p["KH"], p["DV"]), (p["H"], 3)
    return [torch.randn(tokens, *s, generator=g).to(dtype).requires_grad_() for s in shapes]


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


def grads(out, x, d_o):
    return torch.autograd.grad(out, x, d_o)


def same(a, b):
    return all(torch.equal(i, j) for i, j in zip(a, b))


@pytest.fixture
def attend():
    return regraph.torch.attention(NSA, **P)


@pytest.mark.parametrize("dtype, gate_o, gate_g", [(torch.float32, 1e-5, 2e-5),
                                                   (torch.bfloat16, 8e-3, 1.2e-2)])
@pytest.mark.parametrize("policy", [None, "policies/all.json"])
def test_against_reference(dtype, gate_o, gate_g, policy):
    attend = regraph.torch.attention(WITH_IDX, policy and regraph.example(policy), **P)
    x, cu = tensors(dtype=dtype), starts(0, 70, 70, 85, 145)
    out = attend(*x, cu)
    idx = out["idx"]
    d_o = torch.randn(out["o"].shape).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in x]
    expected = reference.nsa(*wide, idx, cu, P, dtype)
    assert reference.rel_rms(out["o"], expected) < gate_o
    for name, got, want in zip("qkvg", grads(out["o"], x, d_o),
                               grads(expected, wide, d_o.double())):
        assert got.dtype == dtype and reference.rel_rms(got, want) < gate_g, name
    chosen = reference.select(wide[0][:70].detach(), wide[1][:70].detach(), P, dtype)
    agree = sum(set(idx[i, h].tolist()) - {-1} == chosen[i][h] for i in range(70) for h in range(2))
    assert agree >= 0.99 * 140


def test_calls(attend):
    """By position, by name, lengths left out, int64 lengths, slices, no gradients."""
    x, cu = tensors(), starts(0, 150)
    o = attend(*x, cu)
    q, k, v, gate = x
    assert torch.equal(o, attend(q, k, gate=gate, v=v))
    assert torch.equal(o, attend(*x, cu.long()))
    assert torch.equal(o, regraph.torch.Module(NSA, **P)(*x, cu_seqlens=cu))
    sliced = [torch.stack([t, t], -1)[..., 0] for t in x]
    assert not sliced[0].is_contiguous() and torch.equal(o, attend(*sliced, cu))
    with torch.no_grad():
        assert torch.equal(o, attend(*x, cu)) and not attend(*x, cu).requires_grad
    plan = attend.plan(*x)
    assert plan.sizes.saved > attend.plan(*[t.detach() for t in x]).sizes.saved


def test_alike():
    """What no plan tells: counts of tokens within one capacity, devices, and negations that torch
    puts off."""
    spec = json.loads(regraph.example("dense_causal.json").read_text())
    attend = regraph.torch.attention(spec, H=4, KH=2, D=16, DV=16)
    q, k, v, _ = [t.detach() for t in tensors(tokens=1000)]
    o = attend(q, k, v)["o"]
    with pytest.raises(RegraphError, match="'v' has 999 tokens; expected 1000, as 'q' has"):
        attend(q, k, v[:999])
    with pytest.raises(RegraphError, match="'k' is on meta; expected cpu, where 'q' is"):
        attend(q, k.to("meta"), v)
    for wrong in ([0, 1000], q.numpy()):
        with pytest.raises(RegraphError, match="'k' is of .*; expected a tensor"):
            attend(q, wrong, v)
    with pytest.raises(RegraphError, match="'q' holds torch.int32; expected torch.bfloat16"):
        attend(q.int(), k.bfloat16(), v.bfloat16())
    assert torch.equal(attend(torch._neg_view(-q), k, v)["o"], o)
    x = [t.clone().requires_grad_() for t in (q, k, v)]
    minus = torch._neg_view(torch.ones_like(o))
    for _ in range(2):  # the second is known by the first's
        assert same(grads(attend(*x)["o"], x, minus),
                    grads(attend(*x)["o"], x, -torch.ones_like(o)))


def test_state_is_for_sessions():
    with pytest.raises(RegraphError, match="has state \\('k_cache'\\)"):
        regraph.torch.attention(regraph.example("nsa_serve.json"))


def test_inputs_of_repeated_blocks_are_for_sessions():
    with pytest.raises(RegraphError, match="'layer0_wn' is of a copy of a repeated block"):
        regraph.torch.attention(regraph.example("nsa_model.json"))


def test_lengths_left_out():
    """They follow the tokens, wherever these stand among the inputs; of two kinds of rows, neither
    is meant."""
    spec = json.loads(regraph.example("dense_causal.json").read_text())
    spec["params"].update(H=4, KH=2, D=16, DV=16)
    q, k, v, _ = [t.detach() for t in tensors(tokens=40)]
    o = regraph.torch.attention(spec)(q, k, v, starts(0, 40))["o"]
    inputs = spec["inputs"]
    sinks = {"shape": ["H"], "dtype": "f32"}
    weighted = {**spec, "inputs": {"cu_seqlens": inputs["cu_seqlens"], "sinks": sinks, **inputs}}
    weighted["nodes"] = [{**spec["nodes"][0], "in": {**spec["nodes"][0]["in"], "sinks": "sinks"}}]
    for exact in (False, True):
        attend = regraph.torch.attention(weighted, exact=exact)
        assert torch.equal(attend(sinks=torch.full((4,), -1e30), q=q, k=k, v=v)["o"], o)
    keys = {name: {**inputs[name], "shape": ["S", *inputs[name]["shape"][1:]]} for name in "kv"}
    crossed = {**spec, "inputs": {**inputs, **keys, "cu_k": inputs["cu_seqlens"]}}
    crossed["nodes"] = [{**spec["nodes"][0],
                         "in": {**spec["nodes"][0]["in"], "cu_seqlens_k": "cu_k"}}]
    with pytest.raises(RegraphError, match="'cu_seqlens' is missing"):
        regraph.torch.attention(crossed)(q, k.repeat(2, 1, 1), v.repeat(2, 1, 1))


@pytest.mark.parametrize("tokens, fewer", [(128, 96), (150, 90)], ids=["capacities", "padded"])
def test_kinds_of_calls_in_turns(attend, tokens, fewer):
    """What one call has taught must not be taken for granted in the next, which looks alike."""
    x, cu = tensors(tokens), starts(0, 70, tokens)
    d_o = torch.randn(tokens, 4, 16)
    strided_d = torch.stack([d_o, d_o], -1)[..., 0]
    expected, first = attend(*x, cu).detach(), grads(attend(*x, cu), x, d_o)
    strided = [torch.stack([t, t], -1)[..., 0] for t in x]
    shorter = [t[:fewer] for t in x]
    alone = grads(attend(*shorter, starts(0, 70, fewer)), x, d_o[:fewer])
    narrow = attend(*[t.bfloat16() for t in x], cu)
    twin = attend(x[0], x[1], x[1], x[3], cu)
    assert not torch.equal(twin, expected)
    # the way that asks once is tried, too
    assert attend._program.last[True].same(*x, cu) == (tokens == 128)

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.equal(attend(*x, cu), narrow)

    def quietly(mode):
        with mode():
            return torch.equal(attend(*x, cu), expected)

    ways = (lambda: same(grads(attend(*x, cu), x, d_o), first),
            lambda: same(grads(attend(*x, cu), x, strided_d), first),
            lambda: same(grads(attend(*strided, cu), x, d_o), first),
            lambda: same(grads(attend(*shorter, starts(0, 70, fewer)), x, d_o[:fewer]), alone),
            lambda: same(grads(attend(*x[:2], x[2].detach(), x[3], cu), [x[0]], d_o), first[:1]),
            lambda: torch.equal(attend(*x, cu.long()), expected),
            lambda: torch.equal(attend(x[0], x[1], x[1], x[3], cu), twin),
            lambda: quietly(torch.no_grad), lambda: quietly(torch.inference_mode), autocast)
    for seed in range(60):
        way = int(torch.randint(len(ways), (1,), generator=torch.Generator().manual_seed(seed)))
        assert ways[way](), way


def test_subset_of_gradients(attend):
    x = tensors()
    everything = grads(attend(*x), x, torch.ones(150, 4, 16))
    for wanted in ({0}, {1, 2}, {3}):
        some = [t if i in wanted else t.detach() for i, t in enumerate(x)]
        got = grads(attend(*some), [x[i] for i in sorted(wanted)], torch.ones(150, 4, 16))
        assert all(reference.rel_rms(g, everything[i]) < 1e-6 for g, i in zip(got, sorted(wanted)))


def test_several_calls_in_flight(attend):
    calls = [tensors(seed=seed) for seed in range(4)]
    alone = [grads(attend(*x), x, torch.ones(150, 4, 16)) for x in calls]
    flying = [attend(*x) for x in calls]
    for i in (2, 0, 3, 1):
        assert same(alone[i], grads(flying[i], calls[i], torch.ones(150, 4, 16)))
    total = sum(attend(*x).sum() for x in calls)
    total.backward()
    assert same([x[0].grad for x in calls], [a[0] for a in alone])


def test_saved_tensors_that_move(attend):
    from torch.utils.checkpoint import checkpoint

    x, one = tensors(), torch.ones(150, 4, 16)
    plain = grads(attend(*x), x, one)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(),
                                                  lambda t: torch.cat([t[:1], t[1:]])):
        moved = attend(*x)
    assert same(plain, grads(moved, x, one))
    assert same(plain, grads(checkpoint(attend, *x, use_reentrant=False), x, one))


@pytest.mark.parametrize("policy", [{"nodes": {"*": "offload"}},
                                    {"nodes": {"slc_o": "offload"}, "preset": "all"}])
def test_offload(attend, policy):
    away = regraph.torch.attention(NSA, {"regraph_policy": 1, **policy}, **P)
    batches = [tensors(seed=seed) for seed in range(3)]
    cu = starts(0, 70, 150)
    assert away.plan(*batches[0], cu).sizes.host > 0
    for _ in range(2):  # the second time with the first's blocks
        outs = [away(*x, cu) for x in batches]
        for out, x in reversed(list(zip(outs, batches))):
            one = torch.ones_like(out)
            plain = attend(*x, cu)
            assert torch.equal(out, plain)
            assert same(torch.autograd.grad(out, x, one, retain_graph=True), grads(plain, x, one))
            assert same(grads(out, x, one), grads(attend(*x, cu), x, one))
        del outs, out
    pools = [v._hosts for v in away._program.variants() if v.plan.sizes.host]
    assert [len(blocks) for pool in pools for blocks in pool.values()] == [3]
    with torch.no_grad():
        assert torch.equal(away(*batches[0], cu), attend(*batches[0], cu))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_offload_in_an_operator(attend, backend):
    policy = {"regraph_policy": 1, "nodes": {"*": "offload"}, "doc": backend}  # its own program
    away = regraph.torch.attention(NSA, policy, **P)
    compiled = torch.compile(lambda *x: away(*x) * 1.5, fullgraph=True, backend=backend)
    cu = starts(0, 70, 150)
    for _ in range(2):
        batches = [tensors(seed=seed) for seed in range(2)]
        outs = [compiled(*x, cu) for x in batches]  # both wait at once
        for out, x in reversed(list(zip(outs, batches))):
            one = torch.ones_like(out)
            assert torch.equal(out, attend(*x, cu) * 1.5)
            assert same(grads(out, x, one), grads(attend(*x, cu) * 1.5, x, one))
        del outs, out
    pools = [v._hosts for v in away._program.variants() if v.plan.sizes.host]
    assert [len(blocks) for pool in pools for blocks in pool.values()] == [2]
    x = tensors(seed=5)
    with torch.no_grad():
        assert torch.equal(compiled(*x, cu), attend(*x, cu) * 1.5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = compiled(*x, cu)  # in someone else's bytes now
    assert same(grads(out, x, one), grads(attend(*x, cu) * 1.5, x, one))


def test_offload_with_any_number_of_tokens():
    policy = {"regraph_policy": 1, "nodes": {"slc_o": "offload"}}
    attend, away = (regraph.torch.attention(NSA, p, **P) for p in (None, policy))
    compiled = torch.compile(away, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (150, 97, 201):
        x, cu = tensors(rows), starts(0, 70, rows)
        one = torch.ones(rows, 4, 16)
        assert same(grads(compiled(*x, cu), x, one), grads(attend(*x, cu), x, one))


def test_backward_twice(attend):
    x, one = tensors(), torch.ones(150, 4, 16)
    o = attend(*x)
    first = torch.autograd.grad(o, x, one, retain_graph=True)
    assert same(first, grads(o, x, one))
    with pytest.raises(RuntimeError):
        g = torch.autograd.grad(attend(*x), x[0], one.requires_grad_(), create_graph=True)[0]
        g.sum().backward()


def layer_tensors():
    g = torch.Generator().manual_seed(3)
    m, h = LAYER_P["M"], LAYER_P["H"] * LAYER_P["D"]
    weights = [(m,), (h, m), (16, m), (16, m), (12, m), (m, h)]
    weights = [torch.nn.Parameter(torch.randn(*s, generator=g) / m**0.5) for s in weights]
    return torch.randn(100, m, generator=g).requires_grad_(), weights


def test_main_grad():
    layer = regraph.torch.attention(LAYER, **LAYER_P)
    x, w = layer_tensors()
    layer(x, *w).square().sum().backward()
    expected, other = w[1].grad.clone(), w[2].grad.clone()
    for weight in w:
        weight.grad = None
    w[1].main_grad = torch.ones_like(w[1])
    flying = [layer(x, *w).square().sum() for _ in range(3)]
    for loss in reversed(flying):
        loss.backward()
    assert w[1].grad is None and reference.rel_rms(w[1].main_grad - 1, 3 * expected) < 1e-5
    assert reference.rel_rms(w[2].grad, 3 * other) < 1e-5
    w[1].main_grad = torch.ones(3)
    with pytest.raises(RegraphError, match="main_grad of 'wq'"):
        layer(x, *w)


def test_operators(attend):
    x = [*tensors(tokens=40), starts(0, 17, 40)]
    # fills new memory, and opcheck compares all of the saved block
    torch.use_deterministic_algorithms(True)
    try:
        for wanted, inputs in ("q,k,v,gate", x), ("", [t.detach() for t in x]):
            torch.library.opcheck(torch.ops.regraph.forward,
                                  (attend.made_of, wanted, "", inputs, []))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(attend, backend):
    layer = regraph.torch.attention(LAYER, **LAYER_P)
    z, w = layer_tensors()

    def step(q, k, v, gate, cu):
        return torch.nn.functional.gelu(attend(q * 2, k, v, gate, cu)) + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for tokens in (150, 90):  # a plan and a graph each
        x, cu = tensors(tokens), starts(0, 70, 85)
        one = torch.ones(tokens, 4, 16)
        assert reference.rel_rms(compiled(*x, cu), step(*x, cu)) < 1e-6
        for a, b in zip(grads(compiled(*x, cu), x, one), grads(step(*x, cu), x, one)):
            assert reference.rel_rms(a, b) < 1e-6
    with torch.no_grad():
        assert reference.rel_rms(compiled(*x, cu), step(*x, cu)) < 1e-6
    w[1].main_grad = torch.zeros_like(w[1])
    layer(z, *w).sum().backward()
    expected, w[1].main_grad = w[1].main_grad, torch.zeros_like(w[1])
    torch.compile(lambda z: layer(z, *w), fullgraph=True, backend=backend)(z).sum().backward()
    assert reference.rel_rms(w[1].main_grad, expected) < 1e-6


def test_dynamic_lengths(attend):
    """One graph for all pack lengths after the first, with eager's bits."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    step = lambda q, k, v, gate, cu: attend(q * 2, k, v, gate, cu) + 1
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(50):
        tokens = 90 + 7 * i
        x, cu = tensors(tokens, seed=i), starts(*[0, 20, 30, 41][: 1 + i % 4], tokens)
        one = torch.ones(tokens, 4, 16)
        assert torch.equal(compiled(*x, cu), step(*x, cu))
        assert same(grads(compiled(*x, cu), x, one), grads(step(*x, cu), x, one))
    assert counter.frame_count <= 2


def test_capacities(attend):
    """Plans for more rows than there are change no bit, and serve many lengths."""
    exact = regraph.torch.attention(NSA, exact=True, **P)
    for tokens in (97, 150, 259):
        x, cu, one = tensors(tokens), starts(0, 33, tokens), torch.ones(tokens, 4, 16)
        assert torch.equal(exact(*x, cu), attend(*x, cu))
        assert same(grads(exact(*x, cu), x, one), grads(attend(*x, cu), x, one))
    assert attend.plan(*tensors(257)) is attend.plan(*tensors(288))


def test_export_in_a_fresh_process(attend, tmp_path):
    import os
    import subprocess

    x, cu = [t.detach() for t in tensors()], starts(0, 70, 150)
    program = torch.export.export(regraph.torch.Module(NSA, **P), (*x, cu))
    torch.export.save(program, tmp_path / "module.pt2")
    torch.save([*x, cu, attend(*x, cu)], tmp_path / "tensors.pt")
    code = ("import torch, regraph.torch\n*x, o = torch.load('tensors.pt')\n"
            "assert torch.equal(torch.export.load('module.pt2').module()(*x), o)")
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True,
                   env={**os.environ, "PYTHONPATH": path})


def test_autocast(attend):
    x = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        o = attend(*x)
        assert o.dtype == torch.bfloat16
        assert torch.equal(o, attend(*[t.bfloat16() for t in x]))
        assert regraph.torch.attention(NSA, **P, dtype="f32")(*x).dtype == torch.float32
    o.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in x)


def test_threads(attend):
    x, before = tensors(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend.plan(*x)
        torch.set_num_threads(2)
        assert attend.plan(*x) is not one and "2 threads" in attend.plan(*x).write()
    finally:
        torch.set_num_threads(before)


def test_module_with_parameters():
    names = ["wn", "wq", "wk", "wv", "wg", "wo"]
    layer = regraph.torch.Module(LAYER, parameters=names, **LAYER_P)
    assert list(layer.state_dict()) == names
    assert torch.equal(layer.wn, torch.ones(32)) and 0 < layer.wq.abs().max() <= 32**-0.5
    x, _ = layer_tensors()
    other = regraph.torch.Module(LAYER, parameters=names, **LAYER_P)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    losses = []
    for _ in range(3):
        losses.append(layer(x).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    with pytest.raises(RegraphError, match="'w' is no input; expected some of wn, wq"):
        regraph.torch.Module(LAYER, parameters=["w"], **LAYER_P)
    with pytest.raises(RegraphError, match="no fixed shape"):
        regraph.torch.Module(LAYER, parameters=["x"], **LAYER_P)


def run_ranks(count, script, *arguments, library=None):
    """A process for each rank, as torchrun starts them; rank 1 perhaps with another library."""
    import os
    import socket
    import subprocess

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANK": str(rank),
             "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
             **({"REGRAPH_LIBRARY": str(library)} if library and rank == 1 else {})})
        for rank in range(count)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * count
    finally:
        for rank in ranks:
            rank.kill()


def test_two_ranks():
    run_ranks(2, "two_ranks.py")


@pytest.mark.parametrize("ranks, what", [(2, ["equal"]), (4, ["equal", "ends"])])
def test_context_parallelism(ranks, what):
    run_ranks(ranks, "cp_ranks.py", *what)


def test_context_parallelism_and_another_library(tmp_path):
    from regraph._lib import lib
    version = lib.rg_version()
    other = tmp_path / "libregraph.so"
    bytes_of_one = Path(lib._name).read_bytes()
    assert bytes_of_one.count(version + b"\0") == 1
    other.write_bytes(bytes_of_one.replace(version + b"\0", version[:-1] + b"9\0"))
    run_ranks(2, "cp_ranks.py", "library", library=other)


def test_pack():
    g = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 50, 16, generator=g)  # as Hugging Face has it
    mask = torch.arange(50) < torch.tensor([[50], [7], [31]])
    packed, cu = regraph.torch.pack(q, mask=mask, heads_first=True)
    assert packed.shape == (88, 4, 16) and cu.tolist() == [0, 50, 57, 88]
    back = regraph.torch.unpack(packed, mask, heads_first=True)
    assert torch.equal(back, q * mask[:, None, :, None])
    for wrong in ({"mask": mask[:, :-1]}, {"mask": mask[:-1]}, {"mask": mask[:, None]}):
        with pytest.raises(RegraphError, match=r"RG_E_SHAPE: pack: a mask of shape \("):
            regraph.torch.pack(q, **wrong, heads_first=True)
    with pytest.raises(RegraphError, match=r"pack: a tensor of shape \("):
        regraph.torch.pack(q, q[:, :, 1:], heads_first=True)
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)  # read as it is: its reverse
    with pytest.raises(RegraphError, match="RG_E_DTYPE: pack: a mask of float32; expected bool"):
        regraph.torch.pack(q, mask=added, heads_first=True)
    with pytest.raises(RegraphError, match="RG_E_DTYPE: unpack: a mask of float32"):
        regraph.torch.unpack(packed, added, heads_first=True)
    ones, _ = regraph.torch.pack(q, mask=mask.long(), heads_first=True)
    assert torch.equal(ones, packed)
    packed, cu = regraph.torch.pack(q, heads_first=True)
    assert cu.tolist() == [0, 50, 100, 150] and cu.dtype == torch.int32
    assert torch.equal(regraph.torch.unpack(packed, 3, heads_first=True), q)


def test_gradcheck():
    attend = regraph.torch.attention(regraph.example("sliding_window.json"), dtype="f32", H=2, KH=1,
                                     D=8, DV=8)
    g = torch.Generator().manual_seed(2)
    q, k, v, sinks = (torch.randn(*shape, generator=g).requires_grad_()
                      for shape in ((12, 2, 8), (12, 1, 8), (12, 1, 8), (2,)))
    cu = starts(0, 5, 12)
    attend_named = lambda q, k, v, sinks: attend(q=q, k=k, v=v, sinks=sinks, cu_seqlens=cu)
    x = q, k, v, sinks
    assert torch.autograd.gradcheck(attend_named, x, eps=1e-2, atol=2e-3, rtol=1e-2)


def test_shares_plans(attend):
    assert regraph.torch.attention(dict(NSA), **P).key == attend.key
    assert regraph.torch.attention(NSA, **{**P, "top_n": 5}).key != attend.key
    assert regraph.torch.attention(NSA, **P).plan(*tensors()) is attend.plan(*tensors())


def test_help():
    """Everything that users see says what it is."""
    import inspect

    for module in regraph, regraph.torch:
        for name, value in vars(module).items():
            if name.startswith("_") or not getattr(value, "__module__", "").startswith("regraph"):
                continue
            methods = vars(value).items() if inspect.isclass(value) else ()
            functions = [(f"{name}.{m}", f) for m, f in methods if inspect.isfunction(f)]
            for member, about in [(name, value), *functions]:
                assert "._" in member or inspect.getdoc(about), member
    plan = regraph.Plan(regraph.Spec(NSA, **P), "all", T=64, B=1)
    for thing, part in ((plan, "Plan(cpu: q [64, 4, 16], k [64, 2, 16]"),
                        (plan.sizes, "Sizes(saved="), (regraph.Session(plan), "Session(Plan(cpu"),
                        (regraph.Policy("6GiB"), "Policy('6GiB')"),
                        (regraph.default_context(), " ops)"),
                        (regraph.Spec(NSA), "q, k, v, gate, cu_seqlens)"),
                        (regraph.torch.Module(NSA, **P), "Module(<dict>-")):
        assert part in repr(thing)


def test_no_tokens(attend):
    """Empty results, and gradients of weights that are zero."""
    for made in attend, torch.compile(attend, fullgraph=True, backend="aot_eager"):
        for cu in starts(0), starts(0, 0), torch.tensor([0, 0]):
            x = tensors(0)
            o = made(*x, cu)
            assert o.shape == (0, 4, 16)
            o.sum().backward()
            assert [t.grad.shape for t in x] == [t.shape for t in x]
    x, w = layer_tensors()
    regraph.torch.attention(LAYER, **LAYER_P)(x[:0], *w).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in w)


@pytest.mark.parametrize("tokens", [150, 160], ids=["padded", "full"])
def test_lengths_past_the_tokens(attend, tokens):
    """A plan may have room for more rows than there are; lengths may not use it."""
    x = tensors(tokens)
    assert attend.plan(*x).of_role(0)[0].shape[0] == 160
    for made in attend, torch.compile(attend, fullgraph=True, backend="aot_eager"):
        for wrong in starts(0, 20, tokens + 3), torch.tensor([0, 20, tokens + 3]):
            with pytest.raises(RegraphError, match=rf"cu_seqlens\[2\] is {tokens + 3}; expected at "
                                                   f"most {tokens}, the rows there are"):
                made(*x, wrong)
        assert torch.equal(made(*x, starts(0, 20, tokens)),
                           attend(*x, torch.tensor([0, 20, tokens])))


def test_lengths_of_64_bits(attend):
    x = tensors()
    for wrong in (2**32 + 150, -2**32, 2**31):
        with pytest.raises(RegraphError, match=rf"cu_seqlens\[1\] is {wrong}; expected integers"):
            attend(*x, torch.tensor([0, wrong]))
    with pytest.raises(RegraphError, match="RG_E_DATA: cu_seqlens"):  # not there while it is traced
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        compiled(*x, torch.tensor([0, 2**32 + 150]))


def test_what_a_gpu_says_of_lengths():
    """Nobody waits for a GPU: what is past the tensors' rows is marked, and told as it was."""
    from regraph import programs

    marked = programs.marked(starts(0, 100, 155, 2**31 - 1), 150)
    assert marked.dtype == torch.int32
    assert marked.tolist() == [0, 100, 155 - 2**31, 2**30 - 2**31]
    rule = "expected starts from 0 that never fall and end at most at 160: the run used them so"
    for value, told in ((155 - 2**31, "cu[2] was 155 in an earlier run, past the rows of its"),
                        (2**30 - 2**31, "cu[2] was 1073741824 or more in an earlier run, past"),
                        (2**31 - 1, f"cu[2] was 2147483647 or more in an earlier run; {rule}"),
                        (-7, f"cu[2] was -7 in an earlier run; {rule}")):
        said = f"cu[2] was {value} in an earlier run; {rule}"
        assert programs._said(RegraphError("RG_E_DATA", said)).message.startswith(told)


def test_copies(attend):
    import copy
    import pickle

    x, module = tensors(), regraph.torch.Module(NSA, **P)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*x), attend(*x)) and other.attention.key == module.attention.key


def test_failures(attend):
    q, k, v, gate = tensors()
    for part, args, named in [("'gate' is missing", (q, k, v), {}),
                              ("'q' is given twice", (q,), {"q": q}),
                              ("'z' is no input", (q,), {"z": q}), ("6 tensors", (q,) * 6, {}),
                              ("torch.float16", (q.half(), k, v, gate), {}),
                              ("/inputs/k", (q, k[:, :1], v, gate), {}),
                              ("cu_seqlens", (q, k, v, gate, starts(0, 90, 40)), {})]:
        with pytest.raises(RegraphError, match=part):
            attend(*args, **named)
    jagged = torch.nested.nested_tensor([torch.randn(3, 4, 16)], layout=torch.jagged)
    for part, other in (("sparse .torch.sparse_coo.; expected a dense", q.detach().to_sparse()),
                        ("nested; expected a packed tensor: .values", jagged),
                        ("on meta; expected cpu or cuda", q.to("meta"))):
        for lengths in (), (starts(0, 150),):
            with pytest.raises(RegraphError, match=f"'q' is {part}"):
                attend(other, k, v, gate, *lengths)
    with torch.autocast("cpu"), pytest.raises(RegraphError, match="'q' is on meta"):
        attend(*[t.to("meta") for t in (q, k, v, gate)])
    with pytest.raises(RegraphError, match=r"expected 3 \[T, H, D\]; regraph.torch.pack"):
        attend(q[None], k, v, gate)
    alone = lambda q: attend(q, k, v, gate).sum()
    for transformed in (lambda: torch.vmap(attend)(*[t[None] for t in (q, k, v, gate)]),
                        lambda: torch.func.grad(alone)(q),
                        lambda: torch.func.jvp(alone, (q,), (q,))):
        with pytest.raises(RegraphError, match="vmap and torch.func do not go through it; pack a"):
            transformed()
    with pytest.raises(RegraphError, match="does not ask for"):
        text = json.loads(json.dumps(NSA))
        text["inputs"]["gate"].pop("grad")
        regraph.torch.attention(text, **P)(q, k, v, gate)
    with pytest.raises(RegraphError, match="RG_E_SYNTAX"):
        regraph.torch.attention("{ nothing")
    with pytest.raises(RegraphError) as error:
        regraph.torch.attention({**NSA, "outputs": {"o": "oh"}})
    assert error.value.status == "RG_E_NAME" and error.value.pointer
