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
import re
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


def _program(made_of):
    """The program that an operator names: by everything it is made of, so that an exported graph
    finds it in another process, too."""
    if made_of not in _programs:
        _programs[made_of] = Program(**json.loads(made_of))
    return _programs[made_of]


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
                at = {(info.role, info.name): tensor.data_ptr() for info, tensor in bindings}
                addresses = [at.get((info.role, info.name)) for info in self.plan.tensors]
                session.run(backward, addresses, saved.data_ptr(), scratch.data_ptr())
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
        self.floating = tuple(t.name for t in spec.tensors
                              if t.role == _lib.OUTPUT and t.dtype != "i32")
        self.seqlens = tuple(t.name for t in spec.tensors if t.role == _lib.INPUT and t.seqlens)
        grads = {name: self.spec["inputs"][name].get("grad", False) for name in self.inputs}
        self.differentiable = frozenset(name for name in self.inputs if grads[name])
        self.accumulating = frozenset(name for name in self.inputs if grads[name] == "accumulate")
        self._variants, self._lock = OrderedDict(), threading.Lock()
        self._asked = {}  # shapes as given → the key of their variant
        self.exact = self.options.pop("exact", False) or not self._counts_rows()

    def _counts_rows(self):
        """Finds the token axis: a free name that is the first axis of inputs and nothing else, beside
        lengths of sequences. Then a plan for more rows than there are serves."""
        free = {}  # name → which inputs use it how
        for name in self.inputs:
            for axis, extent in enumerate(self.spec["inputs"][name]["shape"]):
                for word in re.findall(r"[A-Za-z_]\w*", str(extent)):
                    if word not in self.spec.get("params", {}) and word not in self.params:
                        free.setdefault(word, []).append((name, axis, str(extent)))
        rows = [word for word, uses in free.items()
                if all(axis == 0 and extent == word for _, axis, extent in uses)]
        others = [word for word in free if word not in rows]
        if len(rows) != 1 or not self.seqlens or any(
                name not in self.seqlens or extent != f"{word}+1"
                for word in others for name, _, extent in free[word]):
            return False
        self.rows = frozenset(name for name, _, _ in free[rows[0]])
        self._bound = [{rows[0]: n, **dict.fromkeys(others, 1)} for n in (1024, 2048)]
        few, more = (self._outputs(bound) for bound in self._bound)
        return all(a[1:] == b[1:] and (a[:1], b[:1]) == ((1024,), (2048,))
                   for (_, a), (_, b) in zip(few, more))

    def _outputs(self, bound, tensors=()):
        spec = core.Spec(self.spec, name=self.name, **self._params(tensors), **bound)
        return [(t.dtype, t.shape) for t in spec.tensors if t.role == _lib.OUTPUT]

    def like(self, tensors):
        """Type and shape of each output but for its rows, for inputs of the tensors' types."""
        return [(dtype, shape[1:]) for dtype, shape in self._outputs(self._bound[0], tensors)]

    def dtype_of(self, name):
        """The type that the spec or the caller names for an input; None: it follows the tensor."""
        said = str(self.spec["inputs"][name]["dtype"])
        return self.params.get(said[1:]) if said.startswith("$") else said

    def _params(self, tensors):
        """The parameters, with those that the tensors say and the caller did not."""
        params = dict(self.params)
        for name, tensor in zip(self.inputs, tensors):
            parameter = str(self.spec["inputs"][name]["dtype"])
            if parameter.startswith("$") and tensor.dtype in _NAMES:
                params.setdefault(parameter[1:], _NAMES[tensor.dtype])
        return params

    def capacities(self, shapes):
        """The shapes of the plan that serves inputs of these shapes."""
        if self.exact:
            return shapes
        return tuple((_room(shape[0]), *shape[1:]) if name in self.rows else
                     (_room(shape[0] - 1, 0) + 1,) if name in self.seqlens and len(shape) == 1
                     else shape for name, shape in zip(self.inputs, shapes))

    def variant(self, wanted, tensors):
        """The plan for these inputs with gradients of the inputs in `wanted` ("q,k,v"); tensors may be fake."""
        device = tensors[0].device
        given = tuple([tuple(map(int, tensor.shape)) for tensor in tensors])
        threads = torch.get_num_threads() if device.type == "cpu" else 0
        asked = (wanted, device, given, tuple([tensor.dtype for tensor in tensors]), threads)
        with self._lock:
            if asked in self._asked:
                key = self._asked[asked]
                self._variants.move_to_end(key)
                return self._variants[key]
        for name, shape in zip(self.inputs, given):
            entry = self.spec["inputs"][name]["shape"]
            if len(shape) != len(entry):
                raise RegraphError(
                    "RG_E_RANK", f"{self.name}: the input '{name}' has {len(shape)} axes {shape}; "
                    f"expected {len(entry)} [{', '.join(map(str, entry))}]; regraph.torch.pack makes "
                    "packed tensors and cu_seqlens of batches")
        shapes = self.capacities(given)
        key = (wanted, device, shapes, asked[3], threads)
        with self._lock:
            if key in self._variants:
                self._variants.move_to_end(key)
            else:
                self._variants[key] = self._make(wanted, device, shapes, tensors, threads)
                for old in list(self._variants) if len(self._variants) > VARIANTS else ():
                    if not self._variants[old].captured:
                        del self._variants[old]
                        self._asked.clear()
                        break
            if len(self._asked) < 16 * VARIANTS:
                self._asked[asked] = key
            return self._variants[key]

    def _make(self, wanted, device, shapes, tensors, threads):
        if device.type not in ("cpu", "cuda"):
            raise RegraphError("RG_E_DEVICE", f"{self.name}: no device '{device.type}'; expected cpu or cuda tensors")
        spec = dict(self.spec, inputs={})
        for name in self.inputs:
            entry = spec["inputs"][name] = dict(self.spec["inputs"][name])
            if name not in wanted.split(","):
                entry.pop("grad", None)
            elif "grad" not in entry:
                entry["grad"] = True
        loaded = core.Spec(spec, name=self.name, **self._params(tensors))
        dims = loaded.solve(dict(zip(self.inputs, shapes)))
        with _on(device) if torch.cuda.is_available() else contextlib.nullcontext():
            options = {**self.options, "threads": self.options["threads"] or threads}
            plan = core.Plan(loaded, self.policy, device=device.type, **options, **dims)
            if plan.sizes.host:
                raise RegraphError("RG_E_POLICY", "tensors are offloaded by sessions of one's own only, not under autograd; "
                                                  "take \"offload\" out of the policy")
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


def _room(count, step=3):
    """The capacity that `count` is given: at most an eighth more (step 3), or the next power of two
    (step 0), so that few plans serve all lengths."""
    unit = 1 << max((count - 1).bit_length() - 1 - step + (step == 0), 0) if count > 1 else 1
    return -(-count // unit) * unit


def _fit(tensor, shape, alignment, starts=False):
    """The tensor, dense, aligned and with as many rows as the plan has: zeros, or where it holds
    starts of sequences, empty sequences."""
    if tuple(tensor.shape) == shape:
        return _aligned(tensor, alignment)
    wide = tensor.new_empty(shape)
    wide[: tensor.shape[0]] = tensor
    wide[tensor.shape[0]:] = tensor[-1:] if starts else 0
    return wide


def _fit_inputs(variant, inputs):
    return [(info, _fit(tensor, info.shape, variant.align, info.seqlens))
            for info, tensor in zip(variant.inputs, inputs)]


def _run_forward(program, wanted, inputs):
    """Outputs, then the saved block."""
    program = _program(program)
    variant = program.variant(wanted, inputs)
    outputs = [torch.empty(info.shape, dtype=_TORCH[info.dtype], device=variant.device)
               for info in variant.outputs]
    saved = _block(variant.plan.sizes.saved, variant.device)
    variant.run(False, [*_fit_inputs(variant, inputs), *zip(variant.outputs, outputs)], saved)
    if not program.exact:
        rows = next(t.shape[0] for n, t in zip(program.inputs, inputs) if n in program.rows)
        outputs = [output[:rows] for output in outputs]
    return [*outputs, saved]


def _run_backward(program, wanted, inputs, outputs, saved, grads, results):
    """Writes (or adds, as the spec has it) the gradients of the inputs in `wanted` to `results`."""
    program = _program(program)
    variant = program.variant(wanted, inputs)
    if saved.data_ptr() % 256:  # moved by someone: a clone, or back from the host
        saved = _block(saved.numel(), variant.device).copy_(saved)
    bindings = _fit_inputs(variant, inputs)
    bindings += [(info, _fit(tensor, info.shape, variant.align))
                 for info, tensor in zip(variant.outputs, outputs)]
    arrived = dict(zip(program.floating, grads))
    bindings += [(info, _fit(arrived[info.name], info.shape, variant.align))
                 for info in variant.grads_in]
    planned = {info.name: info for info in variant.grads_out}
    short = []
    for name, result in zip(wanted.split(","), results):
        info = planned.get(name)
        if info is None:  # nothing depends on it
            result.zero_()
        elif tuple(result.shape) == info.shape and result.data_ptr() % variant.align == 0:
            bindings.append((info, result))
        else:
            wide = (_fit(result, info.shape, variant.align) if info.accumulates
                    else result.new_empty(info.shape))
            short.append((result, wide))
            bindings.append((info, wide))
    variant.run(True, bindings, saved)
    for result, wide in short:
        result.copy_(wide[: result.shape[0]])


def _differentiate(run, call, inputs, outputs, saved, grads):
    """The gradient of each input, or None, by `run`: _run_backward or the operator made of it."""
    program = _program(call.program)
    incoming = [torch.zeros_like(like) if grad is None else grad
                for grad, like in zip(grads, outputs) if like.is_floating_point()]
    running = dict(zip(call.accumulated.split(","), call.accumulators))
    results = {}
    for name, tensor in zip(program.inputs, inputs):
        if name in running:
            results[name] = running[name]
        elif name in call.wanted.split(","):
            adds = name in program.accumulating
            make, dtype = (torch.zeros, torch.float32) if adds else (torch.empty, tensor.dtype)
            results[name] = make(tensor.shape, dtype=dtype, device=tensor.device)
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
    made = _program(program)
    if made.exact or all(isinstance(extent, int) for tensor in inputs for extent in tensor.shape):
        size = max(made.variant(wanted, inputs).plan.sizes.saved, 1)
    else:  # the capacity is chosen when the operator runs
        size = torch.library.get_ctx().new_dynamic_size()
    if made.exact:
        like = [(info.dtype, info.shape) for info in made.variant(wanted, inputs).outputs]
    else:
        rows = next(t.shape[0] for n, t in zip(made.inputs, inputs) if n in made.rows)
        like = [(dtype, (rows, *shape)) for dtype, shape in made.like(inputs)]
    outputs = [inputs[0].new_empty(shape, dtype=_TORCH[dtype]) for dtype, shape in like]
    return [*outputs, inputs[0].new_empty(size, dtype=torch.uint8)]


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


def _refuse(name, tensors):
    """Says what to do instead where torch would fail inside an operator."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RegraphError("RG_E_USAGE", f"{name}: vmap and torch.func do not go through it; pack a "
                           "batch along the tokens (regraph.torch.pack) and use torch.autograd")
    if any(type(tensor).__name__ == "DTensor" for tensor in tensors):
        raise RegraphError("RG_E_USAGE", f"{name}: the inputs are DTensors; where heads are sharded, "
                           "call with each .to_local() and this rank's H and KH, and wrap the result "
                           "with DTensor.from_local")


def pack(*tensors, mask=None, heads_first=False):
    """Packs batches [B, S, …] (or [B, heads, S, …] with `heads_first`) along the tokens: returns each
    as [T, …], then cu_seqlens. `mask` [B, S] says which tokens are there; None: all of them."""
    if heads_first:
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    batch, length = tensors[0].shape[:2]
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    if mask is None:
        starts = torch.arange(batch + 1, device=tensors[0].device) * length
    else:
        kept = mask.bool()
        there = kept.flatten().nonzero().squeeze(1)
        flat = [tensor.index_select(0, there) for tensor in flat]
        starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return *flat, starts.to(torch.int32)


def unpack(tensor, like, heads_first=False):
    """The reverse of `pack` for a result [T, …]: [B, S, …]. `like` is the mask, where there was one, or
    B; tokens that the mask leaves out are zero."""
    if isinstance(like, torch.Tensor):
        there = like.bool().flatten().nonzero().squeeze(1)
        wide = tensor.new_zeros(like.numel(), *tensor.shape[1:])
        batch = wide.index_copy(0, there, tensor[: len(there)]).unflatten(0, like.shape)
    else:
        batch = tensor.unflatten(0, (like, tensor.shape[0] // like))
    return batch.transpose(1, 2) if heads_first else batch


class Attention:
    """A program as a function of tensors: by position in the order of the spec's inputs, or by name.

    Returns the output, or {name: output} where the spec has several. An input of sequence starts may be left out: then all
    tokens are one sequence. A weight whose gradient the spec accumulates is added to its `main_grad` (float32, of its shape)
    where it has one, and otherwise gets an ordinary gradient.
    """

    def __init__(self, text, name, policy, eager, options, params):
        self._made_of = text, name, policy, eager, options, params
        fields = dict(text=text, name=name, policy=policy, eager=eager, options=options,
                      params=params)
        self.made_of = json.dumps(fields, sort_keys=True, default=str)
        digest = hashlib.sha256(self.made_of.encode()).hexdigest()[:16]
        self.key = f"{Path(name).stem}-{digest}"
        self._program = _program(self.made_of)

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
                last = torch.full((1,), length, dtype=torch.int32, device=first.device)
                tensor = torch.nn.functional.pad(last, (1, 0))
            if tensor is None:
                raise RegraphError("RG_E_USAGE", f"{program.name}: the input '{name}' is missing")
            tensors[name] = tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor
        return [tensors[name] for name in program.inputs]

    def _cast(self, tensors):
        """Under autocast floating inputs are cast: to autocast's type where the type follows the
        tensors, to the spec's where that names one."""
        kind = tensors[0].device.type
        if not torch.is_autocast_enabled(kind):
            return tensors
        program, to = self._program, torch.get_autocast_dtype(kind)
        cast = []
        for name, tensor in zip(program.inputs, tensors):
            dtype = _TORCH.get(program.dtype_of(name), to)
            cast.append(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return cast

    def __call__(self, *args, **named):
        program = self._program
        leaves = self._arrange(args, named)
        _refuse(program.name, leaves)
        tensors = self._cast(leaves)
        wanted, accumulated, accumulators = [], [], []
        for name, tensor, leaf in zip(program.inputs, tensors, leaves):
            if not (tensor.requires_grad and torch.is_grad_enabled()):
                continue
            if name not in program.differentiable:
                raise RegraphError("RG_E_USAGE", f"{program.name}: the input '{name}' requires a gradient, which the spec "
                                                 'does not ask for; say "grad": true there, or detach it')
            wanted.append(name)
            main_grad = getattr(leaf, "main_grad", None) if name in program.accumulating else None
            if main_grad is not None:
                if main_grad.dtype != torch.float32 or main_grad.shape != tensor.shape or not main_grad.is_contiguous():
                    raise RegraphError("RG_E_USAGE", f"{program.name}: main_grad of '{name}' is {main_grad.dtype} of shape "
                                                     f"{tuple(main_grad.shape)}; expected contiguous float32 of shape "
                                                     f"{tuple(tensor.shape)}")
                accumulated.append(name)
                accumulators.append(main_grad)
        call = self.made_of, ",".join(wanted), ",".join(accumulated)
        if _traced(tensors):
            outputs = _forward(*call, tensors, accumulators)[:-1]
        elif wanted:
            outputs = _Run.apply(*call, accumulators, *tensors)
        else:
            outputs = _run_forward(self.made_of, "", tensors)[:-1]
        return outputs[0] if len(outputs) == 1 else dict(zip(program.outputs, outputs))

    def plan(self, *args, **named):
        """The core.Plan that a call with these tensors (and their requires_grad) uses: sizes, reports."""
        tensors = self._cast(self._arrange(args, named))
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


def attention(spec, policy=None, *, threads=0, profile=None, no_lanes=False, no_fuse=False, eager=False,
              exact=False, **params):
    """Makes an Attention of a spec and a policy (paths, dicts or JSON text; "all", "6GiB"). `params` override the spec's parameters; one that
    names an input's dtype follows the tensors where it is not given. `eager` launches step by step and times each (see
    `times`). Equal arguments share plans."""
    text, name = core.read_source(spec)
    policy = core.read_policy(policy)[0] if policy is not None else None
    options = {"threads": threads, "profile": profile, "no_lanes": no_lanes,
               "no_fuse": no_fuse, "exact": exact}
    return Attention(text, name, policy, eager, options, params)


class Module(torch.nn.Module):
    """`attention` as a module. `parameters` names inputs of the spec that it keeps, as parameters of
    these names: biases start at 0, other vectors at 1, matrices as torch.nn.Linear's. Calls take the
    other inputs, by position or by name. `dtype` is the spec's parameter of that name, also as torch
    says it; where it is not given, parameters have torch's default type."""

    def __init__(self, spec, policy=None, *, parameters=(), dtype=None, device=None, **options):
        super().__init__()
        if dtype is not None:
            options["dtype"] = _NAMES.get(dtype, dtype)
        self.attention = attention(spec, policy, **options)
        program = self.attention._program
        shapes = {t.name: t.shape for t in core.Spec(program.spec, **program.params).tensors
                  if t.role == _lib.INPUT}
        self._biases = {tensor for node in program.spec["nodes"]
                        for port, tensor in node.get("in", {}).items()
                        if isinstance(tensor, str) and port in ("b", "bias")}
        for name in parameters:
            if name not in shapes or min(shapes[name], default=1) < 0:
                raise RegraphError(
                    "RG_E_USAGE", f"{program.name}: the parameter '{name}' is "
                    f"{'no input' if name not in shapes else 'an input of no fixed shape'}; expected "
                    f"some of {', '.join(n for n, s in shapes.items() if min(s, default=1) >= 0)}")
            said = program.dtype_of(name)
            value = torch.empty(shapes[name], dtype=_TORCH.get(said), device=device)
            self.register_parameter(name, torch.nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self):
        for name, value in self.named_parameters(recurse=False):
            if value.dim() > 1:
                bound = value.shape[-1] ** -0.5
                torch.nn.init.uniform_(value, -bound, bound)
            else:
                torch.nn.init.constant_(value, 0 if name in self._biases else 1)

    def forward(self, *args, **named):
        kept = dict(self.named_parameters(recurse=False))
        names = [name for name in self.attention._program.inputs if name not in kept]
        if len(args) > len(names):
            raise RegraphError("RG_E_USAGE", f"{self.attention._program.name}: {len(args)} tensors; "
                                             f"expected {', '.join(names)}")
        return self.attention(**dict(zip(names, args)), **named, **kept)

    def extra_repr(self):
        return self.attention.key
