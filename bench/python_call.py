#!/usr/bin/env python3
"""What a call of regraph.torch.attention costs over the session that it runs.

    bench/python_call.py [cpu|cuda] [--profile]

The bare session is rg_session_run through ctypes, with everything it takes prepared before: C's
share, and on a GPU the launch of the graph. Beside it what torch alone takes for the same: a
function of autograd that allocates as many tensors and runs nothing. Host time of one thread, the
least of many rounds taken in turns; on a GPU a round is short enough that the host never waits for
it. Specs are so small that the steps themselves take little.
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
    def make(*inputs):
        return [torch.empty_like(inputs[0]) for _ in range(3)]  # output, saved block, scratch

    @staticmethod
    def forward(ctx, *inputs):
        output, saved, _ = Nothing.make(*inputs)
        ctx.save_for_backward(*inputs, output, saved)
        return output

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.saved_tensors
        torch.empty_like(grad)  # scratch
        return *[torch.empty_like(tensor) for tensor in kept[:4]], None


class Bare:
    """A session of its own on memory of its own, with all that a call needs made before."""

    def __init__(self, attend, inputs):
        device, plan = inputs[0].device, attend.plan(*inputs)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        self.session = regraph.Session(plan, stream=stream)
        sizes = [*(t.nbytes for t in plan.tensors), plan.sizes.saved, plan.sizes.scratch]
        self.memory = [torch.zeros(size + 256, dtype=torch.uint8, device=device) for size in sizes]
        *places, self.saved, self.scratch = (-(-m.data_ptr() // 256) * 256 for m in self.memory)
        self.at = (ctypes.c_void_p * len(places))(*places)
        for tensor, memory, place in zip(plan.tensors, self.memory, places):
            if tensor.seqlens:
                memory[place - memory.data_ptr():][:4 * tensor.shape[0]].view(torch.int32)[1:] = T
        self.error = ctypes.byref(_lib.Error())

    def run(self, direction):
        if _lib.lib.rg_session_run(self.session.handle, direction, self.at, len(self.at),
                                   self.saved, self.scratch, self.error):
            raise RuntimeError("the run failed")


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
    forward_alone, session = Bare(attend, (*x, cu)), Bare(attend, (*leaves, cu))

    def both():
        session.run(0)
        session.run(1)

    def step():
        torch.autograd.grad(attend(*leaves, cu), leaves, one)

    def no_step():
        torch.autograd.grad(Nothing.apply(*leaves, cu), leaves, one)

    cases = [("forward, no gradients", lambda: forward_alone.run(0), lambda: Nothing.make(*x, cu),
              lambda: attend(*x, cu)),
             ("forward, with gradients", lambda: session.run(0), lambda: Nothing.apply(*leaves, cu),
              lambda: attend(*leaves, cu)), ("forward and backward", both, no_step, step)]
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
        print(
            f"{name:26}{least[0]:14.1f}{least[1]:14.1f}{least[2]:12.1f}{least[2] - least[0]:12.1f}")
        if arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda: [ways[2]() for _ in range(2000)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)


if __name__ == "__main__":
    main()
