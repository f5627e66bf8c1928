"""regraph for PyTorch.

    import regraph.torch
    attend = regraph.torch.attention("nsa.json", policy="all", H=64, KH=4)
    o = attend(q, k, v, gate, cu_seqlens)      # or attend(q=q, …); differentiable

What happens: the tensors' shapes and types pick a plan (made once each), torch's allocator supplies
its saved block, which lives until backward is done with it, and its scratch, which lives for the
call; the steps are enqueued on the current stream. Nothing waits for the GPU, and cu_seqlens stays
there. Any number of calls may be in flight, streams may be captured after one run of the same
shapes, and torch.compile sees two operators, regraph::forward and regraph::backward, for which T is
dynamic: the plan is chosen inside.

How it is built: programs.py has the plans, by shapes, and what runs them. Here stand the ways in: a
function of autograd where nobody looks on, and two operators where torch.compile and others do. An
operator names its program by a text, since operators take no objects. A backward needs nothing but
its arguments: any session of the plan adopts the saved block.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import List, Sequence

import torch

from . import _lib, core
from .errors import RegraphError
from .programs import DTYPES, NAMES, narrow, program_of
from .rows import (cp_capacity, cp_from_documents, cp_shard,  # noqa: F401 (users')
                   cp_to_documents, cp_unshard)

# ---- eager ----

def _differentiate(run, program, wanted, running, inputs, outputs, saved, grads):
    """The gradient of each input, or None, by `run`: a call's backward or the operator, each with
    what it takes as `saved`. `wanted` and `running` ({input: what its gradient is added to}) go by
    number."""
    incoming = [torch.zeros_like(like) if grad is None else grad
                for grad, like in zip(grads, outputs) if like.is_floating_point()]
    gradients, results = [None] * len(inputs), []
    for i in wanted:
        result = running.get(i)
        if result is None:
            tensor = inputs[i]
            if program.inputs[i] in program.accumulating:
                result = torch.zeros(tensor.shape, dtype=torch.float32, device=tensor.device)
            else:
                result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            gradients[i] = result
        results.append(result)
    run(inputs, outputs, saved, incoming, results)
    for i, name in enumerate(program.inputs):
        if gradients[i] is not None and name in program.accumulating:
            gradients[i] = gradients[i].to(inputs[i].dtype)
    return gradients


class _Run(getattr(torch.autograd.function, "_SingleLevelFunction", torch.autograd.Function)):
    """What the operators below do, without their dispatch."""

    @staticmethod
    def forward(ctx, call, running, same, *inputs):
        outputs, saved = call.forward(inputs, same)
        ctx.call, ctx.running, ctx.host = call, running, saved.host
        ctx.save_for_backward(*inputs, *outputs, saved)
        if call.integers:
            ctx.mark_non_differentiable(*[outputs[i] for i in call.integers])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        return (_backward_once if torch.is_grad_enabled() else _backward_eager)(ctx, *grads)


def _backward_eager(ctx, *grads):
    tensors, call = ctx.saved_tensors, ctx.call
    gradients = call.gradients(tensors, grads, ctx.host)
    if gradients is None:
        count = len(call.program.inputs)
        run = functools.partial(call.backward, host=ctx.host)
        gradients = _differentiate(run, call.program, call.wanted, ctx.running, tensors[:count],
                                   tensors[count:-1], tensors[-1], grads)
        call.learn_backward(tensors, grads)
    return None, None, None, *gradients


_backward_once = torch.autograd.function.once_differentiable(_backward_eager)


# ---- the operators ----

@torch.library.custom_op("regraph::forward", mutates_args=())
def _forward(program: str, wanted: str, accumulated: str, inputs: Sequence[torch.Tensor],
             accumulators: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Returns the outputs and the saved block, and where the policy may offload, the host block
    that goes with it. What is accumulated, and where, only matters to the backward."""
    made = program_of(program)
    try:
        outputs, saved = made.call(wanted, inputs).forward(inputs)
    except RegraphError as error:
        made.tell(error)
        raise
    if not made.offloads:
        return [*outputs, saved]
    size = made.call(wanted, inputs).variant.plan.sizes.host
    return [*outputs, saved, saved.host.tensor(size) if size else torch.empty(1, dtype=torch.uint8)]


@_forward.register_fake
def _(program, wanted, accumulated, inputs, accumulators):
    made = program_of(program)
    if made.exact or all(isinstance(extent, int) for tensor in inputs for extent in tensor.shape):
        sizes = made.variant(wanted, inputs).plan.sizes
        size, host = max(sizes.saved, 1), max(sizes.host, 1)
    else:  # the capacity is chosen when the operator runs
        size = torch.library.get_ctx().new_dynamic_size()
        host = torch.library.get_ctx().new_dynamic_size() if made.offloads else 1
    if made.exact:
        like = [(info.dtype, info.shape) for info in made.variant(wanted, inputs).outputs]
    else:
        rows = made.rows_of(inputs)
        like = [(dtype, (rows, *shape)) for dtype, shape in made.like(inputs)]
    outputs = [inputs[0].new_empty(shape, dtype=DTYPES[dtype]) for dtype, shape in like]
    kept = [inputs[0].new_empty(size, dtype=torch.uint8)]
    if made.offloads:
        kept.append(torch.empty(host, dtype=torch.uint8))
    return [*outputs, *kept]


@torch.library.custom_op("regraph::backward", mutates_args={"results"})
def _backward(program: str, wanted: str, inputs: Sequence[torch.Tensor],
              outputs: Sequence[torch.Tensor], kept: Sequence[torch.Tensor],
              grads: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
    """`kept`: the saved block, and the host block if the forward returned one."""
    call = program_of(program).call(wanted, inputs)
    host = call.variant.held(kept[1]) if len(kept) > 1 else None
    call.backward(inputs, outputs, kept[0], grads, results, host)


@_backward.register_fake
def _(program, wanted, inputs, outputs, kept, grads, results):
    return None


def _setup(ctx, inputs, output):
    ctx.program, ctx.wanted, ctx.accumulated, tensors, ctx.accumulators = inputs
    ctx.inputs = len(tensors)
    # The accumulators stay attributes, since another call's backward may add to them before ours.
    ctx.save_for_backward(*tensors, *output)


def _operator_backward(ctx, grads):
    program, tensors = program_of(ctx.program), ctx.saved_tensors
    made = ctx.inputs + len(program.outputs)
    inputs, outputs, kept = tensors[: ctx.inputs], tensors[ctx.inputs: made], tensors[made:]
    at = {name: i for i, name in enumerate(program.inputs)}
    running = {at[name]: sum_ for name, sum_ in zip(ctx.accumulated.split(","), ctx.accumulators)}
    wanted = [at[name] for name in ctx.wanted.split(",")]

    def run(inputs, outputs, kept, grads, results):
        _backward(ctx.program, ctx.wanted, inputs, outputs, kept, grads, results)

    gradients = _differentiate(run, program, wanted, running, inputs, outputs, kept,
                               grads[: len(outputs)])
    return None, None, None, gradients, [None] * len(ctx.accumulators)


_forward.register_autograd(_operator_backward, setup_context=_setup)


# ---- what users call ----


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def _watched():
    """Is someone looking on (torch.compile, fake tensors, make_fx, torch.func …) who must see an
    operator?"""
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None)


def _refuse(name):
    """Says what to do instead where torch would fail inside an operator."""
    transforms = torch._C._functorch.peek_interpreter_stack
    if not torch.compiler.is_compiling() and transforms() is not None:
        raise RegraphError("RG_E_USAGE", f"{name}: vmap and torch.func do not go through it; pack "
                           "a batch along the tokens (regraph.torch.pack) and use torch.autograd")


def _kept(mask, name):
    """Of a mask, which tokens are there. One of floats is refused: most of those are to be added to
    scores, 0 where a token is and -inf where none is, and would be taken for their reverse."""
    if mask.is_floating_point():
        raise RegraphError("RG_E_DTYPE", f"{name}: a mask of {str(mask.dtype).split('.')[1]}; "
                           "expected bool or integers, 1 where a token is: mask == 0 of one that "
                           "is added to scores, mask != 0 of one that holds ones")
    return mask.bool()


def pack(*tensors: torch.Tensor, mask: torch.Tensor | None = None,
         heads_first: bool = False) -> tuple[torch.Tensor, ...]:
    """Packs batches [B, S, …] (or [B, heads, S, …] with `heads_first`) along the tokens: returns
    each as [T, …], then cu_seqlens. `mask` [B, S] of bool or integers says which tokens are there
    (1 or True); None: all."""
    if heads_first:
        tensors = tuple(tensor.transpose(1, 2) for tensor in tensors)
    batch, length = tensors[0].shape[:2]
    for what, given in (*(("tensor", tensor) for tensor in tensors), ("mask", mask)):
        if given is not None and (given.shape if what == "mask" else given.shape[:2]) != \
                (batch, length):
            raise RegraphError("RG_E_SHAPE", f"pack: a {what} of shape {tuple(given.shape)}; "
                                             f"expected {batch} sequences of {length} tokens")
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    if mask is None:
        starts = torch.arange(batch + 1, device=tensors[0].device) * length
    else:
        kept = _kept(mask, "pack")
        there = kept.flatten().nonzero().squeeze(1)
        flat = [tensor.index_select(0, there) for tensor in flat]
        starts = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return *flat, starts.to(torch.int32)


def unpack(tensor: torch.Tensor, like: torch.Tensor | int,
           heads_first: bool = False) -> torch.Tensor:
    """The reverse of `pack` for a result [T, …]: [B, S, …]. `like` is the mask, where there was
    one, or B; tokens that the mask leaves out are zero."""
    if isinstance(like, torch.Tensor):
        there = _kept(like, "unpack").flatten().nonzero().squeeze(1)
        wide = tensor.new_zeros(like.numel(), *tensor.shape[1:])
        batch = wide.index_copy(0, there, tensor[: len(there)]).unflatten(0, like.shape)
    else:
        batch = tensor.unflatten(0, (like, tensor.shape[0] // like))
    return batch.transpose(1, 2) if heads_first else batch


class Attention:
    """A program as a function of tensors: by position in the order of the spec's inputs, or by
    name.

    Returns the output, or {name: output} where the spec has several. An input of sequence starts
    may be left out: then all tokens are one sequence. A weight whose gradient the spec accumulates
    is added to its `main_grad` (float32, of its shape) where it has one, and otherwise gets an
    ordinary gradient.
    """

    def __init__(self, text, name, policy, eager, options, params):
        self._made_of = text, name, policy, eager, options, params
        fields = dict(text=text, name=name, policy=policy, eager=eager, options=options,
                      params=params)
        self.made_of = json.dumps(fields, sort_keys=True, default=str)
        digest = hashlib.sha256(self.made_of.encode()).hexdigest()[:16]
        self.key = f"{Path(name).stem}-{digest}"
        self._program = program_of(self.made_of)

    def __reduce__(self):  # models are copied and pickled; the program is found or made again
        return Attention, self._made_of

    def __repr__(self):
        return f"regraph.torch.attention({self.key})"

    def with_params(self, **params) -> "Attention":
        """The same with other parameters."""
        text, name, policy, eager, options, mine = self._made_of
        return Attention(text, name, policy, eager, options, {**mine, **params})

    def _arrange(self, args, named):
        program = self._program
        tensors = core.by_name(program.name, program.inputs, args, named, "tensors")
        program.refuse((n, t) for n, t in tensors.items() if isinstance(t, torch.Tensor))
        first = next((tensors[name] for name in program.counted
                      if isinstance(tensors.get(name), torch.Tensor)), None)
        for name in program.inputs:
            tensor = tensors.get(name)
            if tensor is None and name in program.seqlens and first is not None and first.dim():
                length = program.shares * first.shape[0]
                last = torch.full((1,), length, dtype=torch.int32, device=first.device)
                tensor = torch.nn.functional.pad(last, (1, 0))
            if tensor is None:
                raise RegraphError("RG_E_USAGE", f"{program.name}: the input '{name}' is missing")
            tensors[name] = tensor
        return [tensors[name] for name in program.inputs]

    def _cast(self, tensors):
        """Integers as the library has them. Under autocast floating inputs are cast: to autocast's
        type where the type follows the tensors, to the spec's where that names one."""
        program = self._program
        program.refuse(zip(program.inputs, tensors))
        tensors = [narrow(name, t, _watched()) if t.dtype == torch.int64 else t
                   for name, t in zip(program.inputs, tensors)]
        kind = tensors[0].device.type
        if not torch.is_autocast_enabled(kind):
            return tensors
        to = torch.get_autocast_dtype(kind)
        return [t.to(DTYPES.get(program.dtype_of(name), to)) if t.is_floating_point() else t
                for name, t in zip(program.inputs, tensors)]

    def _wanted(self, tensors):
        """Names of the inputs that want gradients."""
        if not torch.is_grad_enabled():
            return []
        program = self._program
        wanted = [name for name, tensor in zip(program.inputs, tensors) if tensor.requires_grad]
        for name in wanted:
            if name not in program.differentiable:
                raise RegraphError(
                    "RG_E_USAGE", f"{program.name}: the input '{name}' requires a gradient, which "
                    'the spec does not ask for; say "grad": true there, or detach it')
        return wanted

    def _main_grad(self, name, leaf):
        """What a weight's gradient is added to, where it brings that."""
        main_grad = getattr(leaf, "main_grad", None)
        if main_grad is not None and (main_grad.dtype != torch.float32
                                      or main_grad.shape != leaf.shape
                                      or not main_grad.is_contiguous()):
            raise RegraphError(
                "RG_E_USAGE", f"{self._program.name}: main_grad of '{name}' is {main_grad.dtype} "
                f"of shape {tuple(main_grad.shape)}; expected contiguous float32 of shape "
                f"{tuple(leaf.shape)}")
        return main_grad

    def _seen(self, leaves):
        """A call through the operator."""
        program = self._program
        _refuse(program.name)
        for name, tensor in zip(program.inputs, leaves):
            if not isinstance(tensor, torch.Tensor):
                raise RegraphError("RG_E_TYPE", f"{program.name}: the input '{name}' is of "
                                                f"{type(tensor)}; expected a tensor")
        if any(type(tensor).__name__ == "DTensor" for tensor in leaves):
            from . import shards  # imports torch.distributed

            return shards.run(self, leaves)
        tensors = self._cast(leaves)
        wanted, accumulated, accumulators = self._wanted(tensors), [], []
        for name, leaf in zip(program.inputs, leaves):
            adds = name in wanted and name in program.accumulating
            main_grad = self._main_grad(name, leaf) if adds else None
            if main_grad is not None:
                accumulated.append(name)
                accumulators.append(main_grad)
        results = _forward(self.made_of, ",".join(wanted), ",".join(accumulated), tensors,
                           accumulators)
        return results[: len(program.outputs)]

    def _direct(self, leaves):
        """A call past the operator: nothing but what differs from call to call."""
        program, tensors = self._program, leaves
        grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
        call = program.last[grad]
        same = call is not None and call.threads == threads and call.same(*leaves)
        if not same:
            program.refuse(zip(program.inputs, leaves))
            plain = not torch.is_autocast_enabled(leaves[0].device.type)
            if not plain:
                tensors = self._cast(leaves)
            kind = (grad, threads,
                    *[(t.shape, t.dtype, t.device, t.requires_grad) for t in tensors])
            call = program.calls.get(kind)
            if call is None:
                call = program.prepare(kind, ",".join(self._wanted(tensors)), tensors)
                if plain:
                    call.learn(tensors)
            if plain:
                program.last[grad] = call
            if call.long:
                tensors = self._cast(tensors)
        if not call.wanted:
            return call.forward(tensors, same, keep=False)[0]
        running = {i: sum_ for i in call.adding
                   if (sum_ := self._main_grad(program.inputs[i], leaves[i])) is not None}
        return _Run.apply(call, running, same, *tensors)

    def __call__(self, *args: torch.Tensor,
                 **named: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if self._program.ranks is None:
            return self._call(args, named)
        try:
            return self._call(args, named)
        except RegraphError as error:
            self._program.tell(error)
            raise

    def _call(self, args, named):
        program = self._program
        leaves = self._arrange(args, named) if named or len(args) != len(program.inputs) else args
        seen = _watched() or not _PLAIN.issuperset(map(type, leaves))
        outputs = self._seen(leaves) if seen else self._direct(leaves)
        return outputs[0] if len(outputs) == 1 else dict(zip(program.outputs, outputs))

    def plan(self, *args: torch.Tensor, **named: torch.Tensor) -> core.Plan:
        """The core.Plan that a call with these tensors (and their requires_grad) uses: sizes,
        reports."""
        tensors = self._cast(self._arrange(args, named))
        return self._program.variant(",".join(self._wanted(tensors)), tensors).plan

    def times(self, *args: torch.Tensor,
              **named: torch.Tensor) -> list[tuple[str, str, bool, float, float]]:
        """[(node, op, backward?, ms, roofline ms)] of the last run with these tensors, of an
        `eager` attention: its backward's steps are the last run's if that was one."""
        plan = self.plan(*args, **named)
        return next((v.times() for v in self._program.variants() if v.plan is plan), [])

    def synchronize(self) -> None:
        """Waits for this program's runs and raises what went wrong in them, such as lengths that
        broke a rule (the next call would raise it too)."""
        for variant in self._program.variants():
            variant.synchronize()


def attention(spec: core.Source, policy: core.Source | int | None = None, *, threads: int = 0,
              profile: str | None = None, no_lanes: bool = False, no_fuse: bool = False,
              eager: bool = False, exact: bool = False, cp=None, deadline: float = 60,
              **params) -> Attention:
    """Makes an Attention of a spec and a policy (paths, dicts or JSON text; "all", "6GiB").
    `params` override the spec's parameters; one that names an input's dtype follows the tensors
    where it is not given. `eager` launches step by step and times each (see `times`). `cp`, a
    process group or one dimension of a mesh, shares the tokens out among its ranks (`cp_shard`);
    who comes `deadline` seconds after the others ends all. Equal arguments share plans."""
    text, name = core.read_source(spec)
    policy = core.read_policy(policy)[0] if policy is not None else None
    options = {"threads": threads, "profile": profile, "no_lanes": no_lanes,
               "no_fuse": no_fuse, "exact": exact}
    if cp is not None:
        from . import ranks  # imports torch.distributed

        group = ranks.group_of(cp)
        if group.size() > 1:
            options["cp"] = {"name": group.group_name, "deadline": deadline}
    made = Attention(text, name, policy, eager, options, params)
    made._program.join()
    return made


class Module(torch.nn.Module):
    """`attention` as a module. `parameters` names inputs of the spec that it keeps, as parameters
    of these names: biases start at 0, other vectors at 1, matrices as torch.nn.Linear's. Calls take
    the other inputs, by position or by name. `dtype` is the spec's parameter of that name, also as
    torch says it; where it is not given, parameters have torch's default type."""

    def __init__(self, spec: core.Source, policy: core.Source | int | None = None, *,
                 parameters: Sequence[str] = (), dtype: str | torch.dtype | None = None,
                 device: torch.device | str | None = None, **options):
        super().__init__()
        if dtype is not None:
            options["dtype"] = NAMES[dtype] if isinstance(dtype, torch.dtype) else dtype
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
                    f"{'no input' if name not in shapes else 'an input of no fixed shape'}; "
                    "expected some of "
                    f"{', '.join(n for n, s in shapes.items() if min(s, default=1) >= 0)}")
            said = program.dtype_of(name)
            value = torch.empty(shapes[name], dtype=DTYPES.get(said), device=device)
            self.register_parameter(name, torch.nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the parameters again."""
        for name, value in self.named_parameters(recurse=False):
            if value.dim() > 1:
                bound = value.shape[-1] ** -0.5
                torch.nn.init.uniform_(value, -bound, bound)
            else:
                torch.nn.init.constant_(value, 0 if name in self._biases else 1)

    def forward(self, *args: torch.Tensor,
                **named: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The attention of the other inputs and the parameters."""
        kept = dict(self.named_parameters(recurse=False))
        names = [name for name in self.attention._program.inputs if name not in kept]
        if len(args) > len(names):
            raise RegraphError("RG_E_USAGE", f"{self.attention._program.name}: {len(args)} "
                                             f"tensors; expected {', '.join(names)}")
        return self.attention(**dict(zip(names, args)), **named, **kept)

    def extra_repr(self) -> str:
        """What print shows: the name of the spec and a hash of everything."""
        return self.attention.key
