"""Serving: requests that share the steps of one graph (docs/serving.md).

    engine = regraph.serve.Engine("serve_model.json", weights, pages=512, page=128, slots=64)
    request = engine.add(prompt, 100)
    for request, token in engine.steps():
        ...

`Queue` is rg_queue of the C library: who is served when, and what a step's inputs are. `Engine`
puts a graph and sampling around it. Neither needs torch; on a GPU memory comes from the library.
"""

import ctypes
import operator
import time
from dataclasses import dataclass, field
from typing import Iterator, Mapping, Sequence

import numpy as np

from . import _lib, arrays
from .core import Context, DeviceMemory, Plan, Session, Source, Spec, _Handle, default_context
from .errors import RegraphError


@dataclass(frozen=True)
class Stats:
    """What a queue did so far, and how things stand."""

    served: int  # requests that have pages
    waiting: int
    pages_used: int
    pages_kept: int  # nobody's, but found again
    pages_free: int
    pages_shared: int  # of those used
    steps: int
    tokens: int  # made
    rows: int  # tokens that ran
    found: int  # tokens that were in pages already
    preempted: int  # times that a request was sent to wait
    copies: int  # of pages
    finished: int
    cancelled: int
    seconds: float = 0.0  # that an engine's steps took, and of these
    host_seconds: float = 0.0  # what its graph did not


class Queue(_Handle):
    """Who is served when. `step` fills the arrays below; one step at a time.

    tokens [rows], lengths and context [slots], pages [slots, most], forks [forks, 2]: the graph's
    inputs, i32, views of one `block` of bytes. request, wanted, last [slots]: whose turn it is,
    whose next token is due, and whose last token that is."""

    def __init__(self, *, pages: int, page: int, rows: int, slots: int, most: int, forks: int = 0,
                 prefixes: bool = True, context: Context | None = None):
        context = context or default_context()
        options = _lib.QueueOptions(pages=pages, page=page, rows=rows, slots=slots, most=most,
                                    no_prefixes=not prefixes, forks=forks)
        handle = _lib.create("rg_queue_create", context.handle, ctypes.byref(options))
        self._own(handle, _lib.lib.rg_queue_destroy, context)
        shapes = {"lengths": (slots,), "context": (slots,), "pages": (slots, most),
                  "forks": (forks, 2), "tokens": (rows,)}  # last: a step may have room for fewer
        self.offsets, size = {}, 0
        for name, shape in shapes.items():
            self.offsets[name] = size
            size += (4 * int(np.prod(shape)) + 255) // 256 * 256
        room = np.zeros(size + 256, np.uint8)
        start = -room.ctypes.data % 256
        self.block = room[start:start + size]
        for name, shape in shapes.items():
            at, count = self.offsets[name], int(np.prod(shape))
            setattr(self, name, self.block[at:at + 4 * count].view(np.int32).reshape(shape))
        self._info = _lib.QueueInfo()
        self.request = np.zeros(slots, np.int64)
        self.wanted, self.last = np.zeros(slots, np.bool_), np.zeros(slots, np.bool_)
        self._arrays = _lib.QueueArrays(**{name: getattr(self, name).ctypes.data for name in
                                           (*shapes, "request", "wanted", "last")})

    tokens: np.ndarray
    lengths: np.ndarray
    context: np.ndarray
    pages: np.ndarray
    forks: np.ndarray

    def add(self, tokens: Sequence[int], most: int) -> int:
        """The number of a new request: of these tokens, with at most so many to come. Refused with
        RG_E_LIMIT where it would not fit if it had everything for itself."""
        array = arrays.convert(np.asarray(tokens), "i32").reshape(-1)
        number = ctypes.c_int64()
        _lib.call("rg_queue_add", self.handle,
                  array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), array.size, most,
                  ctypes.byref(number))
        return number.value

    def fork(self, request: int, token: int) -> int:
        """Another request that begins as this one does, but for its last token."""
        number = ctypes.c_int64()
        _lib.call("rg_queue_fork", self.handle, request, token, ctypes.byref(number))
        return number.value

    def cancel(self, request: int) -> None:
        """No more of it; also while a step runs."""
        _lib.call("rg_queue_cancel", self.handle, request)

    def step(self) -> int:
        """Fills the arrays; how many rows of `tokens` there are. 0: nobody is left."""
        _lib.call("rg_queue_step", self.handle, ctypes.byref(self._arrays))
        self.used = self._arrays.used
        return self._arrays.rows

    used: int = 0  # slots of the step, from 0 on, that are somebody's

    def done(self, next: np.ndarray | None) -> None:
        """The step ran: next [slots], i32. None: it did not, and runs again."""
        _lib.call("rg_queue_done", self.handle, None if next is None else next.ctypes.data)

    def undo(self) -> None:
        """done(None), if a step was begun at all."""
        _lib.lib.rg_queue_done(self.handle, None, None)

    def steps(self) -> int:
        """How many steps were done."""
        _lib.lib.rg_queue_count(self.handle, ctypes.byref(self._info))
        return self._info.steps

    def stats(self) -> Stats:
        info = _lib.QueueInfo()
        _lib.lib.rg_queue_count(self.handle, ctypes.byref(info))
        return Stats(served=info.served, waiting=info.waiting, pages_used=info.pages.used,
                     pages_kept=info.pages.kept, pages_free=info.pages.free,
                     pages_shared=info.pages.shared, steps=info.steps, tokens=info.tokens,
                     rows=info.rows, found=info.found, preempted=info.preempted,
                     copies=info.copies, finished=info.finished, cancelled=info.cancelled)


# ---- sampling ----


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from logits. temperature 0: the greatest. top_k (0: all) and then
    top_p keep the likeliest; of equal logits the lower token comes first.

    What is drawn hangs on the logits, the seed and the token's position alone: not on who shares
    the step, nor on whether a request waited in between."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        """What can't be drawn by would fail every step, whoever else shares it."""
        try:
            for name in "temperature", "top_p":
                object.__setattr__(self, name, float(getattr(self, name)))
            for name in "top_k", "seed":
                object.__setattr__(self, name, operator.index(getattr(self, name)))
        except (TypeError, ValueError, OverflowError):
            raise RegraphError("RG_E_TYPE", f"sampling: {name} {getattr(self, name)!r}; expected a "
                               "number, and a whole one for top_k and seed") from None
        for name, good in (("temperature", 0 <= self.temperature < np.inf),
                           ("top_k", self.top_k >= 0), ("top_p", 0 < self.top_p <= 1)):
            if not good:
                raise RegraphError("RG_E_VALUE", f"sampling: {name} {getattr(self, name)}; "
                                   "expected temperature 0 or more, and finite, top_k 0 or more, "
                                   "top_p in (0, 1]")


GREEDY = Sampling()
_ODD = 0x9E3779B97F4A7C15


def _uniform(seed, position):
    """In [0, 1), of a seed and a position alone."""
    x = (seed * 0xD1B54A32D192ED03 + (position + 1) * _ODD) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ x >> shift) * factor % 2**64
    return ((x ^ x >> 31) >> 11) * 2.0**-53


def draw(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    """The token at `position` of a sequence, from its logits [V]; -1 where these are all NaN."""
    logits = np.asarray(logits, np.float64)
    logits = np.where(np.isnan(logits), -np.inf, logits)  # no value, as argmax has it
    most = logits.max()
    if most == -np.inf:
        return -1
    if sampling.temperature == 0 or most == np.inf:
        return int(logits.argmax())
    kept = np.arange(logits.size)
    if 0 < sampling.top_k < logits.size:
        kept = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
    if kept.size < logits.size or sampling.top_p < 1:  # the likeliest first
        kept = kept[np.argsort(-logits[kept], kind="stable")][:sampling.top_k or None]
    with np.errstate(over="ignore"):  # a temperature next to 0
        weight = np.exp((logits[kept] - most) / sampling.temperature)
    total = weight.cumsum()
    if sampling.top_p < 1:
        total = total[:int(np.searchsorted(total, sampling.top_p * total[-1])) + 1]
    return int(kept[np.searchsorted(total, _uniform(sampling.seed, position) * total[-1],
                                    side="right")])


# ---- the engine ----


@dataclass(eq=False)
class Request:
    """A request of an engine's. `tokens` grows as they come."""

    number: int
    prompt: tuple[int, ...]
    max_new: int
    stop: frozenset[int]
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    state: str = "live"  # "finished", "cancelled"; "failed": its logits are all NaN

    def __repr__(self):
        return (f"Request({self.number}: {len(self.prompt)} + {len(self.tokens)} of "
                f"{self.max_new} tokens, {self.state})")


def _bytes_of(weight, tensor, device):
    """(address, what keeps it alive, array to copy there or None) of a weight."""
    if hasattr(weight, "data_ptr"):  # a torch tensor, used where it is
        if (weight.numel() * weight.element_size(), tuple(weight.shape)) != (tensor.nbytes,
                                                                             tensor.shape) \
                or not weight.is_contiguous() or weight.device.type != device:
            raise RegraphError("RG_E_SHAPE", f"the weight '{tensor.name}' is {weight.dtype} of "
                               f"shape {tuple(weight.shape)} on {weight.device}; expected a "
                               f"contiguous {tensor.dtype} of shape {tensor.shape} on {device}")
        return weight.data_ptr(), weight, None
    array = arrays.convert(weight, tensor.dtype)
    if array.shape != tensor.shape:
        raise RegraphError("RG_E_SHAPE", f"the weight '{tensor.name}' has shape {array.shape}; "
                                         f"expected {tensor.shape}")
    return (array.ctypes.data, array, None) if device == "cpu" else (0, None, array)


class Engine:
    """A graph's steps, and requests that share them.

    spec     a step: inputs tokens [T], lengths and context [B], pages [B, M], perhaps forks
             [forks, 2]; state [P, …]; outputs next [B], of which `greedy` is, or logits [B, V], or
             both. T, B, M, P and forks are its free dimensions; examples/serve_model.json is one
    weights  {input: array}: all its other inputs. Arrays of torch on the device stay where they
             are, others are copied to a GPU
    pages    P, of `page` tokens each: what there is for all requests together
    slots    B: how many are served at once
    most     M: how many pages one may have (default: all)
    rows     capacities T of a step, the largest one for prompts in pieces: each has a plan of its
             own, on the same memory (default: slots, and 4 · slots)
    forks    copies of pages in one step (default: slots, where the spec has them)
    params   of the spec

    One thread at a time. What a step gives to a request hangs on that request's tokens alone."""

    def __init__(self, spec: Spec | Source, weights: Mapping[str, object], *, pages: int,
                 page: int, slots: int, most: int = 0, rows: Sequence[int] = (),
                 forks: int | None = None, prefixes: bool = True, device: str = "cpu",
                 threads: int = 0, **params):
        spec = spec if isinstance(spec, Spec) else Spec(spec, **params)
        inputs = {t.name for t in spec.tensors if t.role == _lib.INPUT}
        missing = {"tokens", "lengths", "context", "pages"} - inputs
        if missing:
            raise RegraphError("RG_E_NAME", f"{spec.name}: no input '{min(missing)}'; expected a "
                               "step's: tokens, lengths, context, pages")
        most, rows = most or pages, sorted(set(rows)) or [slots, 4 * slots]
        dims = {"B": slots, "M": most, "P": pages}
        if "forks" in inputs:
            dims["forks"] = forks = slots if forks is None else forks
        elif forks:
            raise RegraphError("RG_E_NAME", f"{spec.name} has no input 'forks': its steps copy no "
                                            "pages")
        self.device = device
        self.queue = Queue(pages=pages, page=page, rows=rows[-1], slots=slots, most=most,
                           forks=forks or 0, prefixes=prefixes, context=spec.context)
        self._buckets: list[tuple[int, Session]] = []
        self._memory: list = []  # what is bound, and stays alive
        self._outputs: dict[str, tuple] = {}
        self._requests: dict[int, Request] = {}
        self._steps = 0  # that were done and are settled
        self._begun: tuple[int, list] | None = None  # a step: that many before; who gets what
        self._told: list = []  # what a step made, until its caller has it
        self._seconds = self._ran = 0.0
        bound: dict[tuple[int, str], int] = {}
        for count in reversed(rows):  # the others fit into what the largest binds
            plan = Plan(spec, device=device, threads=threads, no_grad=True, T=count, **dims)
            session = Session(plan)
            self._bind(plan, session, dict(weights), bound, page)
            self._buckets.insert(0, (count, session))
        self._next = np.zeros(slots, np.int32)
        logits = self._outputs.get("logits")
        self._tokens = logits[0].shape[-1] if logits else 2**31  # how many the model knows

    def _take(self, plan, size):
        memory = DeviceMemory(plan, max(size, 1))
        self._memory.append(memory)
        return memory.address

    def _bind(self, plan, session, weights, bound, page):
        queue = self.queue
        if not bound:
            state = plan.of_role(_lib.STATE)
            if not any(page in tensor.shape[1:3] for tensor in state):
                shapes = ", ".join(f"{t.name} {list(t.shape)}" for t in state[:2])
                raise RegraphError("RG_E_SHAPE", f"the state is {shapes or 'none'}; expected pages "
                                                 f"of {page} tokens")
            self._block = queue.block.ctypes.data
            if plan.device != "cpu":
                self._there = DeviceMemory(plan, queue.block.nbytes)
                self._block = self._there.address
        for tensor in plan.tensors:
            at = tensor.role, tensor.name
            if tensor.role == _lib.INPUT and tensor.name in queue.offsets:
                address = self._block + queue.offsets[tensor.name]
            elif at in bound:
                address = bound[at]
            elif tensor.role == _lib.INPUT:
                if tensor.name not in weights:
                    raise RegraphError("RG_E_USAGE", f"the weight '{tensor.name}' is missing; "
                                       f"expected {tensor.dtype} of shape {tensor.shape}")
                address, keep, copy = _bytes_of(weights[tensor.name], tensor, plan.device)
                self._memory.append(keep)
                if copy is not None:
                    address = self._take(plan, tensor.nbytes)
                    self._memory[-1].write(copy)
            else:
                address = self._take(plan, tensor.nbytes)
                if tensor.role == _lib.OUTPUT:
                    self._outputs[tensor.name] = tensor, self._memory[-1]
            bound[at] = address
            session.bind(tensor.role, tensor.name, address, tensor.nbytes)
        if not self._outputs.keys() & {"next", "logits"}:
            raise RegraphError("RG_E_NAME", "the spec has neither an output 'next' nor 'logits'")

    # ---- requests ----

    def add(self, tokens: Sequence[int], max_new: int, *, stop: Sequence[int] = (),
            sampling: Sampling = GREEDY) -> Request:
        """A request of these tokens. It ends after max_new more, or with one of `stop`. RG_E_LIMIT,
        by name, where it would not fit if it had all pages for itself."""
        if sampling.temperature and "logits" not in self._outputs:
            raise RegraphError("RG_E_USAGE", "sampling needs an output 'logits', which the spec "
                                             "does not have; temperature 0 takes its 'next'")
        prompt = tuple(operator.index(token) for token in tokens)
        if not prompt:
            raise RegraphError("RG_E_USAGE", "a request of no tokens; expected one at least")
        for at, token in enumerate(prompt):
            self._known(token, f"token {at} of the request")
        max_new, stop = operator.index(max_new), frozenset(map(operator.index, stop))
        if max_new < 1:
            raise RegraphError("RG_E_USAGE", f"a request of {max_new} tokens more; expected one at "
                                             "least")
        return self._keep(Request(self.queue.add(prompt, max_new), prompt, max_new, stop, sampling))

    def _known(self, token, what):
        """A token that no table has a row for would fail every step, whoever else shares it."""
        if not 0 <= token < self._tokens:
            raise RegraphError("RG_E_VALUE",
                               f"{what} is {token}; expected 0 to {self._tokens - 1}")

    def _keep(self, request):
        self._requests[request.number] = request
        return request

    def fork(self, request: Request, token: int, *, sampling: Sampling | None = None) -> Request:
        """Another that shares what this one has so far, but for its last token: `token`. Pages are
        copied when one of both writes to them."""
        if self._begun:
            self._settle()
        self._live(request)
        if not request.tokens:
            raise RegraphError("RG_E_USAGE", f"{request!r} has no token of its own yet")
        self._known(operator.index(token), "the fork's token")
        number = self.queue.fork(request.number, token)
        return self._keep(Request(number, request.prompt, request.max_new, request.stop,
                                  sampling or request.sampling, [*request.tokens[:-1], token]))

    def _live(self, request):
        if self._requests.get(request.number) is not request:
            raise RegraphError("RG_E_USAGE", f"{request!r} is not served here")

    def cancel(self, request: Request) -> None:
        """No more of it, at any time. One that has ended stays as it is."""
        if self._begun:
            self._settle()
        if request.state != "live":
            return
        self._live(request)
        request.state = "cancelled"
        self._requests.pop(request.number)
        self.queue.cancel(request.number)

    # ---- steps ----

    def _run(self, rows):
        start = time.perf_counter()
        count, session = next(bucket for bucket in self._buckets if rows <= bucket[0])
        if self.device != "cpu":
            self._there.write(self.queue.block[:self.queue.offsets["tokens"] + 4 * count])
        session.run_forward()
        session.synchronize()
        if "next" in self._outputs:
            self._outputs["next"][1].read(self._next)
        self._ran += time.perf_counter() - start

    def output(self, name: str) -> np.ndarray:
        """What an output of the spec holds after a step: its first rows are those of the step's
        tokens (or slots), what follows them is left from others."""
        if name not in self._outputs:
            raise RegraphError("RG_E_NAME", f"there is no output '{name}'; expected one of "
                                            f"{', '.join(self._outputs)}")
        tensor, memory = self._outputs[name]
        array = np.empty(tensor.shape, arrays.NUMPY[tensor.dtype])
        memory.read(array)
        return array

    def step(self) -> list[tuple[Request, int]]:
        """One step: (request, its next token) of all that got one. What fails in it is raised; the
        step is as if it had not been, and may be called again. So it may after KeyboardInterrupt,
        which loses no token: where the step had run, the next call says what came of it."""
        start, queue = time.perf_counter(), self.queue
        if self._begun:
            self._settle()
        if not self._told:
            self._begun = self._steps, []
            try:
                rows = queue.step()
                if rows:
                    self._run(rows)
                    self._begun[1].extend(self._drawn())
                    queue.done(self._next)
                else:  # but what was being cancelled
                    self._requests.clear()
            finally:
                self._settle()
        self._seconds += time.perf_counter() - start
        got, self._told = self._told, []
        return got

    def _drawn(self):
        """[(slot, request, how many tokens it has, its next)] of the step that ran."""
        queue, got, logits = self.queue, [], None
        for slot in np.flatnonzero(queue.wanted[:queue.used]).tolist():
            request = self._requests.get(int(queue.request[slot]))
            if request is None or request.state != "live":  # nobody waits for it
                queue.last[slot] = True
                continue
            if request.sampling.temperature or "next" not in self._outputs:
                if logits is None:
                    logits = self.output("logits")
                self._next[slot] = draw(arrays.float32(logits[slot]), request.sampling,
                                        len(request.prompt) + len(request.tokens))
            token = int(self._next[slot])
            queue.last[slot] = token < 0 or token in request.stop
            got.append((slot, request, len(request.tokens), token))
        return got

    def _settle(self):
        """The step that was begun is over, whatever became of it. An interrupt may come anywhere,
        here as well: this then runs again, and the queue knows whether the step was done."""
        queue, steps, (before, got) = self.queue, self.queue.steps(), self._begun
        if steps == before:
            queue.undo()
            got = []
        told, last = [], queue.last.tolist()
        for slot, request, at, token in got:
            if token >= 0:
                if len(request.tokens) == at:
                    request.tokens.append(token)
                told.append((request, token))
            if last[slot]:
                request.state = "finished" if token >= 0 else "failed"
                self._requests.pop(request.number, None)
        self._told = told
        self._steps = steps
        self._begun = None  # last: what stands above may run again

    def steps(self) -> Iterator[tuple[Request, int]]:
        """(request, token) as they come, until nobody is left. Requests may be added and cancelled
        in between."""
        while self._requests or self._begun or self._told:
            yield from self.step()

    def stream(self, request: Request) -> Iterator[int]:
        """This one's tokens from the first on; others are served beside it."""
        said = 0
        while True:
            while said < len(request.tokens):
                yield request.tokens[said]
                said += 1
            if request.state != "live":
                return
            self._live(request)
            self.step()

    def stats(self) -> Stats:
        """Counts so far, and times."""
        stats = self.queue.stats()
        return Stats(**{**stats.__dict__, "seconds": self._seconds,
                        "host_seconds": self._seconds - self._ran})
