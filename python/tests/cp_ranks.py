"""One of the ranks that share out a batch over gloo (or NCCL, with GPUs), which each also runs
alone. Started by test_torch.py, or by torchrun on a machine with GPUs; its arguments say what to
do:

    equal   results and gradients of one rank, also compiled, with DDP and FSDP around
    ends    a rank with another spec or policy, refused, late, dead: all end with RG_E_COMM in time
    library rank 1 has loaded another version: likewise
"""

import json
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import regraph
import regraph.torch as rt

P = {"H": 4, "KH": 2, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16, "top_n": 4,
     "init": 1, "local": 2, "window": 20}
LAYER = {**P, "M": 32, "KH": 1, "dtype": "f32"}
del LAYER["init"], LAYER["local"]
NAMES = ["wn", "wq", "wk", "wv", "wg", "wo"]
NSA = json.loads(regraph.example("nsa.json").read_text())
TOKENS, STARTS = 500, [0, 70, 71, 400, 500]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
torch.set_num_threads(1)
dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")
RANK, RANKS = dist.get_rank(), dist.get_world_size()
cu = torch.tensor(STARTS, dtype=torch.int32, device=DEVICE)


def drawn(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g).to(DEVICE) for shape in shapes]


def batch():
    return [t.requires_grad_() for t in drawn(*((TOKENS, *s) for s in ((4, 16), (2, 16), (2, 16),
                                                                       (4, 3))))]


def summed(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def close(a, b, to=1e-6 if DEVICE == "cpu" else 1e-5):  # products of a GPU's library
    assert (a - b).norm() <= to * b.norm(), float((a - b).norm() / b.norm())


# ---- equal ----


def equal(cp, mode="auto", compiled=False, deadline=20.0):
    policy = {"regraph_policy": 1, "preset": "all", "cp": {"mode": mode}}
    x, (d_o,) = batch(), drawn((TOKENS, 4, 16), seed=1)
    o = rt.attention(NSA, **P)(*x, cu)
    expected = torch.autograd.grad(o, x, d_o)
    attend = rt.attention(NSA, policy, cp=cp, deadline=deadline, **P)
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    mine = attend(*rt.cp_shard(x, STARTS, cp, mode=mode), cu)
    assert len(mine) == rt.cp_capacity(TOKENS, cp) // RANKS
    assert torch.equal(rt.cp_unshard(mine, cu, cp, mode=mode, tokens=TOKENS), o)
    mine.backward(rt.cp_shard(d_o, cu, cp, mode=mode), retain_graph=True)
    if not compiled:
        again = [t.detach().requires_grad_() for t in rt.cp_shard(x, STARTS, cp, mode=mode)]
        checkpointed = checkpoint(attend, *again, cu, use_reentrant=False)
        kept = torch.autograd.grad(mine, x[0], torch.ones_like(mine))[0]
        lost = torch.autograd.grad(checkpointed, again[0], torch.ones_like(mine))[0]
        assert torch.equal(rt.cp_shard(kept, STARTS, cp, mode=mode), lost)
    for name, t, gradient in zip("qkvg", x, expected):
        if name in "qg":
            assert torch.equal(summed(t.grad), gradient), name
        else:
            close(summed(t.grad), gradient)


def over_sockets(cp):
    """What GPUs have beside NCCL, tried on the CPU: the library's own processes, which meet at an
    address that the group's store carries."""
    from regraph import ranks

    mine = ranks.ranks_of(cp.group_name, 21.0)
    mine._engines["cpu"] = ranks.Processes(mine.watch, cuda=False)
    equal(cp, deadline=21.0)


def rows_are_those_of_the_plan(cp):
    """What a data loader is told, and lengths left out: one sequence of all ranks' tokens."""
    capacity = rt.cp_capacity(TOKENS, cp)
    rows = [row for rank in range(RANKS) for slot in regraph.cp_rows(STARTS, capacity, RANKS, rank)
            for row in range(capacity)[slot]]
    assert sorted(rows) == list(range(capacity))
    numbers = torch.arange(TOKENS, device=DEVICE)
    mine = rt.cp_shard(numbers, STARTS, cp)
    own = [row for slot in regraph.cp_rows(STARTS, capacity, RANKS, RANK)
           for row in range(capacity)[slot]]
    assert mine.tolist() == [row if row < TOKENS else 0 for row in own]
    whole = [t.detach() for t in batch()]
    for tensors, starts, said in [(whole, [0, TOKENS + 1], f"ends at {TOKENS + 1}"),
                                  ([whole[0], whole[1][1:]], [0, 4], "as many in each"),
                                  (whole, [], "cu_seqlens is empty")]:
        with pytest.raises(regraph.RegraphError, match=said):
            rt.cp_shard(tensors, starts, cp)
    with pytest.raises(regraph.RegraphError, match="multiples of 0"):
        rt.cp_capacity(TOKENS, cp, 0)
    x = rt.cp_shard(whole, [0, TOKENS], cp, capacity=capacity)
    attend = rt.attention(NSA, cp=cp, deadline=20, **P)
    o = rt.cp_unshard(attend(*x), [0, TOKENS], cp, tokens=TOKENS)
    assert torch.equal(o, rt.attention(NSA, **P)(*whole))


def documents(cp):
    """Batches as TransformerEngine lays them out: every document in chunks of its own."""
    starts = [0, 16 * RANKS, 16 * RANKS, 90 * RANKS, 124 * RANKS]
    rows = torch.from_numpy(regraph.cp_document_rows(starts, RANKS, RANK)).to(DEVICE)
    lengths = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    x = [t.requires_grad_() for t in drawn(*((starts[-1], *s) for s in ((4, 16), (2, 16), (2, 16),
                                                                        (4, 3))))]
    (d_o,) = drawn((starts[-1], 4, 16), seed=1)
    o = rt.attention(NSA, **P)(*x, lengths)
    expected = torch.autograd.grad(o, x, d_o)
    attend = rt.attention(NSA, cp=cp, deadline=20, **P)
    theirs = [t.detach()[rows].requires_grad_() for t in x]
    mine = attend(*rt.cp_from_documents(theirs, starts, cp), lengths)
    back = rt.cp_to_documents(mine, starts, cp)
    assert torch.equal(back, o[rows])
    back.backward(d_o[rows])
    for t, gradient in zip(theirs, expected):
        close(t.grad, gradient[rows])


def layer(cp=None):
    torch.manual_seed(0)
    policy = {"regraph_policy": 1, "cp": {"weights": "local"}} if cp is not None else None
    return rt.Module(regraph.example("nsa_layer.json"), policy, parameters=NAMES, cp=cp,
                     device=DEVICE, **LAYER)


def train(module, x):
    """Three steps, each on the mean over the rows."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in module.parameters()]


def trains_as_one(cp, wrap):
    """A loss of each rank's own rows; what reduces the weights' gradients is around it."""
    tokens = 2 * 64 * RANKS  # no row of the capacity is empty, so means are of all rows
    (x,) = drawn((tokens, 32), seed=3)
    own = rt.cp_shard(x, [0, tokens], cp, capacity=tokens)
    together = train(wrap(layer(cp)), own)
    start, alone = [p.detach() for p in layer().parameters()], train(layer(), x)
    for name, a, b, c in zip(NAMES, together, alone, start):
        assert (b - c).norm() > 1e-4 * c.norm(), f"{name} did not train"
        close(a, b)


def weights_are_summed(cp):
    """The policy's default: each rank has the whole gradient of a weight."""
    tokens = 2 * 64 * RANKS
    (x,) = drawn((tokens, 32), seed=3)
    alone, shared = layer(), layer()
    shared.attention = rt.attention(regraph.example("nsa_layer.json"), cp=cp, deadline=20, **LAYER)
    alone(x).square().sum().backward()
    shared(rt.cp_shard(x, [0, tokens], cp, capacity=tokens)).square().sum().backward()
    for a, b in zip(shared.parameters(), alone.parameters()):
        close(a.grad, b.grad)


def captured(cp):
    """A step recorded once and replayed on other tensors, on every rank."""
    attend, x = rt.attention(NSA, cp=cp, deadline=20, **P), batch()
    own = [t.detach().requires_grad_() for t in rt.cp_shard(x, STARTS, cp)]
    torch.autograd.grad(attend(*own, cu).sum(), own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend(*own, cu)
        grads = torch.autograd.grad(o.sum(), own)
    for t in own:
        t.data.mul_(0.5)
    graph.replay()
    again = attend(*own, cu)
    assert torch.equal(o, again)
    assert all(map(torch.equal, grads, torch.autograd.grad(again.sum(), own)))


# ---- ends ----


def ends(part, call, within=8.0):
    """Every rank ends in time, with the sentence."""
    begun = time.monotonic()
    try:
        call()
    except regraph.RegraphError as error:
        assert error.status == "RG_E_COMM" or RANK == 2, error
        assert part in str(error), f"rank {RANK}: {error}; expected: {part}"
    else:
        raise AssertionError(f"rank {RANK} did not end; expected: {part}")
    assert time.monotonic() - begun < within, time.monotonic() - begun


def calls(deadline=5.0, spec=NSA, policy=None, cp=dist.group.WORLD, **params):
    attend = rt.attention(spec, policy, cp=cp, deadline=deadline, **{**P, **params})
    x = [t.detach() for t in rt.cp_shard(batch(), STARTS, dist.group.WORLD)]
    return lambda: attend(*x, cu)


def all_end():
    calls()()
    odd = RANK == 1
    ends("rank 1 has another spec than rank 0", calls(window=21 if odd else 22))
    ends("rank 1 has another policy than rank 0", calls(policy="all" if odd else "none"))
    call = calls()
    call()
    ends("rank 1 calls all_gather start-up", calls(window=23) if odd else call)
    call = calls()
    call()  # a failure of one does not make the next one fail
    if RANK == 2:
        refused = rt.attention(NSA, cp=dist.group.WORLD, deadline=5.0, **P)
        ends("'k' is missing", lambda: refused(torch.zeros(128, 4, 16, device=DEVICE)))
    else:
        ends("rank 2 failed: RG_E_USAGE", call)
    few = [dist.new_group(ranks) for ranks in ([0, 1, 2], [1, 2, 3])][RANK == 3]
    # rank 3 belongs to a group of three of its own; the others wait for it, and it for them
    ends("did not come to the start within 1 s" if RANK == 3 else "rank 3 did not",
         calls(deadline=1.0, cp=few if RANK == 3 else dist.group.WORLD))
    call = calls(deadline=1.0)
    call()
    if odd:
        time.sleep(3)
    ends("rank 1 did not reach", call)
    call = calls()
    call()
    if RANK == 3:
        os._exit(0)
    ends("rank 3 ended without a word (its last: ", call, within=4)
    ends("rank 3 ended without a word (its last: ", call, within=1)  # and stays so


def all_equal():
    world = dist.group.WORLD
    equal(world)
    rows_are_those_of_the_plan(world)
    weights_are_summed(world)
    documents(world)
    if RANKS == 2 or DEVICE == "cuda":
        equal(world, 1, compiled=True)
        equal(world, 2)
        mesh = init_device_mesh(DEVICE, (RANKS,), mesh_dim_names=("cp",))
        trains_as_one(mesh["cp"], torch.nn.parallel.DistributedDataParallel)
        trains_as_one(mesh["cp"], lambda module: fully_shard(module, mesh=mesh))
    if DEVICE == "cpu":
        over_sockets(world)
    else:
        captured(world)


if "equal" in sys.argv:
    all_equal()
if "library" in sys.argv:
    ends("rank 1 has another library version than rank 0", calls())
if "ends" in sys.argv:
    all_end()
    time.sleep(1.0 if RANK == 0 else 0)  # it holds the store
    os._exit(0)  # the group's own end would wait for rank 3
dist.destroy_process_group()
