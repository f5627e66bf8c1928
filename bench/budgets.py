#!/usr/bin/env python3
"""Does the planner choose well? NSA on a GPU under six budgets of peak memory, against all explicit
policies.

    regraph tune --device cuda                       # or --profile FILE
    bench/budgets.py                                 # 64K tokens
    bench/budgets.py --tokens 16384 --profile FILE --rounds 9

Forward and backward of every subset of the nodes that may be recomputed are timed, round by round
so that all see the same drift, and the plans that the planner chose among them; medians. A budget's
row compares its plan with the quickest explicit policy whose plan fits. All sessions share one pair
of blocks and run without lanes, as plans with a budget do.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]
NODES = "compress_kv", "cmp_o", "topk", "slc_o", "swa_o"


def chosen(plan):
    nodes = json.loads(plan.write("json"))["recompute"]["nodes"]
    return tuple(n["name"] for n in nodes if n.get("recomputed"))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=65536)
    p.add_argument("--profile")
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    import torch

    from regraph import _lib
    from regraph.core import Plan, Session, Spec

    spec = Spec(str(ROOT / "examples/nsa.json"))
    make = lambda policy: Plan(spec, policy, device="cuda", profile=args.profile, no_lanes=True, T=
                               args.tokens, B=1)
    explicit = {}
    for k in range(len(NODES) + 1):
        for names in itertools.combinations(NODES, k):
            explicit[names] = make({"regraph_policy": 1, "recompute": list(names)})
    least, most = make("least").sizes.predicted_peak, explicit[()].sizes.predicted_peak
    budgets = [least + (most - least) * i // 6 for i in range(6)]
    plans = dict(explicit)
    planned = {}
    for budget in budgets:
        planned[budget] = make({"regraph_policy": 1, "budget": budget})
        plans["budget", budget] = planned[budget]

    block = {
        n: torch.empty(
            max(getattr(x.sizes, n)
                for x in plans.values()) + 256, dtype=torch.uint8, device="cuda")
        for n in ("saved", "scratch")
    }
    at = {n: (b.data_ptr() + 255) // 256 * 256 for n, b in block.items()}
    types = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}
    memory = {}
    for t in explicit[()].tensors:
        if t.dtype == "i32":
            x = torch.tensor([0, args.tokens], dtype=torch.int32, device="cuda")
        else:
            x = torch.randn(t.shape, dtype=types[t.dtype], device="cuda")
        memory[t.role, t.name] = x
    sessions = {}
    for key, plan in plans.items():
        sessions[key] = Session(plan, saved=at["saved"], scratch=at["scratch"])
        for t in plan.tensors:
            x = memory[t.role, t.name]
            sessions[key].bind(t.role, t.name, x.data_ptr(), x.numel() * x.element_size())

    took = {key: [] for key in sessions}
    for r in range(args.rounds + 2):
        for key, session in sessions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            session.run_forward()
            session.run_backward()
            session.synchronize()
            if r > 1:
                took[key].append(1e3 * (time.perf_counter() - start))
    ms = {key: statistics.median(x) for key, x in took.items()}

    print(f"{torch.cuda.get_device_name()}, {args.tokens} tokens, medians of {args.rounds}")
    times = json.loads(planned[least].write("json"))["times"]
    print(f"times: {times}\nkeep-all {most} bytes, {ms[()]:.2f} ms; least {least} bytes")
    print(
        "| budget, GiB | plan, GiB | recomputes | ms | best of 32 | ms | ratio "
        "|\n|---|---|---|---|---|---|---|"
    )
    worst = 0
    for budget in budgets:
        plan = planned[budget]
        fits = [k for k in explicit if explicit[k].sizes.predicted_peak <= budget]
        best = min(fits, key=lambda k: ms[k]) if fits else None
        mine = ms["budget", budget]
        ratio = mine / ms[best] if fits else float("nan")
        worst = max(worst, ratio)
        print(
            f"| {budget / 2**30:.2f} | {plan.sizes.predicted_peak / 2**30:.2f} | "
            f"{', '.join(chosen(plan)) or 'nothing'} | "
            f"{mine:.2f} | {(', '.join(best) or 'nothing') if fits else 'none fits'} | "
            f"{ms[best] if fits else float('nan'):.2f} | {ratio:.3f} |")
    print(f"worst ratio {worst:.3f}\nall policies: peak GiB, ms")
    for key in explicit:
        print(
            f"  {explicit[key].sizes.predicted_peak / 2**30:6.2f} {ms[key]:8.2f}  "
            f"{', '.join(key) or 'nothing'}"
        )
    return worst > 1.05


if __name__ == "__main__":
    sys.exit(main())
