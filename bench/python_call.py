#!/usr/bin/env python3
"""What a call of regraph.torch.attention costs over the session that it runs.

    bench/python_call.py [cpu|cuda] [--profile]

The bare session is rg_session_run through ctypes with everything bound and prepared before: C's share and the
launch of the graph. Beside it, what torch alone takes for the same: a function of autograd that allocates as many
tensors and runs nothing. Host time of one thread, the least of many rounds taken in turns; on a GPU a round is short
enough that the host never waits for it. Specs are so small that the steps themselves take little.
"""

import argparse
import cProfile
import ctypes
import gc
import pstats
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import regraph  # noqa: E402
import regraph.torch  # noqa: E402
from regraph import _lib  # noqa: E402

P = {"H": 4, "KH": 2, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16, "top_n": 4,
     "window": 16, "dtype": "f32"}
T = 16
ROUNDS, CALLS = 200, 20


class Nothing(torch.autograd.Function):
    """As many tensors made and kept as a call makes and keeps."""

    @staticmethod
    def forward(ctx, *inputs):
        made = [torch.empty_like(inputs[0]), torch.empty_like(inputs[0]), torch.empty_like(inputs[0])]
        ctx.save_for_backward(*inputs, *made[:2])
        return made[0]

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.saved_tensors
        torch.empty_like(kept[0])
        return *[torch.empty_like(t) for t in kept[:4]], None


def bare(attend, inputs):
    """Two functions that run forward and backward of a session of its own on memory of its own."""
    plan = attend.plan(*inputs)
    session = regraph.Session(plan, stream=stream(inputs[0].device))
    rows = [torch.zeros(t.nbytes + 512, dtype=torch.uint8, device=inputs[0].device) for t in plan.tensors]
    for tensor, row in zip(plan.tensors, rows):
        if tensor.seqlens:
            row[:4 * tensor.shape[0]].view(torch.int32)[1:] = T
    at = (ctypes.c_void_p * len(rows))(*[row.data_ptr() for row in rows])
    error = ctypes.byref(_lib.Error())
    run, handle, count = _lib.lib.rg_session_run, session.handle, len(rows)
    blocks = [torch.zeros(size + 512, dtype=torch.uint8, device=inputs[0].device)
              for size in (plan.sizes.saved, plan.sizes.scratch)]
    saved, scratch = (-(-block.data_ptr() // 256) * 256 for block in blocks)
    keep = session, rows, at, blocks

    def forward(keep=keep):
        if run(handle, 0, at, count, saved, scratch, error):
            raise RuntimeError

    def backward(keep=keep):
        if run(handle, 1, at, count, saved, scratch, error):
            raise RuntimeError

    return forward, backward


def stream(device):
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("device", nargs="?", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--profile", action="store_true")
    arguments = arguments.parse_args()
    device = arguments.device
    torch.set_num_threads(1)
    attend = regraph.torch.attention(regraph.example("nsa.json"), **P)
    shapes = (P["H"], P["D"]), (P["KH"], P["D"]), (P["KH"], P["DV"]), (P["H"], 3)
    x = [torch.randn(T, *shape, device=device) for shape in shapes]
    leaves = [t.clone().requires_grad_() for t in x]
    cu = torch.tensor([0, T], dtype=torch.int32, device=device)
    one = torch.ones(T, P["H"], P["DV"], device=device)
    forward_alone, _ = bare(attend, (*x, cu))
    forward, backward = bare(attend, (*leaves, cu))

    def both():
        forward(), backward()

    def step():
        torch.autograd.grad(attend(*leaves, cu), leaves, one)

    def no_step():
        torch.autograd.grad(Nothing.apply(*leaves, cu), leaves, one)

    cases = [("forward, no gradients", forward_alone, lambda: Nothing.forward(Ctx, *x, cu), lambda: attend(*x, cu)),
             ("forward, with gradients", forward, lambda: Nothing.apply(*leaves, cu), lambda: attend(*leaves, cu)),
             ("forward and backward", both, no_step, step)]
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {device}; µs a call\n")
    print(f"{'':26}{'bare session':>14}{'torch alone':>14}{'attention':>12}{'overhead':>12}")
    for name, *ways in cases:
        least = [1e9] * len(ways)
        gc.collect()
        gc.disable()
        for _ in range(ROUNDS):
            for i, way in enumerate(ways):
                way()
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(CALLS):
                    way()
                least[i] = min(least[i], (time.perf_counter() - start) / CALLS * 1e6)
        gc.enable()
        print(f"{name:26}{least[0]:14.1f}{least[1]:14.1f}{least[2]:12.1f}{least[2] - least[0]:12.1f}")
        if arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda: [ways[2]() for _ in range(2000)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)


class Ctx:
    save_for_backward = staticmethod(lambda *tensors: None)


if __name__ == "__main__":
    main()
