"""regraph.jax on a GPU. Skips without one."""

import sys
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import regraph  # noqa: E402
from regraph import RegraphError  # noqa: E402
from regraph import jax as adapter  # noqa: E402
from test_jax import plain, rel_rms, window  # noqa: E402, F401

try:
    regraph.device_check("cuda")
except RegraphError as error:
    pytest.skip(str(error), allow_module_level=True)
if jax.default_backend() != "gpu":
    pytest.skip("JAX sees no GPU", allow_module_level=True)

P = {"H": 8, "KH": 2, "D": 128, "DV": 128, "kernel": 32, "stride": 16, "block": 64, "top_n": 4,
     "window": 100}
T, STARTS = 640, np.array([0, 31, 31, 288, 600], np.int32)
NSA = regraph.example("nsa.json")
NAMES = "q", "k", "v", "gate"


def inputs(dtype=jnp.float32, seed=0, tokens=T, p=P):
    draw = np.random.default_rng(seed)
    shapes = (p["H"], p["D"]), (p["KH"], p["D"]), (p["KH"], p["DV"]), (p["H"], 3)
    return [jnp.asarray(draw.standard_normal((tokens, *shape)), dtype) for shape in shapes]


@pytest.mark.parametrize("policy", [None, "all"])
@pytest.mark.parametrize("dtype, name", [(jnp.float32, "f32"), (jnp.bfloat16, "bf16")])
@pytest.mark.parametrize("eager", [False, True])
def test_like_sessions(policy, dtype, name, eager):
    """The bits of a session of its own memory and stream, in and out of jit, time after time."""
    attend, x = adapter.attention(NSA, policy, eager=eager, **P), inputs(dtype)
    session = regraph.Session(regraph.Plan(regraph.Spec(NSA, dtype=name, **P), T=T, B=4,
                                           device="cuda"))
    expected = session.forward(**dict(zip(NAMES, map(np.asarray, x))), cu_seqlens=STARTS)["o"]
    d_o = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape), dtype)
    want = session.backward({"o": np.asarray(d_o)})

    def both(d_o, *x):
        o, back = jax.vjp(lambda *x: attend(*x, STARTS), *x)
        return o, *back(d_o)

    for run in (both, jax.jit(both), both):
        o, *grads = run(d_o, *x)
        assert o.devices() == {jax.devices()[0]}
        assert np.array_equal(np.asarray(o), expected)
        for key, grad in zip(NAMES, grads):
            assert grad.dtype == dtype and np.array_equal(np.asarray(grad), want[key]), key
        del o, grads
        x = [t + 0 for t in x]  # stand elsewhere


def test_like_plain_jax(window):  # noqa: F811
    """A window with sinks, value and all gradients."""
    draw = np.random.default_rng(0)
    x = [jnp.asarray(draw.standard_normal(shape), jnp.float32)
         for shape in ((150, 4, 16), (150, 2, 16), (150, 2, 16), (4,))]
    starts = np.array([0, 70, 70, 85, 150], np.int32)

    def loss(attend):
        return jax.jit(jax.value_and_grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2, 3)))

    with jax.default_matmul_precision("highest"):
        value, grads = loss(lambda *x: window(*x, starts))(*x)
        expected, want = loss(lambda *x: plain(*x, starts, 20))(*x)
    assert rel_rms(value, expected) < 1e-5
    assert all(rel_rms(a, b) < 2e-5 for a, b in zip(grads, want))


def test_transformations():
    """Layers by scan, computed again or not; vmap; a program that outlives its function; several
    calls under way."""
    attend = adapter.attention(NSA, policy="all", **P)
    x = inputs()

    def layers(run, again, q, *rest):
        def layer(q, _):
            return q + run(q, *rest, STARTS), None
        return (jax.lax.scan(jax.checkpoint(layer) if again else layer, q, length=3)[0] ** 2).sum()

    def straight(q, *rest):
        for _ in range(3):
            q = q + attend(q, *rest, STARTS)
        return (q ** 2).sum()

    want = jax.grad(straight, argnums=(0, 1))(*x)
    for again in (False, True):
        step = jax.jit(jax.grad(lambda *x, again=again, run=attend: layers(run, again, *x), (0, 1)))
        program = step.lower(*x).compile()
        for run in (step, program, program):
            assert all(rel_rms(a, b) < 1e-5 for a, b in zip(run(*x), want))
    y = inputs(seed=1)
    (_, back_x), (_, back_y) = (jax.vjp(lambda *x: attend(*x, STARTS), *t) for t in (x, y))
    ones = jnp.ones((T, P["H"], P["DV"]))
    one_by_one = [back(ones)[0] for back in (back_y, back_x)][::-1]
    many = jax.vmap(jax.grad(lambda *x: attend(*x, STARTS).sum()))(
        *[jnp.stack(pair) for pair in zip(x, y)])
    assert all(np.array_equal(a, b) for a, b in zip(many, one_by_one))
    del attend
    assert all(rel_rms(a, b) < 1e-5 for a, b in zip(program(*x), want))


def test_training():
    """Fifty steps by jit, whose arguments' memory is given back, with weights of compression: the
    losses of the host's kernels."""
    *x, target = *inputs(), inputs(seed=2)[0]
    draw = np.random.default_rng(3)
    weights = [jnp.asarray(0.02 * draw.standard_normal((128, 32 * 128)), jnp.float32)
               for _ in range(2)]
    starts, losses = np.array([0, 300, T], np.int32), {}
    for device in ("cuda", "cpu"):
        attend = adapter.attention(regraph.example("nsa_linear.json"), device=device,
                                   **{k: v for k, v in P.items() if k != "top_n"}, top_n=64)

        def step(gate, weights):
            def loss(gate, weights):
                return ((attend(*x[:3], gate, *weights, starts) - target) ** 2).mean()
            value, grads = jax.value_and_grad(loss, argnums=(0, 1))(gate, weights)
            return value, *jax.tree.map(lambda w, g: w - g, (gate, weights), grads)

        run, state = jax.jit(step, donate_argnums=(0, 1)), (x[3] + 0, [w + 0 for w in weights])
        losses[device] = []
        for _ in range(50 if device == "cuda" else 5):
            value, *state = run(*state)
            losses[device].append(float(value))
    assert losses["cuda"][-1] < 0.99 * losses["cuda"][0], losses
    assert np.allclose(losses["cuda"][:5], losses["cpu"], rtol=1e-4), losses


def test_mistakes(window):  # noqa: F811
    x = [jnp.zeros((150, 4, 16)), *2 * [jnp.zeros((150, 2, 16))], jnp.zeros(4)]
    with pytest.raises(Exception, match="the plan is for a GPU and the arrays are on the host"):
        attend = adapter.attention(window.spec, device="cuda")
        jax.block_until_ready(attend(*jax.device_put(x, jax.devices("cpu")[0]),
                                     jax.device_put(np.array([0, 150], np.int32),
                                                    jax.devices("cpu")[0])))
    attend = adapter.attention(window.spec)
    jax.block_until_ready(attend(*x, np.array([0, 200], np.int32)))
    with pytest.raises(Exception, match=r"RG_E_DATA: cu_seqlens\[1\] was 200 in an earlier run"):
        jax.block_until_ready(attend(*x, np.array([0, 150], np.int32)))
    assert np.isfinite(attend(*x, np.array([0, 150], np.int32))).all()
