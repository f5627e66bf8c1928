"""regraph for JAX: an attention graph as a differentiable function of arrays, on the CPU.

    import regraph.jax
    attend = regraph.jax.attention("nsa.json", policy="all", H=64, KH=4)
    o = attend(q, k, v, gate, cu_seqlens)      # under jax.jit, jax.grad, jax.vmap

A custom_vjp around jax.pure_callback: XLA hands the arrays to this process's Python, which runs the
plan on them where they stand, on the CPU. (Arrays of an accelerator come to the host and go back.)
A plan is made for each set of shapes, types and wanted gradients. What forward keeps for backward
is one more result of it, of bytes, so that any number of calls may be under way; jax.checkpoint
drops it and runs forward again.
"""

import functools
import json
import struct
import threading

import jax
import jax.numpy as jnp
import numpy as np

from . import _lib, arrays, core
from .errors import RegraphError

ALIGNED = 64  # what saved and scratch blocks start on
_NAMES = {np.dtype(dtype): name for name, dtype in arrays.NUMPY.items()}


def _block(size):
    """An aligned block of at least one byte."""
    whole = np.empty(max(size, 1) + ALIGNED, np.uint8)
    begin = -whole.ctypes.data % ALIGNED
    return whole[begin: begin + max(size, 1)]


class _Plan:
    """A plan for one set of shapes and types, and its idle sessions."""

    def __init__(self, plan):
        self.plan = plan
        self.inputs, self.outputs, self.grads_in, self.grads_out = map(plan.of_role, range(4))
        self.block = max(plan.sizes.saved, 1)
        self._idle: list = []  # taking and giving back are atomic

    def _run(self, backward, tensors, saved):
        scratch = _block(self.plan.sizes.scratch)
        if not backward:
            tensors = [*tensors, *[None] * (len(self.grads_in) + len(self.grads_out))]
        at = [0 if tensor is None else tensor.ctypes.data for tensor in tensors]
        try:
            session = self._idle.pop()
        except IndexError:
            session = core.Session(self.plan, saved=saved.ctypes.data, scratch=scratch.ctypes.data)
        try:
            session.run_on(backward, struct.pack(f"={len(at)}Q", *at), saved.ctypes.data,
                           scratch.ctypes.data)
        finally:
            self._idle.append(session)

    def forward(self, *inputs):
        """Outputs, then the saved block."""
        made = [np.empty(t.shape, arrays.NUMPY[t.dtype]) for t in self.outputs]
        saved = _block(self.plan.sizes.saved)
        self._run(False, [*map(np.ascontiguousarray, inputs), *made], saved)
        return *made, saved

    def backward(self, *given):
        """Gradients of inputs, of inputs, outputs, the saved block and gradients of outputs."""
        given = [np.ascontiguousarray(array) for array in given]
        count = len(self.inputs) + len(self.outputs)
        tensors, saved = given[:count], given[count]
        if saved.ctypes.data % ALIGNED:
            moved, saved = saved, _block(len(saved))
            saved[:] = moved
        made = [(np.zeros if t.accumulates else np.empty)(t.shape, arrays.NUMPY[t.dtype])
                for t in self.grads_out]
        self._run(True, [*tensors, *given[count + 1:], *made], saved)
        return tuple(made)


def _like(tensors):
    return tuple(jax.ShapeDtypeStruct(t.shape, arrays.NUMPY[t.dtype]) for t in tensors)


class Attention:
    """A spec as a function of arrays: by position in the order of its inputs, or by name. Returns
    the output, or {name: output} where the spec has several."""

    def __init__(self, text, name, policy, threads, params):
        self.name, self.params, self.threads = name, params, threads
        self.policy = core.Policy(policy) if policy is not None else None
        spec = core.Spec(text, name=name, **params)
        spec.check(self.policy)
        self.spec = json.loads(text)
        self.inputs = tuple(t.name for t in spec.tensors if t.role == _lib.INPUT)
        self.outputs = tuple(t.name for t in spec.tensors if t.role == _lib.OUTPUT)
        self._plans, self._lock = {}, threading.Lock()
        run = jax.custom_vjp(lambda *inputs: self._forward((), inputs)[0])
        run.defvjp(self._keep, self._backward, symbolic_zeros=True)
        self._run = run

    def __repr__(self):
        return f"regraph.jax.attention({self.name})"

    # ---- plans ----

    def _plan(self, wanted, inputs):
        """The plan for inputs of these shapes and types, with gradients of those in `wanted`."""
        kind = (wanted, *[(x.shape, np.dtype(x.dtype)) for x in inputs])
        with self._lock:
            if kind not in self._plans:
                self._plans[kind] = self._make(wanted, inputs)
            return self._plans[kind]

    def _make(self, wanted, inputs):
        params = dict(self.params)
        spec = dict(self.spec, inputs={})
        for name, x in zip(self.inputs, inputs):
            entry = spec["inputs"][name] = dict(self.spec["inputs"][name])
            if name not in wanted:
                entry.pop("grad", None)
            dtype = str(entry["dtype"])
            if dtype.startswith("$") and np.dtype(x.dtype) in _NAMES:  # it follows the arrays
                params.setdefault(dtype[1:], _NAMES[np.dtype(x.dtype)])
        loaded = core.Spec(spec, name=self.name, **params)
        dims = loaded.solve({name: x.shape for name, x in zip(self.inputs, inputs)})
        plan = _Plan(core.Plan(loaded, self.policy, threads=self.threads, **dims))
        for t, x in zip(plan.inputs, inputs):
            if t.shape != x.shape or arrays.NUMPY[t.dtype] != x.dtype:
                raise RegraphError("RG_E_SHAPE", f"{self.name}: the input '{t.name}' is {x.dtype} "
                                   f"of shape {x.shape}; expected {t.dtype} {t.shape}")
        return plan

    # ---- runs ----

    def _forward(self, wanted, inputs):
        """The outputs, and with them the saved block."""
        plan = self._plan(wanted, inputs)
        made = jax.pure_callback(plan.forward, (*_like(plan.outputs),
                                                jax.ShapeDtypeStruct((plan.block,), np.uint8)),
                                 *inputs, vmap_method="sequential")
        return tuple(made[:-1]), made[-1]

    def _keep(self, *given):
        inputs = tuple(x.value for x in given)
        wanted = tuple(name for name, x in zip(self.inputs, given)
                       if x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating))
        for name in wanted:
            if not self.spec["inputs"][name].get("grad"):
                raise RegraphError("RG_E_USAGE", f"{self.name}: a gradient of the input '{name}' "
                                   "is wanted, which the spec does not ask for; say \"grad\": true "
                                   "there, or take jax.lax.stop_gradient of it")
        outputs, saved = self._forward(wanted, inputs)
        return outputs, (_Names(wanted), inputs, outputs, saved)

    def _backward(self, kept, grads):
        wanted, inputs, outputs, saved = kept
        plan = self._plan(wanted.names, inputs)
        made, arriving = {}, dict(zip(self.outputs, zip(grads, outputs)))
        if plan.grads_out:
            dense = [jnp.zeros_like(like) if isinstance(grad, jax.custom_derivatives.SymbolicZero)
                     else grad for grad, like in (arriving[t.name] for t in plan.grads_in)]
            results = jax.pure_callback(plan.backward, _like(plan.grads_out), *inputs, *outputs,
                                        saved, *dense, vmap_method="sequential")
            made = {t.name: result for t, result in zip(plan.grads_out, results)}
        return tuple(made[name].astype(x.dtype) if name in made else
                     jnp.zeros_like(x) if name in wanted.names else None
                     for name, x in zip(self.inputs, inputs))

    def __call__(self, *args, **named):
        if len(args) > len(self.inputs):
            raise RegraphError("RG_E_USAGE", f"{self.name}: {len(args)} arrays; expected "
                                             f"{', '.join(self.inputs)}")
        given = dict(zip(self.inputs, args))
        for name, x in named.items():
            if name not in self.inputs or name in given:
                what = "given twice" if name in given else "no input"
                raise RegraphError("RG_E_USAGE", f"{self.name}: '{name}' is {what}; expected "
                                                 f"{', '.join(self.inputs)}")
            given[name] = x
        for name in self.inputs:
            if name not in given:
                raise RegraphError("RG_E_USAGE", f"{self.name}: the input '{name}' is missing")
        inputs = [jnp.asarray(given[name]) for name in self.inputs]
        outputs = self._run(*[x.astype(np.int32) if jnp.issubdtype(x.dtype, jnp.integer) else x
                              for x in inputs])
        return outputs[0] if len(outputs) == 1 else dict(zip(self.outputs, outputs))


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["names"])
class _Names:
    """Names, among what forward hands to backward."""

    def __init__(self, names):
        self.names = names


def attention(spec: core.Source, policy: core.Source | int | None = None, *, threads: int = 0,
              **params) -> Attention:
    """An Attention of a spec and a policy (paths, dicts, JSON text; "all", "6GiB"). `params`
    override the spec's; one that names inputs' type follows the arrays where it is not given."""
    text, name = core.read_source(spec)
    policy = core.read_policy(policy)[0] if policy is not None else None
    return Attention(text, name, policy, threads, params)
