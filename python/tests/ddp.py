"""One of two ranks that train a layer together over gloo; rank 0 also trains it alone, and compares.
Started by test_torch.py with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment."""

import torch
import torch.distributed as dist
import torch.nn.parallel

import regraph
import regraph.torch

P = {"M": 32, "H": 4, "KH": 1, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16, "top_n": 4,
     "window": 20, "dtype": "f32"}
NAMES = ["wn", "wq", "wk", "wv", "wg", "wo"]


def layer():
    torch.manual_seed(0)
    return regraph.torch.Module(regraph.example("nsa_layer.json"), parameters=NAMES, **P)


def train(module, batches):
    """Three steps; each on the mean over batches [T, M]."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = sum(module(x).square().mean() for x in batches) / len(batches)
        loss.backward()
        optimizer.step()
    return [p.detach() for p in module.parameters()]


dist.init_process_group("gloo")
batches = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(1))
together = train(torch.nn.parallel.DistributedDataParallel(layer()), [batches[dist.get_rank()]])
if dist.get_rank() == 0:
    start, alone = [p.detach() for p in layer().parameters()], train(layer(), list(batches))
    for name, a, b, c in zip(NAMES, together, alone, start):
        assert (b - c).norm() > 1e-4 * c.norm(), f"{name} did not train"
        assert (a - b).norm() <= 1e-6 * b.norm(), name
dist.destroy_process_group()
