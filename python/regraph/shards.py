"""DTensors whose heads are shared out among ranks (tensor parallelism): each rank runs the program
of its own heads.

Heads are the second axis of inputs [T, heads, …]: q has H of them, k and v KH. A rank's share of
both is a program of itself, with H/n and KH/n heads, as long as nothing in the spec brings heads
together; a weight over all heads ("H*D") would, so specs with such inputs are refused. What is
replicated gets a gradient that is a sum over the ranks.
"""

import re

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from . import _lib, core
from .errors import RegraphError


def _head_axes(program):
    """{input: the axis of its heads, or None}, by the spec."""
    shapes = {name: [str(extent) for extent in program.spec["inputs"][name]["shape"]]
              for name in program.inputs}
    heads = {shape[1] for shape in shapes.values() if len(shape) > 2}
    axes = {}
    for name, shape in shapes.items():
        mixed = [extent for extent in shape
                 if extent not in heads and heads & set(re.findall(r"[A-Za-z_]\w*", extent))]
        if mixed or sum(extent in heads for extent in shape) > 1:
            raise RegraphError(
                "RG_E_USAGE", f"{program.name}: the input '{name}' [{', '.join(shape)}] brings "
                "heads together, so ranks can't share them; expected heads as an axis of their own")
        axes[name] = next((axis for axis, extent in enumerate(shape) if extent in heads), None)
    return heads, axes


def _shared_axis(program, tensors, axes):
    """The mesh, and its axis along which heads are shared out, or None."""
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    mesh = meshes.pop()
    shared = {at for tensor in tensors if isinstance(tensor, DTensor)
              for at, placement in enumerate(tensor.placements) if not placement.is_replicate()}
    along = min(shared, default=None)
    for name, tensor in zip(program.inputs, tensors):
        given = tensor.placements if isinstance(tensor, DTensor) else [Replicate()] * mesh.ndim
        expected = [Shard(axes[name]) if at == along and axes[name] is not None else Replicate()
                    for at in range(mesh.ndim)]
        wrong = (f"is {', '.join(map(str, given))}" if meshes or list(given) != expected else
                 "is no DTensor, and its gradient would be a part"
                 if along is not None and tensor.requires_grad
                 and not isinstance(tensor, DTensor) else None)
        if wrong:
            wants = ", ".join(f"{n} Shard({a})" for n, a in axes.items() if a is not None)
            raise RegraphError(
                "RG_E_USAGE", f"{program.name}: the input '{name}' {wrong}; expected heads shared "
                f"out along one axis of one mesh ({wants}) and all else replicated")
    return mesh, along


def _share(attend, heads, ranks):
    """The attention of one rank's heads."""
    program = attend._program
    known = {**program.spec.get("params", {}), **program.params}
    mine = {}
    for name in heads:
        count = known.get(name)
        if not isinstance(count, int) or count % ranks:
            raise RegraphError(
                "RG_E_USAGE", f"{program.name}: {ranks} ranks can't share {name} = {count or '?'} "
                "heads; expected a parameter of the spec that they divide")
        mine[name] = count // ranks
    return attend.with_params(**mine)


def run(attend, tensors):
    """The outputs, as DTensors."""
    program = attend._program
    heads, axes = _head_axes(program)
    mesh, along = _shared_axis(program, tensors, axes)
    ranks = 1 if along is None else mesh.size(along)
    local = attend if ranks == 1 else _share(attend, heads, ranks)
    mine = [tensor.to_local(grad_placements=[
                Partial() if at == along and axes[name] is None else placement
                for at, placement in enumerate(tensor.placements)])
            if isinstance(tensor, DTensor) else tensor
            for name, tensor in zip(program.inputs, tensors)]
    results = local(*mine)
    results = results if isinstance(results, dict) else {program.outputs[0]: results}
    wrapped = []
    for whole, part in zip(*(outputs_of(p, tensors) for p in (program, local._program))):
        at = [axis for axis, (a, b) in enumerate(zip(whole.shape, part.shape)) if a != b]
        if ranks > 1 and len(at) != 1:
            raise RegraphError(
                "RG_E_USAGE", f"{program.name}: the output '{whole.name}' {list(whole.shape)} has "
                "no axis of heads, so ranks can't share it")
        placements = [Shard(at[0]) if axis == along and at else Replicate()
                      for axis in range(mesh.ndim)]
        wrapped.append(DTensor.from_local(results[whole.name], mesh, placements, run_check=False))
    return wrapped


def outputs_of(program, tensors):
    spec = core.Spec(program.spec, name=program.name, **program.params_for(tensors))
    return [tensor for tensor in spec.tensors if tensor.role == _lib.OUTPUT]
