"""libregraph.so through ctypes: structs and prototypes of include/regraph/regraph.h (and rg_comm of
op.h), and where to find the library.

`call` turns a failing status into RegraphError.
"""

import ctypes
import os
from ctypes import (CFUNCTYPE, POINTER, Structure, byref, c_bool, c_char, c_char_p, c_double, c_int,
                    c_int32, c_int64, c_size_t, c_uint32, c_void_p)
from pathlib import Path

from .errors import RegraphError

PACKAGE = Path(__file__).resolve().parent
VERSION = "0.1"  # of the header mirrored below

INPUT, OUTPUT, GRAD_IN, GRAD_OUT, STATE = range(5)
DTYPES = ("f32", "f16", "bf16", "i32")
CP_MODES = ("auto", "1", "2")
OP_ABI = 3  # of op.h, whose rg_comm is mirrored below
COMM_FAILED = 18  # RG_E_COMM


_RANGES = {kind: (-(2**(8 * ctypes.sizeof(kind) - 1)), 2**(8 * ctypes.sizeof(kind) - 1) - 1)
           for kind in (c_int, c_int32, c_int64)}
_RANGES.update({kind: (0, 2**(8 * ctypes.sizeof(kind)) - 1) for kind in (c_size_t, c_uint32)})


def _fit(kind, value, what):
    """ctypes cuts integers to what the type holds, without a word."""
    if kind in _RANGES and isinstance(value, int):
        low, high = _RANGES[kind]
        if not low <= value <= high:
            raise RegraphError("RG_E_VALUE", f"{what} is {value}; expected {low} to {high}")


class Error(Structure):
    _fields_ = [("status", c_int), ("line", c_int), ("column", c_int), ("file", c_char * 256),
                ("pointer", c_char * 256), ("node", c_char * 128), ("message", c_char * 640)]


class Binding(Structure):
    _fields_ = [("name", c_char_p), ("value", c_int64), ("text", c_char_p)]


class Text(Structure):
    _fields_ = [("data", c_void_p), ("size", c_size_t), ("ctx", c_void_p)]


class TensorInfo(Structure):
    _fields_ = [("name", c_char_p), ("role", c_int), ("dtype", c_int), ("rank", c_int),
                ("alignment", c_int), ("dim", c_int64 * 8), ("bytes", c_int64),
                ("accumulates", c_bool), ("seqlens", c_bool), ("offsets", c_bool),
                ("sharded", c_bool), ("partial", c_bool)]


class Options(Structure):
    """Opens with its size: members that the library has and this file lacks keep their defaults."""

    def __init__(self, **values):
        for name, kind in self._fields_:
            _fit(kind, values.get(name), name)
        super().__init__(size=ctypes.sizeof(self), **values)


class PlanOptions(Options):
    _fields_ = [("size", c_size_t), ("set", POINTER(Binding)), ("nset", c_size_t),
                ("device", c_char_p), ("profile_path", c_char_p),
                ("threads", c_int), ("no_grad", c_bool), ("no_reuse", c_bool),
                ("no_inplace", c_bool), ("no_lanes", c_bool), ("no_fuse", c_bool),
                ("plan_alone", c_bool), ("pack_seconds", c_double),
                ("progress", c_void_p), ("progress_user", c_void_p), ("cp", c_int64)]


class Sizes(Structure):
    _fields_ = [(name, c_int64) for name in
                ("saved", "scratch", "forward_scratch", "backward_scratch", "lower_bound",
                 "predicted_peak", "comm", "host")]

    def __repr__(self):
        return f"Sizes(saved={self.saved}, scratch={self.scratch}, bytes)"


class SessionOptions(Options):
    _fields_ = [("size", c_size_t), ("saved", c_void_p), ("scratch", c_void_p),
                ("arena", c_void_p), ("eager", c_bool), ("debug_poison", c_bool),
                ("stream", c_void_p), ("comm", c_void_p), ("host", c_void_p)]


class Range(Structure):
    _fields_ = [("begin", c_int64), ("end", c_int64)]


class CpInfo(Structure):
    _fields_ = [("ranks", c_int), ("mode", c_int), ("capacity", c_int64)]


class CommOptions(Options):
    _fields_ = [("size", c_size_t), ("rank", c_int), ("ranks", c_int), ("address", c_char_p),
                ("port", c_int), ("cuda", c_bool), ("deadline", c_double)]


class Halo(Structure):
    _fields_ = [(name, c_void_p) for name in
                ("to_previous", "to_next", "from_previous", "from_next")]


_MOVES = CFUNCTYPE(c_int, c_void_p, c_char_p, c_void_p, c_void_p, c_size_t, c_void_p,
                   POINTER(Error))
COMM_FUNCTIONS = (_MOVES, _MOVES,
                  CFUNCTYPE(c_int, c_void_p, c_char_p, POINTER(Halo), c_size_t, c_void_p,
                            POINTER(Error)),
                  CFUNCTYPE(c_int, c_void_p, c_char_p, POINTER(Error)),
                  CFUNCTYPE(None, c_void_p, POINTER(Error)),
                  CFUNCTYPE(None, c_void_p))


class Comm(Structure):
    """rg_comm of op.h."""

    _fields_ = [("abi", c_uint32), ("size", c_int), ("rank", c_int), ("user", c_void_p),
                *zip(("all_gather", "all_to_all", "halo", "barrier", "abort", "destroy"),
                     COMM_FUNCTIONS),
                ("captures", c_bool), ("check", c_void_p), ("sessions", c_int),
                ("leaving", c_bool)]


class NodeTime(Structure):
    _fields_ = [("name", c_char_p), ("op", c_char_p), ("backward", c_bool), ("ms", c_double),
                ("flops", c_double), ("bytes", c_double), ("model_ms", c_double),
                ("roofline_ms", c_double)]


class QueueOptions(Options):
    _fields_ = [("size", c_size_t), ("pages", c_int64), ("page", c_int64), ("rows", c_int64),
                ("slots", c_int64), ("most", c_int64), ("no_prefixes", c_bool), ("forks", c_int64)]


class QueueArrays(Structure):
    _fields_ = [(name, c_void_p) for name in
                ("tokens", "lengths", "context", "pages", "forks", "request", "wanted", "last")]
    _fields_ += [("rows", c_int64), ("used", c_int64)]


class PagesInfo(Structure):
    _fields_ = [(name, c_int64) for name in ("used", "kept", "free", "shared", "sequences")]


class QueueInfo(Structure):
    _fields_ = [("served", c_int64), ("waiting", c_int64), ("pages", PagesInfo)]
    _fields_ += [(name, c_int64) for name in
                 ("steps", "tokens", "rows", "found", "preempted", "copies", "finished",
                  "cancelled")]


_BINDINGS = [POINTER(Binding), c_size_t]
_PROTOTYPES = {  # name: arguments before the rg_error; every one returns a status
    "rg_parse_size": [c_char_p, POINTER(c_int64)],
    "rg_context_create": [c_void_p, POINTER(c_void_p)],
    "rg_plugin_load": [c_void_p, c_char_p],
    "rg_describe": [c_void_p, c_char_p, POINTER(Text)],
    "rg_spec_load_file": [c_void_p, c_char_p, *_BINDINGS, POINTER(c_void_p)],
    "rg_spec_load_text": [c_void_p, c_char_p, c_size_t, c_char_p, *_BINDINGS, POINTER(c_void_p)],
    "rg_policy_load_file": [c_void_p, c_char_p, POINTER(c_void_p)],
    "rg_policy_load_text": [c_void_p, c_char_p, c_size_t, c_char_p, POINTER(c_void_p)],
    "rg_check": [c_void_p, c_void_p],
    "rg_spec_write": [c_void_p, c_char_p, POINTER(Text)],
    "rg_spec_solve": [c_void_p, c_char_p, c_int, POINTER(c_int64), POINTER(Binding), c_size_t,
                      POINTER(c_size_t)],
    "rg_plan_create": [c_void_p, c_void_p, POINTER(PlanOptions), POINTER(c_void_p)],
    "rg_cp_rows": [POINTER(c_int32), c_size_t, c_int64, c_int, c_int, c_int, POINTER(Range)],
    "rg_cp_document_rows": [POINTER(c_int32), c_size_t, c_int, c_int, POINTER(c_int64), c_size_t],
    "rg_comm_processes": [c_void_p, POINTER(CommOptions), POINTER(c_void_p)],
    "rg_plan_write": [c_void_p, c_char_p, POINTER(Text)],
    "rg_plan_report": [c_void_p, c_char_p, c_void_p, POINTER(Text)],
    "rg_device_check": [c_char_p],
    "rg_session_create": [c_void_p, POINTER(SessionOptions), POINTER(c_void_p)],
    "rg_session_bind": [c_void_p, c_int, c_char_p, c_void_p, c_size_t],
    "rg_session_bind_saved": [c_void_p, c_void_p],
    "rg_session_adopt_saved": [c_void_p, c_void_p],
    "rg_session_forget_saved": [c_void_p, c_void_p],
    "rg_session_bind_host": [c_void_p, c_void_p],
    "rg_session_bind_scratch": [c_void_p, c_void_p],
    "rg_session_set_stream": [c_void_p, c_void_p],
    "rg_session_synchronize": [c_void_p],
    "rg_session_bind_index": [c_void_p, c_size_t, c_void_p, c_size_t],
    "rg_session_run": [c_void_p, c_int, POINTER(c_void_p), c_size_t, c_void_p, c_void_p],
    "rg_session_run_on": [c_void_p, c_int, c_char_p, c_size_t, c_void_p, c_void_p, c_void_p],
    "rg_session_forward": [c_void_p],
    "rg_session_backward": [c_void_p],
    "rg_session_read": [c_void_p, c_char_p, c_void_p, c_size_t],
    "rg_queue_create": [c_void_p, POINTER(QueueOptions), POINTER(c_void_p)],
    "rg_queue_add": [c_void_p, POINTER(c_int32), c_int64, c_int64, POINTER(c_int64)],
    "rg_queue_fork": [c_void_p, c_int64, c_int32, POINTER(c_int64)],
    "rg_queue_cancel": [c_void_p, c_int64],
    "rg_queue_step": [c_void_p, POINTER(QueueArrays)],
    "rg_queue_done": [c_void_p, c_void_p],
    "rg_memory_alloc": [c_void_p, c_size_t, POINTER(c_void_p)],
    "rg_memory_write": [c_void_p, c_void_p, c_void_p, c_size_t],
    "rg_memory_read": [c_void_p, c_void_p, c_void_p, c_size_t],
}
_OTHERS = {  # name: (result, arguments)
    "rg_spec_load_text_all": (c_int, [c_void_p, c_char_p, c_size_t, c_char_p, *_BINDINGS,
                                      POINTER(c_void_p), POINTER(Error), c_size_t,
                                      POINTER(c_size_t)]),
    "rg_version": (c_char_p, []),
    "rg_status_name": (c_char_p, [c_int]),
    "rg_error_format": (c_int, [POINTER(Error), c_char_p, c_size_t]),
    "rg_convert": (None, [c_int, c_void_p, c_int, c_void_p, c_size_t]),
    "rg_text_destroy": (None, [POINTER(Text)]),
    "rg_context_destroy": (None, [c_void_p]),
    "rg_spec_destroy": (None, [c_void_p]),
    "rg_policy_destroy": (None, [c_void_p]),
    "rg_plan_destroy": (None, [c_void_p]),
    "rg_session_destroy": (None, [c_void_p]),
    "rg_spec_tensor": (c_int, [c_void_p, c_size_t, POINTER(TensorInfo)]),
    "rg_plan_tensor": (c_int, [c_void_p, c_size_t, POINTER(TensorInfo)]),
    "rg_plan_sizes": (c_int, [c_void_p, POINTER(Sizes)]),
    "rg_plan_cp": (c_int, [c_void_p, POINTER(CpInfo)]),
    "rg_comm_destroy": (None, [c_void_p, POINTER(Error)]),
    "rg_session_node_time": (c_int, [c_void_p, c_size_t, POINTER(NodeTime)]),
    "rg_queue_destroy": (None, [c_void_p]),
    "rg_queue_count": (c_int, [c_void_p, POINTER(QueueInfo)]),
    "rg_memory_free": (None, [c_void_p, c_void_p]),
}


# ---- finding and opening the library ----


def _candidates():
    """Where the library may be: the first that exists; a bare name is the loader's business."""
    told = os.environ.get("REGRAPH_LIBRARY")
    if told:
        return [told]
    name = f"libregraph.so.{VERSION}"
    beside = PACKAGE.glob(f"lib*/{name}")  # in a wheel
    checkout = PACKAGE.parent.parent / "build" / name
    here = [str(path) for path in (*beside, checkout) if path.exists()]
    return [*here, name, "libregraph.so"]


def _load():
    tried = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            tried.append(f"{path}: {error}")
            continue
        for name, arguments in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = c_int, [*arguments, POINTER(Error)]
        for name, (result, arguments) in _OTHERS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        found = library.rg_version().decode()
        if not found.startswith(VERSION):
            raise RegraphError("RG_E_USAGE", f"{path} is regraph {found}; this package is for "
                                             f"{VERSION}", file=path)
        return library
    raise RegraphError(
        "RG_E_IO",
        "libregraph.so was not found. Install the package (`pip install .` in the checkout), or "
        "build the library (cmake -S . -B build && cmake --build build) and use it from the "
        "checkout, set REGRAPH_LIBRARY to its path, or install it where the system's loader looks "
        "(cmake --install build, ldconfig). Tried: " + "; ".join(tried))


lib = _load()


# ---- calls ----


def _text(chars):
    return chars.decode(errors="replace")


def _exception(error):
    line = ctypes.create_string_buffer(1536)
    lib.rg_error_format(byref(error), line, len(line))
    return RegraphError(_text(lib.rg_status_name(error.status)), _text(error.message),
                        file=_text(error.file), pointer=_text(error.pointer),
                        node=_text(error.node), line=error.line, column=error.column,
                        text=_text(line.value))


def call(name, *arguments):
    """Calls a function that takes an rg_error last; raises RegraphError where it fails."""
    error, function = Error(), getattr(lib, name)
    for kind, value in zip(function.argtypes, arguments):
        _fit(kind, value, f"{name}: an argument")
    if function(*arguments, byref(error)) != 0:
        fail(error)


def fail(error):
    """Raises what an rg_error says."""
    raise _exception(error)


def create(name, *arguments):
    """The same for a function whose last argument before the error is an out-pointer; returns the
    handle."""
    out = c_void_p()
    call(name, *arguments, byref(out))
    return out.value


def load_spec(*arguments):
    """rg_spec_load_text_all: the handle, or the first error with the others in it."""
    out, errors, count = c_void_p(), (Error * 20)(), c_size_t()
    if lib.rg_spec_load_text_all(*arguments, byref(out), errors, len(errors), byref(count)) == 0:
        return out.value
    first, *others = (_exception(error) for error in errors[:count.value])
    raise first.with_others(others)


def text(name, *arguments):
    """The same for a function that writes an rg_text; returns the string."""
    out = Text()
    call(name, *arguments, byref(out))
    try:
        return _text(ctypes.string_at(out.data, out.size))
    finally:
        lib.rg_text_destroy(byref(out))


def bindings(values):
    """{"T": 4096, "dtype": "f32"} as an array of rg_binding and its length."""
    array = (Binding * max(1, len(values)))()
    for at, (name, value) in enumerate(values.items()):
        if isinstance(value, bool) or not isinstance(value, int) or not -2**63 <= value < 2**63:
            value = str(value).lower() if isinstance(value, bool) else str(value)
            array[at] = Binding(name.encode(), 0, value.encode())
        else:
            array[at] = Binding(name.encode(), value, None)
    return array, len(values)


def tensor_infos(function, handle):
    """All rg_tensor_info that rg_spec_tensor or rg_plan_tensor reports."""
    infos = []
    while True:
        info = TensorInfo()
        if getattr(lib, function)(handle, len(infos), byref(info)) != 0:
            return infos
        infos.append(info)
