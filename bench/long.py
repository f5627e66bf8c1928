#!/usr/bin/env python3
"""How long a sequence fits, and what it takes: forward and backward of NSA with everything
recomputed, one head group at a time.

    bench/long.py                                   # 128K, 512K forward and backward, 1M forward
    bench/long.py --tokens 256K --forward 2M        # other lengths

Prints milliseconds, the bytes the plan predicts, and the bytes torch's allocator handed out beyond
inputs, outputs and gradients.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]


def sizes(text):
    return [
        int(float(t[:-1]) * (1 << {"k": 10, "m": 20}[t[-1].lower()])) for t in text.split(",") if t
    ]


def measure(torch, attend, tokens, backward):
    torch.cuda.empty_cache()
    shapes = (64, 128), (4, 128), (4, 128), (64, 3)
    q, k, v, gate = (torch.randn(tokens, *s, device="cuda",
                                 dtype=torch.bfloat16).requires_grad_(backward) for s in shapes)
    starts = torch.tensor([0, tokens], device="cuda", dtype=torch.int32)
    d_o = torch.randn(tokens, 64, 128, device="cuda", dtype=torch.bfloat16) if backward else None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(2):
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        o = attend(q, k, v, gate, starts)
        torch.cuda.synchronize()
        t1 = time.perf_counter()
        results = torch.autograd.grad(o, (q, k, v, gate), d_o) if backward else ()
        torch.cuda.synchronize()
        times.append((1e3 * (t1 - t0), 1e3 * (time.perf_counter() - t1)))
        ours = sum(t.numel() * t.element_size() for t in (o, *results))
        finite = all(bool(torch.isfinite(t.flatten()[:: 997].float()).all()) for t in (o, *results))
        del o, results
    peak = torch.cuda.max_memory_allocated() - before - ours
    forward, back = times[-1]
    print(
        f"{tokens:>9} tokens  forward {forward:9.1f} ms" +
        (f"  backward {back:9.1f} ms" if backward else " " * 24) +
        f"  beyond inputs and outputs {peak / 2**30:6.2f} GiB  finite {finite}", flush=True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--tokens", default="128K,512K", help="lengths run forward and backward")
    p.add_argument("--forward", default="1M", help="lengths run forward only")
    args = p.parse_args()
    import torch

    import regraph.torch

    policy = {"regraph_policy": 1, "preset": "all", "split_heads": 1}
    print(torch.cuda.get_device_name())
    for backward, lengths in ((True, args.tokens), (False, args.forward)):
        for tokens in sizes(lengths):
            attend = regraph.torch.attention(str(ROOT / "examples/nsa.json"), policy=policy)
            try:
                measure(torch, attend, tokens, backward)
            except Exception as error:  # the next length may still fit
                print(f"{tokens:>9} tokens  failed: {error}", flush=True)


if __name__ == "__main__":
    main()
