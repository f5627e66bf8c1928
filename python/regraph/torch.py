"""regraph for PyTorch.

    import regraph.torch
    attend = regraph.torch.attention("nsa.json", policy={"regraph_policy": 1, "preset": "all"}, H=64, KH=4)
    o = attend(q, k, v, gate, cu_seqlens)      # or attend(q=q, …); differentiable

What happens: the tensors' shapes and types pick a plan (made once each), torch's allocator supplies its saved block, which
lives until backward is done with it, and its scratch, which lives for the call; the steps are enqueued on the current
stream. Nothing waits for the GPU, and cu_seqlens stays there. Any number of calls may be in flight, streams may be captured
after one run of the same shapes, and torch.compile sees two operators, regraph::forward and regraph::backward (a plan has
fixed shapes, so it specialises on them).

How it is built: a Program (spec, policy, parameters) makes a Variant for each set of shapes, types and wanted gradients: its
plan and idle sessions. An operator names its program by a key, since operators take no objects. The backward operator needs
nothing but its arguments: any session of the variant adopts the saved block.
"""

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import List, Sequence

import torch

from . import _lib, core
from .errors import RegraphError

VARIANTS = 256  # plans a program keeps, least recently used go first
_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
_programs = {}


# ---- memory and streams ----


def _block(size, device):
    """A block of at least one byte on a 256-byte boundary."""
    size = max(size, 1)
    if device.type == "cuda":
        return torch.empty(size, dtype=torch.uint8, device=device)  # torch aligns to 512
    memory = bytearray(size + 255)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return torch.frombuffer(memory, dtype=torch.uint8, offset=-address % 256, count=size)


def _aligned(tensor, alignment):
    """The tensor, dense and at an address that the library takes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()


def _on(device):
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---- programs and their variants ----


class Variant:
    """A plan for one set of shapes, with its idle sessions."""

    def __init__(self, plan, device, eager):
        self.plan, self.device, self.eager = plan, device, eager
        self.inputs, self.outputs, self.grads_in, self.grads_out = (plan.of_role(role) for role in range(4))
        self.align = 16 if device.type == "cuda" else 4
        self._idle = {}  # stream → sessions; taking and giving back are atomic
        self.captured = False  # a captured graph refers to a session's memory

    def _take(self, stream, saved, scratch):
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        own = self._idle.setdefault(stream, [])
        for idle in [own, *self._idle.values()] if capturing else [own]:
            try:
                session = idle.pop()
            except IndexError:
                continue
            self.captured |= capturing
            return session
        if capturing:
            raise RegraphError("RG_E_USAGE", "the stream is being captured, and this is the first run of these shapes; "
                                             "run once before the capture")
        return core.Session(self.plan, saved=saved.data_ptr(), scratch=scratch.data_ptr(), eager=self.eager)

    def run(self, backward, bindings, saved):
        """Binds (tensor info, tensor) pairs and runs on the current stream."""
        with _on(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
            scratch = _block(self.plan.sizes.scratch, self.device)
            session = self._take(stream, saved, scratch)
            try:
                if self.device.type == "cuda":
                    session.set_stream(stream)
                session.bind_scratch(scratch.data_ptr())
                for info, tensor in bindings:
                    session.bind(info.role, info.name, tensor.data_ptr(), tensor.nbytes)
                if backward:
                    session.adopt_saved(saved.data_ptr())
                    session.run_backward()
                else:
                    session.bind_saved(saved.data_ptr())
                    session.run_forward()
                session.forget_saved(saved.data_ptr())
            finally:
                self._idle[stream].append(session)

    def synchronize(self):
        for sessions in list(self._idle.values()):
            for session in list(sessions):
                session.synchronize()


class Program:
    """A spec, a policy and parameters."""

    def __init__(self, text, name, policy, eager, options, params):
        self.name, self.params, self.eager, self.options = name, params, eager, options
        self.policy = core.Policy(policy) if policy is not None else None
        spec = core.Spec(text, name=name, **params)  # complaints about the file as it stands come first
        spec.check(self.policy)
        self.spec = json.loads(text)
        self.inputs = tuple(t.name for t in spec.tensors if t.role == _lib.INPUT)
        self.outputs = tuple(t.name for t in spec.tensors if t.role == _lib.OUTPUT)
        self.seqlens = tuple(t.name for t in spec.tensors if t.role == _lib.INPUT and t.seqlens)
        grads = {name: self.spec["inputs"][name].get("grad", False) for name in self.inputs}
        self.differentiable = frozenset(name for name in self.inputs if grads[name])
        self.accumulating = frozenset(name for name in self.inputs if grads[name] == "accumulate")
        self._variants, self._lock = OrderedDict(), threading.Lock()

    def variant(self, wanted, tensors):
        """The plan for these inputs with gradients of the inputs in `wanted` ("q,k,v"); tensors may be fake."""
        device = tensors[0].device
        shapes = tuple(tuple(int(extent) for extent in tensor.shape) for tensor in tensors)
        key = (wanted, device, shapes, tuple(tensor.dtype for tensor in tensors))
        with self._lock:
            if key in self._variants:
                self._variants.move_to_end(key)
            else:
                self._variants[key] = self._make(wanted, device, shapes, tensors)
                for old in list(self._variants) if len(self._variants) > VARIANTS else ():
                    if not self._variants[old].captured:
                        del self._variants[old]
                        break
            return self._variants[key]

    def _make(self, wanted, device, shapes, tensors):
        if device.type not in ("cpu", "cuda"):
            raise RegraphError("RG_E_DEVICE", f"{self.name}: no device '{device.type}'; expected cpu or cuda tensors")
        params = dict(self.params)
        spec = dict(self.spec, inputs={})
        for name, tensor in zip(self.inputs, tensors):
            entry = spec["inputs"][name] = dict(self.spec["inputs"][name])
            if name not in wanted.split(","):
                entry.pop("grad", None)
            elif "grad" not in entry:
                entry["grad"] = True
            parameter = str(entry["dtype"])
            if parameter.startswith("$") and tensor.dtype in _NAMES:
                params.setdefault(parameter[1:], _NAMES[tensor.dtype])  # the tensors say what the caller did not
        loaded = core.Spec(spec, name=self.name, **params)
        dims = loaded.solve(dict(zip(self.inputs, shapes)))
        with _on(device) if torch.cuda.is_available() else contextlib.nullcontext():
            plan = core.Plan(loaded, self.policy, device=device.type, **self.options, **dims)
        variant = Variant(plan, device, self.eager)
        for info, shape, tensor in zip(variant.inputs, shapes, tensors):
            if tensor.device != device:
                raise RegraphError("RG_E_DEVICE", f"{self.name}: the input '{info.name}' is on {tensor.device}; "
                                                  f"expected {device}, where '{self.inputs[0]}' is")
            if tensor.dtype != _TORCH[info.dtype]:
                raise RegraphError("RG_E_DTYPE", f"{self.name}: the input '{info.name}' holds {tensor.dtype}; expected "
                                                 f"{_TORCH[info.dtype]}")
            if shape != info.shape:
                raise RegraphError("RG_E_SHAPE", f"{self.name}: the input '{info.name}' has shape {shape}; expected "
                                                 f"{info.shape}")
        return variant


# ---- running ----


def _new(info, device, zeroed=False):
    make = torch.zeros if zeroed else torch.empty
    return make(info.shape, dtype=_TORCH[info.dtype], device=device)


def _run_forward(program, wanted, inputs):
    """Outputs, then the saved block."""
    variant = _programs[program].variant(wanted, inputs)
    outputs = [_new(info, variant.device) for info in variant.outputs]
    saved = _block(variant.plan.sizes.saved, variant.device)
    inputs = [_aligned(tensor, variant.align) for tensor in inputs]
    variant.run(False, [*zip(variant.inputs, inputs), *zip(variant.outputs, outputs)], saved)
    return [*outputs, saved]


def _run_backward(program, wanted, inputs, outputs, saved, grads, results):
    """Writes (or adds, as the spec has it) the gradients of the inputs in `wanted` to `results`."""
    variant = _programs[program].variant(wanted, inputs)
    inputs = [_aligned(tensor, variant.align) for tensor in inputs]
    outputs = [_aligned(tensor, variant.align) for tensor in outputs]
    grads = [_aligned(tensor, variant.align) for tensor in grads]
    if saved.data_ptr() % 256:  # moved by someone: a clone, or back from the host
        saved = _block(saved.numel(), variant.device).copy_(saved)
    variant.run(True, [*zip(variant.inputs, inputs), *zip(variant.outputs, outputs), *zip(variant.grads_in, grads),
                       *zip(variant.grads_out, results)], saved)


def _differentiate(run, call, inputs, outputs, saved, grads):
    """The gradient of each input, or None, by `run`, which is _run_backward or the operator made of it."""
    program = _programs[call.program]
    variant = program.variant(call.wanted, inputs)
    arrived = {name: (grad, like) for name, grad, like in zip(program.outputs, grads, outputs)}
    incoming = [torch.zeros_like(like) if grad is None else grad
                for grad, like in (arrived[info.name] for info in variant.grads_in)]
    running = dict(zip(call.accumulated.split(","), call.accumulators))
    results = {info.name: running[info.name] if info.name in running else _new(info, saved.device, info.accumulates)
               for info in variant.grads_out}
    run(call.program, call.wanted, inputs, outputs, saved, incoming, list(results.values()))
    gradients = [None if name in running else results.get(name) for name in program.inputs]
    return [g if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, inputs)]


# ---- eager ----


class _Run(torch.autograd.Function):
    """What the operators below do, without their dispatch."""

    @staticmethod
    def forward(ctx, program, wanted, accumulated, accumulators, *inputs):
        *outputs, saved = _run_forward(program, wanted, inputs)
        ctx.program, ctx.wanted, ctx.accumulated, ctx.accumulators = program, wanted, accumulated, accumulators
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*inputs, *outputs, saved)
        ctx.mark_non_differentiable(*(tensor for tensor in outputs if not tensor.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        *tensors, saved = ctx.saved_tensors
        inputs, outputs = tensors[: ctx.inputs], tensors[ctx.inputs:]
        return None, None, None, None, *_differentiate(_run_backward, ctx, inputs, outputs, saved, grads)


def _traced(tensors):
    """Is someone looking on (torch.compile, fake tensors, make_fx …) who must see an operator?"""
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            or any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors))


# ---- the operators ----


@torch.library.custom_op("regraph::forward", mutates_args=())
def _forward(program: str, wanted: str, accumulated: str, inputs: Sequence[torch.Tensor],
             accumulators: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Returns the outputs and the saved block. What is accumulated, and where, only matters to the backward."""
    return _run_forward(program, wanted, inputs)


@_forward.register_fake
def _(program, wanted, accumulated, inputs, accumulators):
    variant = _programs[program].variant(wanted, inputs)
    saved = inputs[0].new_empty(max(variant.plan.sizes.saved, 1), dtype=torch.uint8)
    return [*(inputs[0].new_empty(info.shape, dtype=_TORCH[info.dtype]) for info in variant.outputs), saved]


@torch.library.custom_op("regraph::backward", mutates_args={"results"})
def _backward(program: str, wanted: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor],
              saved: torch.Tensor, grads: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
    _run_backward(program, wanted, inputs, outputs, saved, grads, results)


@_backward.register_fake
def _(program, wanted, inputs, outputs, saved, grads, results):
    return None


def _setup(ctx, inputs, output):
    ctx.program, ctx.wanted, ctx.accumulated, tensors, ctx.accumulators = inputs
    ctx.inputs = len(tensors)
    # The accumulators stay attributes, since another call's backward may add to them before ours.
    ctx.save_for_backward(*tensors, *output)


def _operator_backward(ctx, grads):
    *tensors, saved = ctx.saved_tensors
    inputs, outputs = tensors[: ctx.inputs], tensors[ctx.inputs:]
    gradients = _differentiate(_backward, ctx, inputs, outputs, saved, grads[:-1])
    return None, None, None, gradients, [None] * len(ctx.accumulators)


_forward.register_autograd(_operator_backward, setup_context=_setup)


# ---- what users call ----


class Attention:
    """A program as a function of tensors: by position in the order of the spec's inputs, or by name.

    Returns the output, or {name: output} where the spec has several. An input of sequence starts may be left out: then all
    tokens are one sequence. A weight whose gradient the spec accumulates is added to its `main_grad` (float32, of its shape)
    where it has one, and otherwise gets an ordinary gradient.
    """

    def __init__(self, text, name, policy, eager, options, params):
        self._made_of = text, name, policy, eager, options, params
        identity = json.dumps([text, policy, eager, {n: str(v) for n, v in options.items()}, params], sort_keys=True)
        self.key = f"{Path(name).stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        if self.key not in _programs:
            _programs[self.key] = Program(*self._made_of)
        self._program = _programs[self.key]

    def __reduce__(self):  # models are copied and pickled; the program is found or made again
        return Attention, self._made_of

    def __repr__(self):
        return f"regraph.torch.attention({self.key})"

    def _arrange(self, args, named):
        program = self._program
        if len(args) > len(program.inputs):
            raise RegraphError("RG_E_USAGE", f"{program.name}: {len(args)} tensors; expected {', '.join(program.inputs)}")
        tensors = dict(zip(program.inputs, args))
        for name, tensor in named.items():
            if name not in program.inputs or name in tensors:
                raise RegraphError("RG_E_USAGE", f"{program.name}: '{name}' is {'given twice' if name in tensors else 'no input'}"
                                                 f"; expected {', '.join(program.inputs)}")
            tensors[name] = tensor
        first = tensors.get(program.inputs[0])
        for name in program.inputs:
            tensor = tensors.get(name)
            if tensor is None and name in program.seqlens and first is not None:
                length = first.shape[0]
                tensor = torch.arange(0, 2 * length, length, dtype=torch.int32, device=first.device)
            if tensor is None:
                raise RegraphError("RG_E_USAGE", f"{program.name}: the input '{name}' is missing")
            tensors[name] = tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor
        return [tensors[name] for name in program.inputs]

    def __call__(self, *args, **named):
        program = self._program
        tensors = self._arrange(args, named)
        wanted, accumulated, accumulators = [], [], []
        for name, tensor in zip(program.inputs, tensors):
            if not (tensor.requires_grad and torch.is_grad_enabled()):
                continue
            if name not in program.differentiable:
                raise RegraphError("RG_E_USAGE", f"{program.name}: the input '{name}' requires a gradient, which the spec "
                                                 'does not ask for; say "grad": true there, or detach it')
            wanted.append(name)
            main_grad = getattr(tensor, "main_grad", None) if name in program.accumulating else None
            if main_grad is not None:
                if main_grad.dtype != torch.float32 or main_grad.shape != tensor.shape or not main_grad.is_contiguous():
                    raise RegraphError("RG_E_USAGE", f"{program.name}: main_grad of '{name}' is {main_grad.dtype} of shape "
                                                     f"{tuple(main_grad.shape)}; expected contiguous float32 of shape "
                                                     f"{tuple(tensor.shape)}")
                accumulated.append(name)
                accumulators.append(main_grad)
        call = self.key, ",".join(wanted), ",".join(accumulated)
        if _traced(tensors):
            outputs = _forward(*call, tensors, accumulators)[:-1]
        elif wanted:
            outputs = _Run.apply(*call, accumulators, *tensors)
        else:
            outputs = _run_forward(self.key, "", tensors)[:-1]
        return outputs[0] if len(outputs) == 1 else dict(zip(program.outputs, outputs))

    def plan(self, *args, **named):
        """The core.Plan that a call with these tensors (and their requires_grad) uses: sizes, reports."""
        tensors = self._arrange(args, named)
        wanted = [name for name, t in zip(self._program.inputs, tensors) if t.requires_grad and torch.is_grad_enabled()]
        return self._program.variant(",".join(wanted), tensors).plan

    def times(self, *args, **named):
        """[(node, op, backward?, ms, roofline ms)] of the last run with these tensors, of an `eager` attention: its backward's
        steps are the last run's if that was one."""
        plan = self.plan(*args, **named)
        for variant in list(self._program._variants.values()):
            if variant.plan is plan:
                variant.synchronize()
                return next(iter(s for sessions in variant._idle.values() for s in reversed(sessions))).times()
        return []

    def synchronize(self):
        """Waits for this program's runs and raises what went wrong in them, such as lengths that broke a rule (the next call
        would raise it too)."""
        for variant in list(self._program._variants.values()):
            variant.synchronize()


def attention(spec, policy=None, *, threads=0, profile=None, no_lanes=False, no_fuse=False, eager=False, **params):
    """Makes an Attention of a spec and a policy (paths, dicts or JSON text; "all", "6GiB"). `params` override the spec's parameters; one that
    names an input's dtype follows the tensors where it is not given. `eager` launches step by step and times each (see
    `times`). Equal arguments share plans."""
    text, name = core.read_source(spec)
    policy = core.read_policy(policy)[0] if policy is not None else None
    options = {"threads": threads, "profile": profile, "no_lanes": no_lanes, "no_fuse": no_fuse}
    return Attention(text, name, policy, eager, options, params)


class Module(torch.nn.Module):
    """`attention` as a module without parameters."""

    def __init__(self, spec, policy=None, **options):
        super().__init__()
        self.attention = attention(spec, policy, **options)

    def forward(self, *args, **named):
        return self.attention(*args, **named)

    def extra_repr(self):
        return self.attention.key
