"""One of two ranks over gloo: they train a layer together, with DDP and with FSDP2, and share the
heads of attention. Rank 0 does the same alone, and compares. Started by test_torch.py with RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment."""

import json

import torch
import torch.distributed as dist
import torch.nn.parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import regraph
import regraph.torch

LAYER = {"M": 32, "H": 4, "KH": 1, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16,
         "top_n": 4, "window": 20, "dtype": "f32"}
NAMES = ["wn", "wq", "wk", "wv", "wg", "wo"]
HEADS = {**LAYER, "KH": 2}
del HEADS["M"]


def layer():
    torch.manual_seed(0)
    return regraph.torch.Module(regraph.example("nsa_layer.json"), parameters=NAMES, **LAYER)


def train(module, batches):
    """Three steps; each on the mean over batches [T, M]."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(module(x).square().mean() for x in batches) / len(batches)
        loss.backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in module.parameters()]


def trains_as_one(wrap):
    batches = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))
    together = train(wrap(layer()), [batches[dist.get_rank()]])
    start, alone = [p.detach() for p in layer().parameters()], train(layer(), list(batches))
    for name, a, b, c in zip(NAMES, together, alone, start):
        assert (b - c).norm() > 1e-4 * c.norm(), f"{name} did not train"
        assert (a - b).norm() <= 1e-6 * b.norm(), name


def refused(part, call):
    try:
        call()
    except regraph.RegraphError as error:
        assert part in str(error), error
    else:
        raise AssertionError(f"expected a refusal with: {part}")


def heads_are_shared(mesh):
    """Half of the heads on each rank; a norm over q's axis D has a weight that both have."""
    spec = json.loads(regraph.example("nsa.json").read_text())
    spec["inputs"] |= {"qin": {**spec["inputs"].pop("q")},
                       "w": {"shape": ["D"], "dtype": "$dtype", "grad": True}}
    spec["nodes"].insert(0, {"name": "norm", "op": "rmsnorm", "in": {"x": "qin", "w": "w"},
                             "out": {"y": "q"}})
    attend = regraph.torch.attention(spec, **HEADS)
    g = torch.Generator().manual_seed(2)
    shapes = {"k": (150, 2, 16), "v": (150, 2, 16), "gate": (150, 4, 3), "qin": (150, 4, 16),
              "w": (16,)}
    whole = {name: torch.randn(*shape, generator=g).requires_grad_()
             for name, shape in shapes.items()}
    cu = torch.tensor([0, 70, 150], dtype=torch.int32)
    o = attend(**whole, cu_seqlens=cu)
    o.square().sum().backward()
    placed = {name: [Shard(1) if t.dim() > 1 else Replicate()] for name, t in whole.items()}
    parts = {name: distribute_tensor(t.detach(), mesh, placed[name]).requires_grad_()
             for name, t in whole.items()}
    shared = attend(**parts, cu_seqlens=cu)
    assert shared.placements == (Shard(1),) and shared.shape == o.shape
    assert torch.equal(shared.full_tensor(), o)
    shared.square().sum().backward()
    for name, t in whole.items():
        got = parts[name].grad.full_tensor()
        assert (torch.equal(got, t.grad) if name != "w" else
                (got - t.grad).norm() < 1e-6 * t.grad.norm()), name
    rows = distribute_tensor(whole["k"].detach(), mesh, [Shard(0)])
    refused("'k' is S(0); expected heads shared",
            lambda: attend(**{**parts, "k": rows}, cu_seqlens=cu))
    refused("'w' is no DTensor", lambda: attend(**{**parts, "w": whole["w"]}, cu_seqlens=cu))
    replicated = {name: distribute_tensor(t.detach(), mesh, [Replicate()])
                  for name, t in whole.items()}
    assert torch.equal(attend(**replicated, cu_seqlens=cu).to_local(), o)
    mixed = regraph.torch.attention(regraph.example("nsa_layer.json"), **LAYER)
    x = distribute_tensor(torch.zeros(80, 32), mesh, [Replicate()])
    assert mixed(x, *[p.detach() for p in layer().parameters()]).shape == x.shape


dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
trains_as_one(torch.nn.parallel.DistributedDataParallel)
trains_as_one(lambda module: fully_shard(module, mesh=mesh))
heads_are_shared(mesh)
dist.destroy_process_group()
