"""regraph for JAX: an attention graph as a differentiable function of arrays.

    import regraph.jax
    attend = regraph.jax.attention("nsa.json", policy="all", H=64, KH=4)
    o = attend(q, k, v, gate, cu_seqlens)      # under jax.jit, jax.grad, jax.vmap

A custom_vjp around two calls out of XLA's programs. On a GPU they are custom calls (jax.ffi): XLA
gives them its stream and their memory, and xla.c, compiled where it is first wanted, enqueues the
plan's steps there; nothing comes to the host, and nobody waits. On the CPU they are
jax.pure_callback: XLA hands the arrays to this process's Python, which runs the plan on them where
they stand.

A plan is made for each set of shapes, types and wanted gradients. What forward keeps for backward
is one more result of it, of bytes, so that any number of calls may be under way; jax.checkpoint
drops it and runs forward again.
"""

import ctypes
import functools
import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

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


def _shaped(shape, dtype=np.uint8):
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(tensors):
    return tuple(_shaped(t.shape, arrays.NUMPY[t.dtype]) for t in tensors)


class _Plan:
    """A plan for one set of shapes and types. What it is run by, follows."""

    def __init__(self, plan):
        self.plan = plan
        self.inputs, self.outputs, self.grads_in, self.grads_out = map(plan.of_role, range(4))
        self.block = _shaped((max(plan.sizes.saved, 1),))


# ---- on the CPU ----


class _Callback(_Plan):
    """It runs in Python, on idle sessions."""

    def __init__(self, plan, number, eager):
        super().__init__(plan)
        self._idle: list = []  # taking and giving back are atomic

    def forward(self, *inputs):
        """Outputs, then the saved block, where a function is traced."""
        return jax.pure_callback(self._forward, (*_like(self.outputs), self.block), *inputs,
                                 vmap_method="sequential")

    def backward(self, *given):
        """Gradients of inputs, of inputs, outputs, the saved block and gradients of outputs."""
        return jax.pure_callback(self._backward, _like(self.grads_out), *given,
                                 vmap_method="sequential")

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

    def _forward(self, *inputs):
        made = [np.empty(t.shape, arrays.NUMPY[t.dtype]) for t in self.outputs]
        saved = _block(self.plan.sizes.saved)
        self._run(False, [*map(np.ascontiguousarray, inputs), *made], saved)
        return *made, saved

    def _backward(self, *given):
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


# ---- on a GPU ----


class _About(ctypes.Structure):
    """regraph_xla_plan of xla.c."""

    _fields_ = [("number", ctypes.c_int64), ("plan", ctypes.c_void_p),
                ("create", ctypes.c_void_p), ("run", ctypes.c_void_p),
                ("format", ctypes.c_void_p), ("count", ctypes.c_int64 * 4),
                ("cuda", ctypes.c_bool), ("eager", ctypes.c_bool)]


def _compile(source, library, folders):
    """Makes a shared library of a C file, or says what is missing."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    command = [*shlex.split(compiler), "-O2", "-shared", "-fPIC", "-pthread",
               *[f"-I{folder}" for folder in folders], str(source)]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command += ["-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            said = done.stderr.strip()[:400] if done.returncode else None
        except OSError as error:
            said = str(error)
        if said is not None:
            raise RegraphError("RG_E_DEVICE", "JAX on a GPU takes a C compiler, once, and "
                               f"{compiler} (CC names another) failed: {said}. The command: "
                               f"{shlex.join(command)}. With device=\"cpu\" none is needed")
        os.replace(made, library)  # whoever else made it, made the same


def _built():
    """xla.c, compiled for this jaxlib and this regraph: in the user's cache, or where that has no
    room, for this process alone."""
    source = _lib.PACKAGE / "xla.c"
    folders = [jax.ffi.include_dir()]
    for folder in (_lib.PACKAGE, _lib.PACKAGE.parent.parent):  # a wheel's, a checkout's
        if (folder / "include" / "regraph" / "regraph.h").exists():
            folders.append(folder / "include")
            break
    parts = [source, *(Path(folder) / name for folder, name in
                       zip(folders, ("xla/ffi/api/c_api.h", "regraph/regraph.h")))]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regraph"
    library = cache / f"xla-{os.uname().machine}-{digest}.so"
    if not library.exists():
        try:
            _compile(source, library, folders)
        except OSError:
            library = Path(tempfile.mkdtemp()) / library.name
            _compile(source, library, folders)
    return library


@functools.cache
def _shim():
    """The library above, its handlers registered with XLA."""
    shim = ctypes.CDLL(str(_built()))
    shim.regraph_xla_add.restype = ctypes.c_bool
    for name in ("forward", "backward"):
        handler = jax.ffi.pycapsule(getattr(shim, f"regraph_xla_{name}"))
        for platform in ("cpu", "CUDA"):  # on the host it says what is wrong
            jax.ffi.register_ffi_target(f"regraph_{name}", handler, platform=platform)
    return shim


class _Target(_Plan):
    """XLA's programs call it by a number, without Python."""

    kept: dict = {}  # number → plan; programs that know the number may outlive everything else

    def __init__(self, plan, number, eager):
        super().__init__(plan)
        self.number = np.int64(number)
        self.scratch = _shaped((max(plan.sizes.scratch, 1),))
        self.kept.setdefault(number, plan)
        functions = [ctypes.cast(getattr(_lib.lib, name), ctypes.c_void_p).value
                     for name in ("rg_session_create", "rg_session_run_on", "rg_error_format")]
        count = map(len, (self.inputs, self.outputs, self.grads_in, self.grads_out))
        about = _About(number, self.kept[number].handle, *functions, (ctypes.c_int64 * 4)(*count),
                       plan.device == "cuda", eager)
        if not _shim().regraph_xla_add(ctypes.byref(about)):
            raise RegraphError("RG_E_NOMEM", "no memory for a plan")

    def forward(self, *inputs):
        """Outputs, then the saved block, where a function is traced."""
        results = *_like(self.outputs), self.block, self.scratch
        return jax.ffi.ffi_call("regraph_forward", results, vmap_method="sequential")(
            *inputs, plan=self.number)[:-1]

    def backward(self, *given):
        """Gradients of inputs, of inputs, outputs, the saved block and gradients of outputs."""
        results, aliases = _like(self.grads_out), {}
        for i, (t, like) in enumerate(zip(self.grads_out, results)):
            if t.accumulates:  # added to what is there
                aliases[len(given)] = i
                given = *given, jnp.zeros(like.shape, like.dtype)
        return jax.ffi.ffi_call("regraph_backward", (*results, self.scratch),
                                vmap_method="sequential", input_output_aliases=aliases)(
            *given, plan=self.number)[:-1]


_RUN_BY = {"cpu": _Callback, "cuda": _Target}


def _default_device():
    """Where JAX puts arrays by itself."""
    told = jax.config.jax_default_device
    platform = getattr(told, "platform", told) or jax.default_backend()
    return "cuda" if platform in ("gpu", "cuda") else "cpu"


# ---- what users call ----


class Attention:
    """A spec as a function of arrays: by position in the order of its inputs, or by name. Returns
    the output, or {name: output} where the spec has several."""

    def __init__(self, text, name, policy, threads, device, eager, params):
        self.name, self.params, self.threads, self.device = name, params, threads, device
        self.eager, self._made_of = eager, (text, policy)
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
        device = self.device or _default_device()
        kind = (device, wanted, *[(x.shape, np.dtype(x.dtype).name) for x in inputs])
        with self._lock:
            if kind not in self._plans:
                self._plans[kind] = self._make(kind, wanted, inputs)
            return self._plans[kind]

    def _make(self, kind, wanted, inputs):
        device = kind[0]
        if device != "cpu":
            try:
                core.device_check(device)
            except RegraphError as error:
                raise RegraphError(error.status, f"{self.name}: {error.message}. With "
                                                 "device=\"cpu\" it runs on the host") from None
        params = dict(self.params)
        spec = dict(self.spec, inputs={})
        for name, x in zip(self.inputs, inputs):
            entry = spec["inputs"][name] = dict(self.spec["inputs"][name])
            if name not in wanted:
                entry.pop("grad", None)
            dtype = str(entry["dtype"])
            if dtype.startswith("$") and jnp.issubdtype(x.dtype, jnp.floating) \
                    and np.dtype(x.dtype) in _NAMES:  # it follows the arrays
                params.setdefault(dtype[1:], _NAMES[np.dtype(x.dtype)])
        loaded = core.Spec(spec, name=self.name, **params)
        dims = loaded.solve({name: x.shape for name, x in zip(self.inputs, inputs)})
        plan = core.Plan(loaded, self.policy, device=device, threads=self.threads, **dims)
        for t, x in zip(plan.of_role(_lib.INPUT), inputs):
            if t.shape != x.shape or arrays.NUMPY[t.dtype] != x.dtype:
                raise RegraphError("RG_E_SHAPE", f"{self.name}: the input '{t.name}' is {x.dtype} "
                                   f"of shape {x.shape}; expected {t.dtype} {t.shape}")
        if plan.of_role(_lib.STATE) or plan.sizes.host:
            raise RegraphError("RG_E_USAGE", f"{self.name}: "
                               + ("state is" if plan.of_role(_lib.STATE) else "offloading is")
                               + " not for functions of JAX; see regraph.Session, regraph.torch")
        made_of = repr((_lib.lib.rg_version(), self._made_of, params, self.threads, self.eager,
                        kind))  # one number in every process, for JAX's cache of programs
        number = int.from_bytes(hashlib.sha256(made_of.encode()).digest()[:7], "big")
        return _RUN_BY[device](plan, number, self.eager)

    # ---- runs ----

    def _forward(self, wanted, inputs):
        """The outputs, and with them the saved block."""
        plan = self._plan(wanted, inputs)
        made = plan.forward(*inputs)
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
            results = plan.backward(*inputs, *outputs, saved, *dense)
            made = {t.name: result for t, result in zip(plan.grads_out, results)}
        return tuple(made[name].astype(x.dtype) if name in made else
                     jnp.zeros_like(x) if name in wanted.names else None
                     for name, x in zip(self.inputs, inputs))

    def __call__(self, *args, **named):
        given = core.by_name(self.name, self.inputs, args, named, "arrays")
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
              device: str | None = None, eager: bool = False, **params) -> Attention:
    """An Attention of a spec and a policy (paths, dicts, JSON text; "all", "6GiB"). `params`
    override the spec's; one that names inputs' type follows the arrays where it is not given.
    `device`: "cpu" or "cuda", where it runs; None: where JAX puts arrays by itself. `eager`: on a
    GPU its steps are launched one by one, not as a graph."""
    if device not in (None, *_RUN_BY):
        raise RegraphError("RG_E_USAGE", f"there is no device {device!r} here; expected \"cpu\" or "
                                         "\"cuda\"")
    text, name = core.read_source(spec)
    policy = core.read_policy(policy)[0] if policy is not None else None
    return Attention(text, name, policy, threads, device, eager, params)
