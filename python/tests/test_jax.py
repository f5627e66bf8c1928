"""regraph.jax on the CPU, against attention in plain jax.numpy and against numpy sessions: as it
runs there, and by the calls that a GPU gets (xla.c)."""

import sys
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import regraph  # noqa: E402
from regraph import RegraphError  # noqa: E402
from regraph import jax as adapter  # noqa: E402

P = {"H": 4, "KH": 2, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16, "top_n": 4,
     "window": 20}
STARTS = np.array([0, 70, 70, 85, 150], np.int32)


@pytest.fixture(autouse=True, params=["python", "xla.c"])
def way(request, monkeypatch):
    if request.param == "xla.c":
        monkeypatch.setitem(adapter._RUN_BY, "cpu", adapter._Target)
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def inputs(dtype=np.float32, seed=0):
    draw = np.random.default_rng(seed)
    shapes = (150, 4, 16), (150, 2, 16), (150, 2, 16), (150, 4, 3)
    return [jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes]


def rel_rms(x, expected):
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


def plain(q, k, v, sinks, starts, window):
    """Attention over a window, with sinks, sequences told apart by a mask."""
    i = jnp.arange(q.shape[0])
    entry = jnp.searchsorted(starts, i, side="right")
    seen = (i[:, None] >= i) & (i[:, None] - i <= window) & (entry[:, None] == entry)
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = jnp.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    scores = jnp.where(seen, scores, -jnp.inf)
    scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None],
                                                       (*scores.shape[:2], 1))], 2)
    return jnp.einsum("hij,jhd->ihd", jax.nn.softmax(scores, -1)[..., :-1], v)


@pytest.fixture
def window():
    g = regraph.Graph("window", H=4, KH=2, D=16, window=20)
    q, k, v = (g.input(name, ["T", heads, "D"], "f32", grad=True)
               for name, heads in (("q", "H"), ("k", "KH"), ("v", "KH")))
    sinks = g.input("sinks", ["H"], "f32", grad=True)
    g.input("cu_seqlens", ["B+1"], "i32")
    g.output("o", g.swa_attn(q, k, v, sinks=sinks, window_left="$window")[0])
    return adapter.attention(g.document)


def test_like_plain_jax(window):
    """Value and all gradients, in and out of jit."""
    x = [*inputs()[:3], jnp.array([0.5, -1, 2, 0], jnp.float32)]

    def loss(attend):
        def run(*x):
            return (attend(*x) ** 2).sum()
        return jax.value_and_grad(run, argnums=(0, 1, 2, 3))

    ours = loss(lambda *x: window(*x, STARTS))
    expected, want = loss(lambda *x: plain(*x, STARTS, 20))(*x)
    for run in (ours, jax.jit(ours)):
        value, grads = run(*x)
        assert rel_rms(value, expected) < 2e-6
        assert all(rel_rms(a, b) < 1e-5 for a, b in zip(grads, want))


@pytest.mark.parametrize("policy", [None, "all"])
@pytest.mark.parametrize("dtype, name", [(np.float32, "f32"), (jnp.bfloat16, "bf16")])
def test_like_sessions(policy, dtype, name):
    """NSA: the bits of a numpy session, whatever is computed again, and in types that follow."""
    spec = regraph.example("nsa.json")
    attend, x = adapter.attention(spec, policy, **P), inputs(dtype)
    session = regraph.Session(regraph.Plan(regraph.Spec(spec, dtype=name, **P), T=150, B=4))
    named = dict(zip(("q", "k", "v", "gate"), map(np.asarray, x)))
    expected = session.forward(**named, cu_seqlens=STARTS)["o"]
    o, back = jax.vjp(lambda *x: attend(*x, cu_seqlens=STARTS), *x)
    assert o.dtype == dtype and np.array_equal(np.asarray(o), expected)
    d_o = jnp.asarray(np.random.default_rng(1).standard_normal(o.shape), dtype)
    want = session.backward({"o": np.asarray(d_o)})
    for key, grad in zip(named, back(d_o)):
        assert grad.dtype == dtype and np.array_equal(np.asarray(grad), want[key]), key


def test_calls():
    """Several under way at once, some gradients only, jax.checkpoint, vmap, several outputs."""
    attend = adapter.attention(regraph.example("nsa.json"), **P)
    x, y = inputs(), inputs(seed=1)
    (_, back_x), (_, back_y) = (jax.vjp(lambda *x: attend(*x, STARTS), *t) for t in (x, y))
    ones = jnp.ones((150, 4, 16))
    both = [back(ones) for back in (back_y, back_x)][::-1]
    assert not np.array_equal(both[0][0], both[1][0])

    def total(q, *rest):
        return attend(q, *rest, STARTS).sum()

    assert np.array_equal(jax.grad(total)(*x), both[0][0])
    assert np.array_equal(jax.jit(jax.grad(jax.checkpoint(total)))(*x), both[0][0])
    stacked = [jnp.stack(pair) for pair in zip(x, y)]
    many = jax.vmap(jax.grad(total))(*stacked)
    assert all(np.array_equal(a, b[0]) for a, b in zip(many, both))
    made = adapter.attention(regraph.example("dense_causal.json"), H=4, KH=2, D=16, DV=16)
    assert set(made(*x[:3], STARTS)) == {"o", "lse"}
    assert np.isfinite(jax.grad(lambda v: made(*x[:2], v, STARTS)["o"].sum())(x[2])).all()


def test_training():
    """A few steps by jit, with weights of compression."""
    attend = adapter.attention(regraph.example("nsa_linear.json"), **P)
    *x, target = *inputs(), inputs(seed=2)[0]
    weights = [0.05 * jnp.asarray(np.random.default_rng(i).standard_normal((16, 256)), np.float32)
               for i in range(2)]

    @jax.jit
    def step(gate, weights):
        def loss(gate, weights):
            return ((attend(*x[:3], gate, *weights, STARTS) - target) ** 2).mean()
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(gate, weights)
        return value, *jax.tree.map(lambda w, g: w - 20 * g, (gate, weights), grads)

    losses, gate = [], x[3]
    for _ in range(20):
        value, gate, weights = step(gate, weights)
        losses.append(float(value))
    assert losses[-1] < 0.99 * losses[0], losses


def test_mistakes(window):
    x = [*inputs()[:3], jnp.zeros(4)]
    with pytest.raises(RegraphError, match="the input 'cu_seqlens' is missing"):
        window(*x)
    with pytest.raises(RegraphError, match="'gate' is no input; expected q, k"):
        window(*x, gate=x[0])
    with pytest.raises(RegraphError, match="'q' is int32 .*; expected f32"):
        window(x[0].astype(np.int32), *x[1:], STARTS)
    with pytest.raises(RegraphError, match="'k' is bfloat16"):
        window(x[0], x[1].astype(jnp.bfloat16), *x[2:], STARTS)
    with pytest.raises(Exception, match="RG_E_DATA.*cu_seqlens"):
        jax.block_until_ready(window(*x, np.array([0, 200], np.int32)))
    document = {**window.spec, "inputs": {**window.spec["inputs"], "k": {
        "shape": ["T", "KH", "D"], "dtype": "f32"}}}
    with pytest.raises(RegraphError, match="a gradient of the input 'k' is wanted"):
        jax.grad(lambda k: adapter.attention(document)(x[0], k, *x[2:], STARTS).sum())(x[1])
    with pytest.raises(RegraphError, match="offloading is not for functions of JAX"):
        away = adapter.attention(regraph.example("nsa.json"), **P, policy={
            "regraph_policy": 1, "nodes": {"*_o": "offload"}})
        jax.grad(lambda *x: away(*x, STARTS).sum())(*inputs())
    with pytest.raises(RegraphError, match="there is no device 'gpu' here; expected"):
        adapter.attention(window.spec, device="gpu")
    with pytest.raises(Exception, match='device="cpu"|arrays are on the host'):
        jax.block_until_ready(adapter.attention(window.spec, device="cuda")(
            *jax.device_put(x, jax.devices("cpu")[0]), STARTS))


def test_compiling(monkeypatch, tmp_path):
    """The compiler is named where it fails, and called once where it does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cc, said in (("nowhere/cc", "nowhere/cc"), ("false", "false -O2")):
        monkeypatch.setenv("CC", cc)
        with pytest.raises(RegraphError, match=f"takes a C compiler.*{said}"):
            adapter._built()
    monkeypatch.delenv("CC")
    made = adapter._built()
    assert [*(tmp_path / "regraph").iterdir()] == [made]
    monkeypatch.setenv("CC", "false")
    assert adapter._built() == made
    monkeypatch.delenv("CC")
    monkeypatch.setenv("XDG_CACHE_HOME", str(made))  # no folder can be made there
    elsewhere = adapter._built()
    assert elsewhere.exists() and tmp_path not in elsewhere.parents


def test_loops():
    """Layers by scan, whose saved blocks stand in rows of one array; a program that outlives the
    function; a gradient that is added to what is there."""
    attend = adapter.attention(regraph.example("nsa.json"), policy="all", **P)
    x = inputs()

    def layers(run, q, *rest):
        def layer(q, _):
            return q + run(q, *rest, STARTS), None
        return (jax.lax.scan(layer, q, length=3)[0] ** 2).sum()

    def straight(q, *rest):
        for _ in range(3):
            q = q + attend(q, *rest, STARTS)
        return (q ** 2).sum()

    step = jax.jit(jax.grad(lambda *x, run=attend: layers(run, *x), argnums=(0, 1)))
    want = jax.grad(straight, argnums=(0, 1))(*x)
    assert all(rel_rms(a, b) < 1e-6 for a, b in zip(step(*x), want))
    program = step.lower(*x).compile()
    del attend, step, straight
    assert all(rel_rms(a, b) < 1e-6 for a, b in zip(program(*x), want))

    g = regraph.Graph("sums", T=6)
    w = g.input("w", [8, 4], "bf16", grad="accumulate")
    g.output("y", g.linear(g.input("x", ["T", 4], "bf16"), w))
    made = adapter.attention(g.document)
    a, b = jnp.ones((6, 4), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    for _ in range(2):
        grad = jax.jit(jax.grad(lambda b: made(x=a, w=b).sum()))(b)
        assert grad.dtype == jnp.bfloat16 and (np.asarray(grad, np.float32) == 6).all()
