"""Spec, Policy, Plan and Session: the C library's objects, with dicts of numpy arrays in and out.

    spec = regraph.Spec("examples/nsa.json", H=16, KH=2, dtype="f32")
    plan = regraph.Plan(spec, T=2048, B=1)
    session = regraph.Session(plan)
    o = session.forward(q=q, k=k, v=v, gate=gate, cu_seqlens=[0, 2048])["o"]
    dq = session.backward({"o": d_o})["q"]

Each object keeps what it was made from alive and gives its handle back when it is collected.
"""

import contextlib
import ctypes
import difflib
import functools
import json
import operator
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import numpy as np

from . import _lib, arrays
from .errors import RegraphError

Source = str | os.PathLike | dict  # a path, JSON text or the document itself
_ROLES = ("input", "output", "gradient of output", "gradient of input", "state")


def parse_size(text: str) -> int:
    """Bytes, as policies and the command read them: "64KB" is 64000, "64KiB" and "64K" are 65536,
    "1.5GiB"."""
    size = ctypes.c_int64()
    _lib.call("rg_parse_size", text.encode(), ctypes.byref(size))
    return size.value


def by_name(owner, inputs, args, named, noun):
    """{input: value} of a call's arguments, by position in the order of `inputs` or by name; some
    may be missing. `noun` says what they are."""
    if len(args) > len(inputs):
        raise RegraphError("RG_E_USAGE", f"{owner}: {len(args)} {noun}; expected "
                                         f"{', '.join(inputs)}")
    given = dict(zip(inputs, args))
    for name, value in named.items():
        if name not in inputs or name in given:
            wrong = "given twice" if name in given else "no input"
            raise RegraphError("RG_E_USAGE", f"{owner}: '{name}' is {wrong}; expected "
                                             f"{', '.join(inputs)}")
        given[name] = value
    return given


class _Local:
    """What is an address of this process."""

    def __reduce__(self):
        kind = type(self).__name__
        raise RegraphError("RG_E_USAGE", f"a {kind} is memory of this process, and can't be "
                           "pickled or doubled; make one where it is wanted, of the same spec and "
                           "policy")


class _Handle(_Local):
    """A handle of the library; `keep` stays alive at least as long."""

    def _own(self, handle, destroy, *keep):
        self.handle = handle
        self._finalizer = weakref.finalize(self, lambda *_: destroy(handle), *keep)


class _Constant(_Handle):
    """A handle of what never changes: its copy is itself."""

    def __copy__(self):
        return self

    def __deepcopy__(self, _):
        return self


def _expect(kind, value, whose):
    """The library can't tell one handle from another."""
    if not isinstance(value, kind):
        raise RegraphError("RG_E_USAGE", f"{whose} takes a {kind.__name__}; this is a "
                                         f"{type(value).__name__}")


class Context(_Constant):
    """Holds the table of ops. One per process is enough, unless plugins differ."""

    def __init__(self, plugins=()):
        self._own(_lib.create("rg_context_create", None), _lib.lib.rg_context_destroy)
        for path in plugins:
            _lib.call("rg_plugin_load", self.handle, os.fsencode(path))

    def __repr__(self):
        return f"Context({len(json.loads(self.describe('ops-json'))['ops'])} ops)"

    def describe(self, what: str = "ops") -> str:
        """ "ops", "ops-json", "schema-spec" or "schema-policy"."""
        return _lib.text("rg_describe", self.handle, what.encode())


_default, _default_lock = None, threading.Lock()


def default_context() -> Context:
    """The context that is used where none is named."""
    global _default
    with _default_lock:
        _default = _default or Context()
        return _default


def example(name: str) -> Path:
    """The path of a spec or policy that ships with regraph: "nsa.json", "policies/all.json"."""
    folders = [at / "examples" for at in (_lib.PACKAGE / "share" / "regraph",
                                          _lib.PACKAGE.parent.parent)]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise RegraphError("RG_E_IO", f"no example '{name}' ships with this package"
                       + _nearest_file(folder / name for folder in folders), file=str(name))


def _nearest_file(paths):
    """What to say of files that are not there: a name like one of theirs beside them."""
    for path in paths:
        names = []
        with contextlib.suppress(OSError):
            names = [p.name for p in path.parent.iterdir()]
        if path.name not in names and (near := difflib.get_close_matches(path.name, names, 1)):
            return f"; did you mean '{near[0]}'?"
    return ""


def read_source(source):
    """JSON text and a name for it, from a path, a dict or JSON text."""
    if isinstance(source, dict):
        return json.dumps(source), "<dict>"
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return source, "<text>"
    try:
        return Path(source).read_bytes().decode(errors="surrogateescape"), str(source)
    except OSError as error:
        hint = _nearest_file([Path(source)])
        with contextlib.suppress(RegraphError, OSError):
            hint = hint or f"; '{example(source)}' ships, as regraph.example('{source}')"
        message = f"can't be read: {error.strerror}{hint}"
        raise RegraphError("RG_E_IO", message, file=str(source),
                           text=f"{source}: RG_E_IO: {message}") from None


def _is_policy_word(text):
    if text in ("none", "all", "least"):
        return True
    try:
        parse_size(text)
    except RegraphError:
        return False
    return True


def read_policy(source):
    """Like read_source; a word ("all", "least", "6GiB") and a number of bytes are policies, too."""
    if isinstance(source, int) and not isinstance(source, bool):
        source = str(source)
    if isinstance(source, str) and _is_policy_word(source):
        return source, source
    text = isinstance(source, str) and source.lstrip().startswith("{")
    if isinstance(source, str) and not text and not Path(source).exists():
        # neither a word nor a file: the library says which of the two was meant
        _lib.create("rg_policy_load_file", default_context().handle, os.fsencode(source))
    return read_source(source)


@contextlib.contextmanager
def _places(*documents):
    """What is wrong with a Spec or Policy that came as a dict is placed by its pointer alone."""
    try:
        yield
    except RegraphError as error:
        if error.pointer and any(d and d.is_dict and d.name == error.file for d in documents):
            raise error.by_pointer() from None
        raise


@dataclass(frozen=True)
class Tensor:
    """A tensor that a session binds: what rg_tensor_info says. Extents of -1 are not known yet."""

    name: str
    role: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    accumulates: bool
    seqlens: bool
    sharded: bool = False  # shape[0] counts this rank's share of the rows
    partial: bool = False  # a gradient to which other ranks have terms, too


def _tensors(function, handle):
    return tuple(
        Tensor(t.name.decode(), t.role, _lib.DTYPES[t.dtype], tuple(t.dim[: t.rank]), t.bytes,
               t.accumulates, t.seqlens, t.sharded, t.partial)
        for t in _lib.tensor_infos(function, handle))


class Spec(_Constant):
    """A checked graph. `source` is a path, a dict or JSON text; `params` override its parameters or
    bind free dimensions."""

    def __init__(self, source: Source, context: Context | None = None, *, name: str | None = None,
                 **params):
        self.context = context or default_context()
        _expect(Context, self.context, "a spec")
        self.text, found = read_source(source)
        self.name, self.is_dict = name or found, isinstance(source, dict)
        data = self.text.encode(errors="surrogateescape")
        with _places(self):
            handle = _lib.load_spec(self.context.handle, data, len(data), os.fsencode(self.name),
                                    *_lib.bindings(params))
        self._own(handle, _lib.lib.rg_spec_destroy, self.context)
        self.tensors = _tensors("rg_spec_tensor", handle)

    def check(self, policy: "Policy | None" = None) -> None:
        """Raises what is wrong with the spec, and with the policy for it; all of it, once all
        dimensions are bound."""
        if policy is not None:
            _expect(Policy, policy, "check")
        with _places(self, policy):
            _lib.call("rg_check", self.handle, policy and policy.handle)

    def __repr__(self):
        names = ", ".join(t.name for t in self.tensors if t.role == _lib.INPUT)
        return f"Spec({self.name!r}: {names})"

    def solve(self, shapes: dict[str, Sequence[int]]) -> dict[str, int]:
        """The free dimensions that shapes of inputs give: {"q": (4096, 64, 128)} → {"T": 4096}."""
        solved, count = (_lib.Binding * 64)(), ctypes.c_size_t(0)
        for name, shape in shapes.items():
            dims = (ctypes.c_int64 * max(1, len(shape)))(*shape)
            _lib.call("rg_spec_solve", self.handle, name.encode(), len(shape), dims, solved,
                      len(solved), ctypes.byref(count))
        return {solved[i].name.decode(): solved[i].value for i in range(count.value)}

    def write(self, format: str = "text") -> str:
        """ "text", "dot", "summary", or "json": the document that loads to the same spec."""
        return _lib.text("rg_spec_write", self.handle, format.encode())


class Policy(_Constant):
    """What to recompute. `source` is a path, a dict, JSON text or a word: "none", "all", "least",
    "6GiB"."""

    def __init__(self, source: Source | int, context: Context | None = None):
        self.context = context or default_context()
        _expect(Context, self.context, "a policy")
        self.text, self.name = read_policy(source)
        self.is_dict = isinstance(source, dict)
        data = self.text.encode(errors="surrogateescape")
        with _places(self):
            handle = _lib.create("rg_policy_load_text", self.context.handle, data, len(data),
                                 os.fsencode(self.name))
        self._own(handle, _lib.lib.rg_policy_destroy, self.context)

    def __repr__(self):
        return f"Policy({self.name!r})"


class Plan(_Constant):
    """A spec, a policy (or what they are made from) and capacities made into an arena and a list of
    steps. Immutable; threads may share it. `cp`: how many ranks share the rows (0: what the policy
    says)."""

    def __init__(self, spec: Spec | Source, policy: Policy | Source | int | None = None, *,
                 device: str = "cpu", profile: str | os.PathLike | None = None, threads: int = 0,
                 no_grad: bool = False, no_reuse: bool = False, no_inplace: bool = False,
                 no_lanes: bool = False, no_fuse: bool = False, pack_seconds: float = 0.0,
                 cp: int = 0, plan_alone: bool = False, **dims: int):
        if isinstance(spec, (str, os.PathLike, dict)):
            spec = Spec(spec)
        _expect(Spec, spec, "a plan")
        if isinstance(policy, (str, int, os.PathLike, dict)):
            policy = Policy(policy, spec.context)
        if policy is not None:
            _expect(Policy, policy, "a plan")
        array, count = _lib.bindings(dims)
        options = _lib.PlanOptions(
            set=array, nset=count, device=device.encode(),
            profile_path=profile and os.fsencode(profile), threads=threads, no_grad=no_grad,
            no_reuse=no_reuse, no_inplace=no_inplace, no_lanes=no_lanes, no_fuse=no_fuse,
            plan_alone=plan_alone, pack_seconds=pack_seconds, cp=cp)
        with _places(spec, policy):
            handle = _lib.create("rg_plan_create", spec.handle, policy and policy.handle,
                                 ctypes.byref(options))
        self._own(handle, _lib.lib.rg_plan_destroy, spec.context)
        self.device = device
        self.tensors = _tensors("rg_plan_tensor", handle)
        self.sizes = _lib.Sizes()
        _lib.lib.rg_plan_sizes(handle, ctypes.byref(self.sizes))
        info = _lib.CpInfo()
        _lib.lib.rg_plan_cp(handle, ctypes.byref(info))
        self.ranks, self.mode = info.ranks, _lib.CP_MODES[info.mode]  # who share the rows, and how

    def __repr__(self):
        inputs = ", ".join(f"{t.name} {list(t.shape)}" for t in self.of_role(_lib.INPUT))
        return f"Plan({self.device}: {inputs}; {self.sizes!r})"

    def of_role(self, role: int) -> tuple[Tensor, ...]:
        """Its tensors of a role: 0 inputs, 1 outputs, 2 gradients of outputs, 3 of inputs,
        4 state."""
        return tuple(t for t in self.tensors if t.role == role)

    def write(self, format: str = "text") -> str:
        """ "text", "json", "dot", "timeline", "svg", "graph" or "steps"."""
        return _lib.text("rg_plan_write", self.handle, format.encode())

    def report(self, format: str = "html") -> str:
        """ "html", one page that needs nothing else, or "trace", events for Perfetto."""
        return _lib.text("rg_plan_report", self.handle, format.encode(), None)


class DeviceMemory(_Local):
    """Bytes on a plan's device, for those who have no GPU library of their own."""

    def __init__(self, plan, size):
        self.plan, self.size = plan, size
        self.address = _lib.create("rg_memory_alloc", plan.handle, size)
        weakref.finalize(self, lambda plan, at: _lib.lib.rg_memory_free(plan.handle, at), plan,
                         self.address)

    def _check(self, array):
        if not array.flags.c_contiguous or array.nbytes > self.size:
            raise RegraphError("RG_E_SHAPE", f"an array of {array.nbytes} bytes, strides "
                               f"{array.strides}; expected a dense one of at most {self.size}")

    def write(self, array: np.ndarray) -> None:
        """Copies a dense array there."""
        self._check(array)
        _lib.call("rg_memory_write", self.plan.handle, self.address, array.ctypes.data,
                  array.nbytes)

    def read(self, array: np.ndarray) -> None:
        """Copies what stands there into a dense array."""
        self._check(array)
        if not array.flags.writeable:
            raise RegraphError("RG_E_USAGE", "the array may not be written")
        _lib.call("rg_memory_read", self.plan.handle, array.ctypes.data, self.address, array.nbytes)


def _glance(array):
    """A few thousand of an array's floats, spread over all of it. (Lengths are saved by a forward,
    and may change.)"""
    if array.dtype == np.int32:
        return None
    return array.reshape(-1)[::array.size // 4096 | 1].tobytes()


def _alone(method):
    """A session's method, refused to a thread while another is in one."""

    @functools.wraps(method)
    def guarded(self, *args, **named):
        if not self._turn.acquire(blocking=False):
            raise RegraphError("RG_E_USAGE", f"{method.__name__}: the session is at work in "
                               "another thread; make one for each thread, of the same plan")
        try:
            return method(self, *args, **named)
        finally:
            self._turn.release()

    return guarded


class Session(_Handle):
    """A plan at work: one thread at a time. `forward` and `backward` take and return numpy arrays;
    the methods below them take addresses, for callers with memory of their own. `comm` is this
    rank's end, with a `handle`, where the plan has ranks."""

    def __init__(self, plan: Plan, *, saved: int | None = None, scratch: int | None = None,
                 host: int | None = None, stream: int | None = None, eager: bool = False,
                 debug_poison: bool = False, comm=None):
        _expect(Plan, plan, "a session")
        options = _lib.SessionOptions(saved=saved, scratch=scratch, host=host, stream=stream,
                                      eager=eager, debug_poison=debug_poison,
                                      comm=comm and comm.handle)
        handle = _lib.create("rg_session_create", plan.handle, ctypes.byref(options))
        self._own(handle, _lib.lib.rg_session_destroy, plan, comm)
        self.plan = plan
        self._turn = threading.RLock()
        self._run_on, self._error = _lib.lib.rg_session_run_on, _lib.Error()
        self._count = len(plan.tensors)
        self._bound: dict = {}  # (role, name) → (address, bytes)
        self._memory: dict = {}  # (role, name) → array (cpu) or DeviceMemory (cuda) bound now
        self._saved = saved  # the bound block; None: the session's own
        self._kept: dict = {}  # saved block → what its forward ran on, which its backward reads
        self._seen: dict = {}  # saved block → how that looked, where it is the caller's memory

    def __repr__(self):
        return f"Session({self.plan!r})"

    # ---- arrays ----

    def _bind_array(self, tensor, array):
        """Binds an array of the right type and shape, or device memory with its contents."""
        at = (tensor.role, tensor.name)
        if self.plan.device == "cpu":
            if array.ctypes.data % array.itemsize:
                array = array.copy()
            self._memory[at] = array
            return self.bind(tensor.role, tensor.name, array.ctypes.data, array.nbytes)
        awaited = any(saved != self._saved and memory.get(at) is self._memory.get(at)
                      for saved, memory in self._kept.items())
        if at not in self._memory or awaited:
            self._memory[at] = DeviceMemory(self.plan, tensor.nbytes)
            self.bind(tensor.role, tensor.name, self._memory[at].address, tensor.nbytes)
        if tensor.role in (_lib.INPUT, _lib.GRAD_IN, _lib.STATE) or tensor.accumulates:
            self._memory[at].write(array)

    def _keep(self):
        """A backward reads what its forward read and wrote, where that was. So it stays, also when
        another forward was refused, or ran on another saved block."""
        self._kept[self._saved] = {at: memory for at, memory in self._memory.items()
                                   if at[0] in (_lib.INPUT, _lib.OUTPUT)}
        if self.plan.device == "cpu" and self.plan.of_role(_lib.GRAD_IN):
            self._seen[self._saved] = {at: _glance(array) for at, array
                                       in self._kept[self._saved].items()}

    def _unchanged(self):
        """Refuses a backward on arrays that somebody has written to since its forward."""
        for (role, name), seen in self._seen.get(self._saved, {}).items():
            if _glance(self._kept[self._saved][role, name]) != seen:
                raise RegraphError("RG_E_DATA", f"the {_ROLES[role]} '{name}' was changed in place "
                                   "since the forward whose backward this is, which reads it; "
                                   "expected a copy to be changed, or another forward")

    def _given(self, role, values, missing):
        """Converts and binds what the caller gave for a role; `missing` makes what was left out."""
        tensors = self.plan.of_role(role)
        unknown = set(values) - {t.name for t in tensors}
        if unknown:
            raise RegraphError("RG_E_USAGE", f"the plan has no {_ROLES[role]} '{min(unknown)}'; it "
                                             f"has {', '.join(t.name for t in tensors) or 'none'}")
        given = []
        for tensor in tensors:
            array = values.get(tensor.name)
            array = missing(tensor) if array is None else arrays.convert(array, tensor.dtype)
            if array.shape != tensor.shape:
                raise RegraphError("RG_E_SHAPE", f"the {_ROLES[role]} '{tensor.name}' has shape "
                                                 f"{array.shape}; expected {tensor.shape}")
            given.append((tensor, array))
        for tensor, array in given:  # all or none: a backward may be due on what is bound
            self._bind_array(tensor, array)

    def _results(self, tensors):
        if self.plan.device == "cpu":
            return {t.name: self._memory[t.role, t.name] for t in tensors}
        self.synchronize()
        results = {t.name: np.empty(t.shape, arrays.NUMPY[t.dtype]) for t in tensors}
        for t in tensors:
            self._memory[t.role, t.name].read(results[t.name])
        return results

    @_alone
    def state(self, **values) -> dict[str, np.ndarray]:
        """{state: array} as the last forward left it; zeros before the first. Values that are given
        take its place: copies.
        On the CPU these arrays are the memory that the next forward writes to."""

        def left(tensor):
            at = (tensor.role, tensor.name)
            if at not in self._memory or self.plan.device == "cpu":
                return self._memory.get(at, np.zeros(tensor.shape, arrays.NUMPY[tensor.dtype]))
            return self._results([tensor])[tensor.name]

        self._given(_lib.STATE, {name: np.array(value) for name, value in values.items()}, left)
        return self._results(self.plan.of_role(_lib.STATE))

    @_alone
    def forward(self, **inputs) -> dict[str, np.ndarray]:
        """Runs forward on new output arrays: {output: array}."""

        def missing(tensor):
            raise RegraphError("RG_E_USAGE", f"the input '{tensor.name}' is missing; expected "
                                             f"shape {tensor.shape}")

        self._given(_lib.INPUT, inputs, missing)
        if any((t.role, t.name) not in self._bound for t in self.plan.of_role(_lib.STATE)):
            self.state()
        outputs = self.plan.of_role(_lib.OUTPUT)
        for tensor in outputs:
            self._bind_array(tensor, np.empty(tensor.shape, arrays.NUMPY[tensor.dtype]))
        self.run_forward()
        self._keep()
        return self._results(outputs)

    @_alone
    def backward(self, grad_outputs: dict, accumulate: dict | None = None) -> dict[str, np.ndarray]:
        """Runs the last forward's backward: {input: gradient}. Gradients left out are zero. An
        input whose spec says "accumulate" is added to accumulate[name] (float32) or to zeros, and
        that sum returned: in place, if the array is dense and may be written.
        It reads the forward's arrays, inputs and outputs: on the CPU those very ones, and where
        floats in them were changed since, it is refused (of large arrays, 4,096 are looked at)."""
        self._unchanged()
        self._given(_lib.GRAD_IN, grad_outputs, lambda t: np.zeros(t.shape, arrays.NUMPY[t.dtype]))
        gradients = self.plan.of_role(_lib.GRAD_OUT)
        accumulate = dict(accumulate or {})
        for tensor in gradients:
            given = accumulate.pop(tensor.name, None) if tensor.accumulates else None
            given = given if given is None else np.asarray(given)
            if given is not None and (given.dtype, given.shape) != (np.float32, tensor.shape):
                raise RegraphError(
                    "RG_E_SHAPE", f"the running gradient of '{tensor.name}' is {given.dtype} of "
                    f"shape {given.shape}; expected float32 of shape {tensor.shape}")
            make = np.zeros if tensor.accumulates else np.empty
            self._bind_array(tensor, make(tensor.shape, arrays.NUMPY[tensor.dtype]) if given is None
                             else np.require(given, requirements=["C", "W"]))
        if accumulate:
            raise RegraphError("RG_E_USAGE", "the spec does not accumulate the gradient of "
                                             f"'{min(accumulate)}'")
        self.run_backward()
        return self._results(gradients)

    def read(self, tensor: str, shape: Sequence[int], dtype: str = "f32") -> np.ndarray:
        """An intermediate tensor of the last forward that still lives, by its name in the plan."""
        array = np.empty(shape, arrays.NUMPY[dtype])
        _lib.call("rg_session_read", self.handle, tensor.encode(), array.ctypes.data, array.nbytes)
        return array

    def times(self) -> list[tuple[str, str, bool, float, float]]:
        """[(node, op, backward?, ms, roofline ms)] of the last run; a GPU's, of eager sessions."""
        steps: list = []
        time = _lib.NodeTime()
        while _lib.lib.rg_session_node_time(self.handle, len(steps), ctypes.byref(time)) == 0:
            steps.append((time.name.decode(), time.op.decode(), time.backward, time.ms,
                          time.roofline_ms))
        return steps

    # ---- addresses ----

    def bind(self, role: int, name: str, address: int, nbytes: int) -> None:
        """Where a tensor stands, until it is bound elsewhere."""
        if self._bound.get((role, name)) != (address, nbytes):
            _lib.call("rg_session_bind", self.handle, role, name.encode(), address, nbytes)
            self._bound[role, name] = address, nbytes

    def run_on(self, backward: bool, pointers: bytes, saved: int, scratch: int,
               stream: int | None = None) -> None:
        """One direction on memory of this run alone: `pointers` packs the addresses of all of the
        plan's tensors, in its order. Any session of the plan may have run the forward."""
        error = self._error
        if self._run_on(self.handle, backward, pointers, self._count, saved, scratch, stream,
                        ctypes.byref(error)):
            self._error = _lib.Error()
            _lib.fail(error)

    def bind_saved(self, address: int) -> None:
        """Another saved block, of sizes.saved bytes: one for each forward awaiting its backward."""
        _lib.call("rg_session_bind_saved", self.handle, address)
        self._saved = address

    def bind_host(self, address: int) -> None:
        """The block of the host's memory that goes with the saved block bound now, for what is
        offloaded."""
        _lib.call("rg_session_bind_host", self.handle, address)

    def adopt_saved(self, address: int) -> None:
        """A saved block that another session of the plan has filled, with what is bound now."""
        _lib.call("rg_session_adopt_saved", self.handle, address)
        self._saved = address
        self._keep()

    def forget_saved(self, address: int) -> None:
        """The session forgets a block it was given."""
        _lib.call("rg_session_forget_saved", self.handle, address)
        self._kept.pop(address, None)
        self._seen.pop(address, None)

    def bind_scratch(self, address: int) -> None:
        """Another scratch block, of sizes.scratch bytes."""
        _lib.call("rg_session_bind_scratch", self.handle, address)

    def set_stream(self, stream: int | None) -> None:
        """Later runs are enqueued on this cudaStream_t."""
        _lib.call("rg_session_set_stream", self.handle, stream)

    def run_forward(self) -> None:
        """A forward on what is bound."""
        _lib.call("rg_session_forward", self.handle)

    def run_backward(self) -> None:
        """The backward of the forward on the bound saved block."""
        _lib.call("rg_session_backward", self.handle)

    def synchronize(self) -> None:
        """Waits for the runs, and raises what went wrong in them."""
        _lib.call("rg_session_synchronize", self.handle)


def cp_rows(cu_seqlens: Sequence[int], capacity: int, ranks: int, rank: int,
            mode: str | int = "auto") -> tuple[slice, slice]:
    """The rows of a batch that a rank owns under context parallelism, in the order in which its
    tensors hold them: of `capacity`, a multiple of 2·ranks. For data loaders: needs no plan."""
    if str(mode) not in _lib.CP_MODES:
        raise RegraphError("RG_E_USAGE", f"there is no shard mode {mode!r}; expected one of "
                                         f"{', '.join(_lib.CP_MODES)}")
    starts, out = _starts(cu_seqlens), (_lib.Range * 2)()
    _lib.call("rg_cp_rows", starts, len(starts), capacity, ranks, _lib.CP_MODES.index(str(mode)),
              rank, out)
    return tuple(slice(rows.begin, rows.end) for rows in out)


def cp_document_rows(cu_seqlens: Sequence[int], ranks: int, rank: int) -> np.ndarray:
    """The rows of a batch that a rank has in the layout of TransformerEngine and Megatron, where
    every document, of a multiple of 2·ranks rows, is cut into 2·ranks chunks."""
    starts = _starts(cu_seqlens)
    rows = np.empty(starts[-1] // ranks if len(starts) and ranks > 0 else 0, np.int64)
    _lib.call("rg_cp_document_rows", starts, len(starts), ranks, rank,
              rows.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)), rows.size)
    return rows


def _starts(cu_seqlens):
    starts = [operator.index(start) for start in cu_seqlens]
    for i, start in enumerate(starts):  # ctypes would cut it to 32 bits
        if not -2**31 <= start < 2**31:
            raise RegraphError("RG_E_DATA", f"sequence start {i} is {start}; expected at most "
                               "2147483647")
    return (ctypes.c_int32 * len(starts))(*starts)


def device_check(device: str = "cuda") -> None:
    """Raises RegraphError where sessions for the device can't run on this machine."""
    _lib.call("rg_device_check", device.encode())
