"""Programs: what regraph.torch runs. Plans by shapes, their sessions, and calls prepared for them.

A Program (spec, policy, parameters) makes a Variant for each set of capacities, types and wanted
gradients: its plan and idle sessions. A Call knows all that follows from the shapes and types of a
call's tensors. It is found once; its forward and backward are the way of every later call with such
tensors, and do nothing that could have been done before.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import operator
import re
import struct
import threading
import weakref

import torch

from . import _lib, core
from .errors import RegraphError

try:  # what torch.compile asks of tensors before it goes on as before, in one call
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None
VARIANTS = 256  # plans a program keeps, least recently used go first
CALLS = 16 * VARIANTS
BLOCK = 64, 256  # what blocks start on: a CPU's, a GPU's. torch's allocators give 64 and 512
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
NO_MEMORY = {"meta": ", or torch's FakeTensorMode for shapes alone"}
INT32 = torch.iinfo(torch.int32)
MARKED = 2**30  # what is larger is marked as this
_programs: dict = {}  # what they are made of → Program
_clock = itertools.count(1)


def program_of(made_of):
    """The program that an operator names: by everything it is made of, so that an exported graph
    finds it in another process, too."""
    if made_of not in _programs:
        _programs[made_of] = Program(**json.loads(made_of))
    return _programs[made_of]


# ---- memory ----


def _block(size, device):
    """A block of at least one byte."""
    return torch.empty((size or 1,), dtype=torch.uint8, device=device)


def room(count, step=3):
    """The capacity that `count` is given: at most an eighth more (step 3), or the next power of two
    (step 0), so that few plans serve all lengths."""
    unit = 1 << max((count - 1).bit_length() - 1 - step + (step == 0), 0) if count > 1 else 1
    return max(-(-count // unit) * unit, 1)


def _fit(tensor, info, align):
    """The tensor, dense, aligned and with as many rows as the plan has: zeros, or where it holds
    starts of sequences, empty sequences."""
    if tensor.shape == info.shape:
        tensor = tensor.resolve_neg().contiguous()
        return tensor if tensor.data_ptr() % align == 0 else tensor.clone()
    wide = tensor.new_empty(info.shape)
    wide[: tensor.shape[0]] = tensor
    wide[tensor.shape[0]:] = tensor[-1:] if info.seqlens else 0
    return wide


def _addresses(tensors, infos, align, copies):
    """Where the tensors stand. Those that the library can't take as they are, it gets copies of."""
    at = []
    for tensor, info in zip(tensors, infos):
        address = tensor.data_ptr()
        if (address % align or tensor.shape != info.shape or not tensor.is_contiguous()
                or tensor.is_neg()):
            tensor = _fit(tensor, info, align)
            copies.append(tensor)
            address = tensor.data_ptr()
        at.append(address)
    return at


class Host:
    """A block of the host's memory in which what a call offloads waits for its backward, pinned for
    a GPU.

    The copy engine may still be at work on it when torch has forgotten the call, so blocks go back
    to their variant, not to torch, and serve later calls of the stream that used them last, which
    come behind. What a captured graph has seen stays with it."""

    def __init__(self, pools, size, stream, kept):
        pool = pools.get(stream)
        self.block = pool.pop() if pool else None
        if self.block is None:
            self.block = torch.empty((size + 255,), dtype=torch.uint8,
                                     pin_memory=stream is not None)
        self.address = -(-self.block.data_ptr() // 256) * 256
        self.stream, self._pools = stream, pools
        if kept:  # for good
            self._pools = None
            pools.setdefault("captured", []).append(self.block)

    def __del__(self):
        if self._pools is not None:
            self._pools.setdefault(self.stream, []).append(self.block)

    def tensor(self, size):
        """The block as a tensor, which keeps it as long as there is one of its storage."""
        view = _bytes(size).from_address(self.address)
        view.host = _away[self.address] = self
        return torch.frombuffer(view, dtype=torch.uint8)


_away = weakref.WeakValueDictionary()  # address → Host that a tensor keeps


@functools.lru_cache
def _bytes(size):
    return type("Bytes", (ctypes.c_ubyte * size,), {})


# ---- lengths ----


def narrow(name, tensor, traced):
    """Integers of 64 bits in 32. What does not fit is refused where it can be read at once, and
    otherwise becomes the nearest that does, which breaks the rules of lengths if the value did."""
    if tensor.device.type == "cpu" and not traced and tensor.numel():
        wrong = torch.nonzero((tensor < INT32.min) | (tensor > INT32.max))
        if len(wrong):
            at = wrong[0].tolist()
            raise RegraphError("RG_E_DATA", f"{name}{at} is {tensor[tuple(at)].item()}; expected "
                                            "integers that fit 32 bits")
    return tensor.clamp(INT32.min, INT32.max).to(torch.int32)


def marked(starts, rows):
    """Starts past the rows get the sign that the device reports and `_said` understands."""
    return torch.where(starts > rows, starts.clamp(max=MARKED) ^ INT32.min, starts)


def within(name, starts, rows):
    """Starts for a plan of more rows than the tensors have, which knows only its own. Those past
    the tensors' are refused on a CPU; on a GPU nobody waits for them, and they are marked."""
    if starts.device.type != "cpu":
        return marked(starts, rows)
    if len(starts) and starts[-1].item() > rows:  # the plan's rule sees to the order
        at = torch.nonzero(starts > rows)[0].item()
        raise RegraphError("RG_E_DATA", f"{name}[{at}] is {starts[at].item()}; expected at most "
                                        f"{rows}, the rows there are")
    return starts


_WAS = re.compile(r"([\w.]+\[\d+\]) was (-?\d+) in an earlier run; ")


def _said(error):
    """The error, in which starts that `narrow` or `within` changed are told as they were."""
    found = _WAS.match(error.message) if error.status == "RG_E_DATA" else None
    value = int(found[2]) if found else 0
    if value == INT32.max:
        was = f"{value} or more in an earlier run; {error.message[found.end():]}"
    elif INT32.min < value <= INT32.min + MARKED:
        start = value - INT32.min
        was = (f"{start}{' or more' if start == MARKED else ''} in an earlier run, past the rows "
               "of its tensors: the run used it clamped")
    else:
        return error
    return RegraphError(error.status, f"{found[1]} was {was}")


# ---- variants ----


class Variant:
    """A plan for one set of shapes, with its idle sessions."""

    def __init__(self, plan, device, eager, ranks):
        self.plan, self.device, self.eager = plan, device, eager
        self._ranks = ranks  # None: there is one
        self.inputs, self.outputs, self.grads_in, self.grads_out = map(plan.of_role, range(4))
        self.on_gpu, self._index = device.type == "cuda", device.index
        self.align = 16 if self.on_gpu else 4
        gradients = len(self.grads_in) + len(self.grads_out)
        everything = len(plan.tensors)  # in the order of their roles
        self._pack = (struct.Struct(f"={everything - gradients}Q{8 * gradients}x").pack,
                      struct.Struct(f"={everything}Q").pack)
        self._idle: dict = {}  # stream → sessions; taking and giving back are atomic
        # stream → host blocks; below the sessions, which wait for their streams when they go
        self._hosts: dict = {}
        self.captured = False  # a captured graph refers to a session's memory
        self.used = 0

    def host(self):
        """A host block for a forward on the current stream; None: nothing is offloaded."""
        size = self.plan.sizes.host
        if not size:
            return None
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.on_gpu else None
        capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
        return Host(self._hosts, size, stream, capturing)

    def held(self, tensor):
        """The host block that a tensor keeps, or where someone has moved it, a copy."""
        size = self.plan.sizes.host
        if not size:
            return None
        host = _away.get(tensor.data_ptr())
        if host is None:
            host = self.host()
            host.tensor(size).copy_(tensor)
        return host

    def run(self, backward, addresses, saved, scratch, host=None):
        """Runs a direction on the current stream, with addresses of the plan's tensors: of inputs
        and outputs, and in a backward those of gradients behind them."""
        if self._ranks is not None:
            return self._run_as_rank(backward, addresses, saved, scratch, host)
        return self._run(backward, addresses, saved, scratch, host, None)

    def _run_as_rank(self, *arguments):
        """All ranks make their calls in the same order, each from one thread at a time."""
        with self._ranks.lock:
            try:
                return self._run(*arguments, self._ranks.engine(self.device))
            except RegraphError:
                raised = self._ranks.raised()
                if raised is not None:
                    raise raised from None
                raise

    def _run(self, backward, addresses, saved, scratch, host, comm):
        stream, capturing = None, False
        if self.on_gpu:
            if torch._C._cuda_getDevice() != self._index:
                with torch.cuda.device(self._index):
                    return self._run(backward, addresses, saved, scratch, host, comm)
            stream = torch._C._cuda_getCurrentRawStream(self._index)
            capturing = torch._C._cuda_isCurrentStreamCapturing()
        idle = self._idle.get(stream)
        try:
            session = None if idle is None or capturing else idle.pop()
        except IndexError:
            session = None
        if session is None:
            session, idle = self._take(stream, capturing, saved, scratch, host, comm)
        self.used = next(_clock)
        try:
            if host is not None:
                session.bind_saved(saved)
                session.bind_host(host.address)
                host.stream = stream
            session.run_on(backward, self._pack[backward](*addresses), saved, scratch, stream)
        except RegraphError as error:
            raise _said(error) from None
        finally:
            idle.append(session)

    def _take(self, stream, capturing, saved, scratch, host, comm):
        own = self._idle.setdefault(stream, [])
        self.captured |= capturing
        for idle in list(self._idle.values()) if capturing else ():
            if idle:
                return idle.pop(), own
        if capturing:
            raise RegraphError("RG_E_USAGE", "the stream is being captured, and this is the first "
                                             "run of these shapes; run once before the capture")
        return core.Session(self.plan, saved=saved, scratch=scratch, host=host and host.address,
                            eager=self.eager, comm=comm), own

    def synchronize(self):
        try:
            for sessions in list(self._idle.values()):
                for session in list(sessions):
                    session.synchronize()
        except RegraphError as error:
            raise _said(error) from None

    def times(self):
        self.synchronize()
        return next(iter(s for sessions in self._idle.values() for s in reversed(sessions))).times()


def _never(*tensors):
    return False


def _knows(tensors, infos):
    """A function that tells whether other tensors are like these in all that matters, so that they
    need no copies either; of tensors that do need some, never."""
    if TensorGuards is None or not all(
            isinstance(t, torch.Tensor) and t.is_contiguous() and not t.is_neg()
            and (info is None or t.shape == info.shape) for t, info in zip(tensors, infos)):
        return _never
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


def _strides(shape):
    return torch.empty(shape, device="meta").stride()


class Call:
    """A variant for tensors of certain shapes, of which the inputs in `wanted` get gradients."""

    def __init__(self, program, variant, wanted, tensors):
        self.program, self.variant, self.wanted = program, variant, wanted
        self.device = variant.device
        self.saved, self.scratch = variant.plan.sizes.saved, variant.plan.sizes.scratch
        self.long = any(tensor.dtype == torch.int64 for tensor in tensors)
        self._made = [(info.shape, _strides(info.shape), DTYPES[info.dtype])
                      for info in variant.outputs]
        self._rows = None if program.exact else program.rows_of(tensors)
        if variant.outputs and variant.outputs[0].shape[0] == self._rows:
            self._rows = None
        # the plan's rows are more than the tensors': its rule for starts is not strict enough
        self._starts = () if self._rows is None else [
            i for i, (name, tensor) in enumerate(zip(program.inputs, tensors))
            if name in program.seqlens and tensor.dim() == 1]
        self.integers = [i for i, info in enumerate(variant.outputs) if info.dtype == "i32"]
        self._arriving = [program.floating.index(info.name) for info in variant.grads_in]
        planned = [info.name for info in variant.grads_out]
        wanted = [program.inputs[i] for i in wanted]
        self._leaving = [wanted.index(name) for name in planned]
        # of these the gradient is zero: nothing depends on them
        self._unmoved = [i for i, name in enumerate(wanted) if name not in planned]
        adds = program.accumulating
        self.adding = [i for i in self.wanted if program.inputs[i] in adds]
        outputs = [info.name for info in variant.outputs]
        self._grads = [outputs.index(info.name) for info in variant.grads_in]
        self._fresh = [(program.inputs.index(info.name), info.shape, _strides(info.shape),
                        DTYPES[info.dtype]) for info in variant.grads_out]
        self.threads = torch.get_num_threads()
        self.same = self._same_backward = _never

    def learn(self, tensors):
        """From now on `same` knows inputs like these."""
        if not self.long:
            self.same = _knows(tensors, self.variant.inputs)

    def learn_backward(self, tensors, grads):
        """From now on `gradients` knows tensors like these."""
        variant = self.variant
        if (self._rows is None and not self.adding and not self._unmoved
                and len(grads) == len(self._grads)):
            like = [variant.outputs[i] for i in self._grads]
            infos = *variant.inputs, *variant.outputs, None, *like
            knows = _knows([*tensors, *grads], infos)
            self._same_backward = self._same_backward if knows is _never else knows

    def forward(self, tensors, same=False, keep=True):
        """Outputs, and the saved block with its `host`, unless nobody will `keep` it. `same`: as
        that says."""
        variant, device, copies = self.variant, self.device, []
        if self._starts:
            tensors = list(tensors)
            for i in self._starts:
                tensors[i] = within(self.program.inputs[i], tensors[i], self._rows)
        at = [tensor.data_ptr() for tensor in tensors]
        if not same or functools.reduce(operator.or_, at) % variant.align:
            at = _addresses(tensors, variant.inputs, variant.align, copies)
        outputs = [torch.empty_strided(shape, stride, dtype=dtype, device=device)
                   for shape, stride, dtype in self._made]
        for output in outputs:
            at.append(output.data_ptr())
        if keep:
            saved, scratch = _block(self.saved, device), _block(self.scratch, device)
            host = saved.host = variant.host()
            variant.run(False, at, saved.data_ptr(), scratch.data_ptr(), host)
        else:  # one block for both
            behind = self.saved + -self.saved % 256
            saved = _block(behind + self.scratch, device)
            address = saved.data_ptr()
            variant.run(False, at, address, address + behind)
        if self._rows is not None:
            outputs = [output[: self._rows] for output in outputs]
        return outputs, saved

    def gradients(self, tensors, grads, host=None):
        """The gradient of each input, or None, from inputs, outputs, the saved block, and gradients
        of outputs, where they are as the last ones were; None where they are not."""
        if not self._same_backward(*tensors, *grads):
            return None
        variant, device = self.variant, self.device
        at = [tensor.data_ptr() for tensor in tensors]
        saved = at.pop()
        for i in self._grads:
            at.append(grads[i].data_ptr())
        if functools.reduce(operator.or_, at) % variant.align or saved % BLOCK[variant.on_gpu]:
            return None
        gradients = [None] * len(variant.inputs)
        for i, shape, stride, dtype in self._fresh:
            gradients[i] = gradient = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            at.append(gradient.data_ptr())
        scratch = _block(self.scratch, device)
        variant.run(True, at, saved, scratch.data_ptr(), host)
        return gradients

    def backward(self, inputs, outputs, saved, grads, results, host=None):
        """Writes (or adds, as the spec has it) the gradients of the wanted inputs to `results`."""
        variant, copies, short = self.variant, [], []
        align = variant.align
        address = saved.data_ptr()
        if address % BLOCK[variant.on_gpu]:  # moved by someone: a view, or back from the host
            saved = saved.clone()
            address = saved.data_ptr()
        at = _addresses(inputs, variant.inputs, align, copies)
        at += _addresses(outputs, variant.outputs, align, copies)
        at += _addresses([grads[i] for i in self._arriving], variant.grads_in, align, copies)
        for i, info in zip(self._leaving, variant.grads_out):
            result = results[i]
            if (result.shape != info.shape or result.data_ptr() % align
                    or not result.is_contiguous()):
                wide = (_fit(result, info, align) if info.accumulates else
                        result.new_empty(info.shape))
                short.append((result, wide))
                result = wide
            at.append(result.data_ptr())
        scratch = _block(self.scratch, self.device)
        variant.run(True, at, address, scratch.data_ptr(), host)
        for result, wide in short:
            result.copy_(wide[: result.shape[0]] if result.dim() else wide)
        for i in self._unmoved:
            results[i].zero_()


# ---- programs ----


def _may_offload(text):
    """May plans by a policy of this text have something wait in the host's memory?"""
    policy = json.loads(text) if text.lstrip().startswith("{") else {}
    return "host" in policy or "offload" in policy.get("nodes", {}).values()


class Program:
    """A spec, a policy and parameters."""

    def __init__(self, text, name, policy, eager, options, params):
        self.name, self.params, self.eager, self.options = name, params, eager, options
        self._group = options.pop("cp", None)  # {name, deadline} of a group that shares the rows
        self.ranks = None
        self.policy = core.Policy(policy) if policy is not None else None
        self.offloads = policy is not None and _may_offload(self.policy.text)
        spec = core.Spec(text, name=name, **params)  # complaints about the file come first
        spec.check(self.policy)
        state = [t.name for t in spec.tensors if t.role == _lib.STATE]
        if state:
            raise RegraphError("RG_E_USAGE",
                               f"{name}: the spec has state ('{state[0]}'), which a function of "
                               "tensors has nowhere to keep; regraph.Session runs it")
        self.spec = json.loads(text)
        self.inputs = tuple(t.name for t in spec.tensors if t.role == _lib.INPUT)
        for input in self.inputs:
            if input not in self.spec["inputs"]:
                raise RegraphError("RG_E_USAGE",
                                   f"{name}: the input '{input}' is of a copy of a repeated block, "
                                   "which a function of tensors knows nothing of; write the copies "
                                   "out, or take regraph.Session")
        self.outputs = tuple(t.name for t in spec.tensors if t.role == _lib.OUTPUT)
        self.floating = tuple(t.name for t in spec.tensors
                              if t.role == _lib.OUTPUT and t.dtype != "i32")
        self.seqlens = tuple(t.name for t in spec.tensors if t.role == _lib.INPUT and t.seqlens)
        axes = {name: str(self.spec["inputs"][name]["shape"][:1] or "")[2:-2]
                for name in self.inputs if name not in self.seqlens}
        tokens = {axis for axis in axes.values()
                  if axis.isidentifier() and axis not in self.spec.get("params", {})
                  and axis not in params}
        # whose rows say how long a sequence is where no starts are given; of two kinds, none do
        self.counted = tuple(name for name, axis in axes.items() if {axis} == tokens)
        grads = {name: self.spec["inputs"][name].get("grad", False) for name in self.inputs}
        self.differentiable = frozenset(name for name in self.inputs if grads[name])
        self.accumulating = frozenset(name for name in self.inputs if grads[name] == "accumulate")
        self._variants, self._lock = {}, threading.Lock()
        self.calls: dict = {}  # what tells kinds of calls apart (Attention, `call`) → Call
        # the last call without and with gradients, if it may be asked for `same`
        self.last: list = [None, None]
        counts = self._counts_rows()
        self.exact = self.options.pop("exact", False) or not counts
        if self._group is not None and not counts:
            raise RegraphError("RG_E_USAGE", f"{self.name}: ranks share out the rows of one token "
                               "axis, which is the first of inputs and outputs, and whose "
                               "sequences one input counts; the spec has none such")
        self.join()

    def join(self):
        """Takes its place among the ranks, where there are any; again after these have failed."""
        if self._group is None:
            return
        from . import ranks  # imports torch.distributed

        mine = ranks.ranks_of(self._group["name"], self._group["deadline"], anew=True)
        if mine is not self.ranks:
            with self._lock:
                self.ranks = mine
                self._variants.clear()
                self._forget_calls()

    def tell(self, error):
        """What is refused here others call: where ranks share the rows, it ends theirs, too."""
        if self.ranks is not None:
            self.ranks.fail(error)

    @property
    def shares(self):
        """How many ranks share the rows."""
        return 1 if self.ranks is None else self.ranks.size

    def _counts_rows(self):
        """Finds the token axis: a free name that is the first axis of inputs and nothing else,
        beside lengths of its sequences. Then a plan for more rows than there are serves."""
        free = {}  # name → which inputs use it how
        for name in self.inputs:
            for axis, extent in enumerate(self.spec["inputs"][name]["shape"]):
                for word in re.findall(r"[A-Za-z_]\w*", str(extent)):
                    if word not in self.spec.get("params", {}) and word not in self.params:
                        free.setdefault(word, []).append((name, axis, str(extent)))
        rows = [word for word, uses in free.items()
                if all(axis == 0 and extent == word for _, axis, extent in uses)]
        others = [word for word in free if word not in rows]
        if len(rows) != 1 or len(self.seqlens) != 1 or any(
                name not in self.seqlens or extent != f"{word}+1"
                for word in others for name, _, extent in free[word]):
            return False
        self.rows = frozenset(name for name, _, _ in free[rows[0]])
        self._bound = [{rows[0]: n, **dict.fromkeys(others, 1)} for n in (1024, 2048)]
        few, more = (self._outputs(bound) for bound in self._bound)
        return all(a[1:] == b[1:] and (a[:1], b[:1]) == ((1024,), (2048,))
                   for (_, a), (_, b) in zip(few, more))

    def _outputs(self, bound, tensors=()):
        spec = core.Spec(self.spec, name=self.name, **self.params_for(tensors), **bound)
        return [(t.dtype, t.shape) for t in spec.tensors if t.role == _lib.OUTPUT]

    def rows_of(self, tensors):
        """How many tokens there are. Not of an exact program."""
        return next(tensor.shape[0] for name, tensor in zip(self.inputs, tensors)
                    if name in self.rows)

    def like(self, tensors):
        """Type and shape of each output but for its rows, for inputs of the tensors' types."""
        return [(dtype, shape[1:]) for dtype, shape in self._outputs(self._bound[0], tensors)]

    def dtype_of(self, name):
        """The type that the spec or the caller names for an input; None: it follows the tensor."""
        said = str(self.spec["inputs"][name]["dtype"])
        return self.params.get(said[1:]) if said.startswith("$") else said

    def params_for(self, tensors):
        """The parameters, with those that the tensors say and the caller did not. Integers say
        none: one in the place of floats is to be named, not followed."""
        params = dict(self.params)
        for name, tensor in zip(self.inputs, tensors):
            parameter = str(self.spec["inputs"][name]["dtype"])
            if parameter.startswith("$") and tensor.dtype in NAMES and tensor.is_floating_point():
                params.setdefault(parameter[1:], NAMES[tensor.dtype])
        return params

    def capacities(self, shapes):
        """The shapes of the plan that serves inputs of these shapes."""
        if self.exact:
            return shapes
        shared = self.ranks is not None  # who owns what follows from the capacity: it is given
        return tuple((shape[0] if shared else room(shape[0]), *shape[1:])
                     if name in self.rows else
                     (room(shape[0] - 1, 0) + 1,)
                     if name in self.seqlens and len(shape) == 1 and shape[0]
                     else shape for name, shape in zip(self.inputs, shapes))

    def call(self, wanted, tensors):
        """The call for tensors like these with gradients of the inputs in `wanted` ("q,k,v")."""
        kind = (wanted, torch.get_num_threads(), *[(t.shape, t.dtype, t.device) for t in tensors])
        return self.calls.get(kind) or self.prepare(kind, wanted, tensors)

    def prepare(self, kind, wanted, tensors):
        names = wanted.split(",")
        wants = tuple(i for i, name in enumerate(self.inputs) if name in names)
        made = Call(self, self.variant(wanted, tensors), wants, tensors)
        with self._lock:
            if len(self.calls) >= CALLS:
                self._forget_calls()
            self.calls[kind] = made
        return made

    def _forget_calls(self):
        self.calls.clear()
        self.last[:] = None, None

    def variants(self):
        with self._lock:
            return list(self._variants.values())

    def variant(self, wanted, tensors):
        """The plan for these inputs, with gradients of those in `wanted`; tensors may be fake."""
        device = tensors[0].device
        self.refuse(zip(self.inputs, tensors))
        given = tuple([tuple(map(int, tensor.shape)) for tensor in tensors])
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        for name, shape in zip(self.inputs, given):
            entry = self.spec["inputs"][name]["shape"]
            if len(shape) != len(entry):
                raise RegraphError(
                    "RG_E_RANK", f"{self.name}: the input '{name}' has {len(shape)} axes {shape}; "
                    f"expected {len(entry)} [{', '.join(map(str, entry))}]; regraph.torch.pack "
                    "makes packed tensors and cu_seqlens of batches")
        self._check_alike(given, tensors)
        dtypes = tuple([torch.int32 if tensor.dtype == torch.int64 else tensor.dtype
                        for tensor in tensors])
        shapes = self.capacities(given)
        key = (wanted, device, shapes, dtypes, threads)
        with self._lock:
            if key not in self._variants:
                self._variants[key] = self._make(wanted, device, shapes, dtypes, tensors, threads)
                idle = [k for k, v in self._variants.items() if not v.captured and k != key]
                if len(self._variants) > VARIANTS and idle:
                    del self._variants[min(idle, key=lambda k: self._variants[k].used)]
                    self._forget_calls()
            return self._variants[key]

    def refuse(self, named):
        """Of (name, tensor): those that are no arrays, before anything asks for their memory."""
        for i, (name, tensor) in enumerate(named):
            if tensor.layout is torch.strided and not tensor.is_nested:
                kind = tensor.device.type
                if i or kind in ("cpu", "cuda"):  # the others have to be where the first is
                    continue
                raise RegraphError("RG_E_DEVICE", f"{self.name}: the input '{name}' is on {kind}; "
                                                  "expected cpu or cuda" + NO_MEMORY.get(kind, ""))
            what, instead = f"sparse ({tensor.layout})", "a dense tensor, as .to_dense() gives"
            if tensor.is_nested:
                what, instead = "nested", ("a packed tensor: .values(), and .offsets() as "
                                           "cu_seqlens, of a jagged one")
            raise RegraphError("RG_E_TYPE", f"{self.name}: the input '{name}' is {what}; expected "
                                            f"{instead}")

    def _check_alike(self, shapes, tensors):
        """One device and one number of tokens: neither is told by a plan, of which there is one for
        all numbers of tokens within a capacity, and for what the first tensor is on."""
        device = tensors[0].device
        for name, tensor in zip(self.inputs, tensors):
            if tensor.device != device:
                raise RegraphError(
                    "RG_E_DEVICE", f"{self.name}: the input '{name}' is on {tensor.device}; "
                    f"expected {device}, where '{self.inputs[0]}' is")
        if self.exact:
            return
        counts = [(name, shape[0]) for name, shape in zip(self.inputs, shapes) if name in self.rows]
        for name, count in counts:
            if count != counts[0][1]:
                raise RegraphError(
                    "RG_E_SHAPE", f"{self.name}: the input '{name}' has {count} tokens; expected "
                    f"{counts[0][1]}, as '{counts[0][0]}' has")

    def _make(self, wanted, device, shapes, dtypes, tensors, threads):
        spec = dict(self.spec, inputs={})
        for name in self.inputs:
            entry = spec["inputs"][name] = dict(self.spec["inputs"][name])
            if name not in wanted.split(","):
                entry.pop("grad", None)
            elif "grad" not in entry:
                entry["grad"] = True
        loaded = core.Spec(spec, name=self.name, **self.params_for(tensors))
        whole = [(self.shares * shape[0], *shape[1:])
                 if self.ranks is not None and name in self.rows else shape
                 for name, shape in zip(self.inputs, shapes)]
        dims = loaded.solve(dict(zip(self.inputs, whole)))
        there = device.type == "cuda" and torch.cuda.is_available()
        with torch.cuda.device(device) if there else contextlib.nullcontext():
            options = {**self.options, "threads": self.options["threads"] or threads}
            plan = core.Plan(loaded, self.policy, device=device.type, cp=self.shares, **options,
                             **dims)
        variant = Variant(plan, device, self.eager, self.ranks)
        for info, shape, dtype, tensor in zip(variant.inputs, shapes, dtypes, tensors):
            if dtype != DTYPES[info.dtype]:
                raise RegraphError(
                    "RG_E_DTYPE", f"{self.name}: the input '{info.name}' holds {tensor.dtype}; "
                    f"expected {DTYPES[info.dtype]}")
            if shape != info.shape:
                raise RegraphError("RG_E_SHAPE", f"{self.name}: the input '{info.name}' has shape "
                                                 f"{shape}; expected {info.shape}")
        return variant
