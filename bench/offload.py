#!/usr/bin/env python3
"""Does offloading pay? Whole layers on a GPU under budgets of peak memory: the plan that recomputes
alone, and the one that may offload to the host, too.

    bench/offload.py                                  # two shapes, three budgets each
    bench/offload.py --shape 65536,6,16,1 --rounds 9

A shape is tokens, layers, query heads, KV heads of examples/nsa_model.json; budgets are fractions
of what keeping everything takes. Forward and backward are timed round by round, all plans in each,
so that all see the same drift; medians. Every plan's outputs and gradients are compared with those
of the plan that keeps all, bit for bit. First: what the link to the host does.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]
from regraph import _lib  # noqa: E402
from regraph.core import Plan, Session, Spec  # noqa: E402
from regraph.errors import RegraphError  # noqa: E402

GIB = 2**30
RESULTS = _lib.OUTPUT, _lib.GRAD_OUT


def link(torch):
    """GB/s of copies to the host, from it, and of both at once (each way)."""
    n = GIB // 2
    host = [torch.empty(n, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    rates = []
    for ways in ((0,), (1,), (0, 1)):
        best = 0
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for way in ways:
                with torch.cuda.stream(streams[way]):
                    a, b = (host, device) if way == 0 else (device, host)
                    for _ in range(4):
                        a[way].copy_(b[way], non_blocking=True)
            torch.cuda.synchronize()
            best = max(best, 4 * n / (time.perf_counter() - start) / 1e9)
        rates.append(best)
    return rates


def fingerprint(torch, memory, tensors):
    """Of outputs and gradients: sums of their bytes as words, each weighted by its place."""
    out = []
    for t in tensors:
        if t.role not in RESULTS:
            continue
        words = memory[t.role, t.name].view(-1).view(torch.int16).to(torch.int64)
        weights = torch.arange(words.numel(), device="cuda") % 8191 + 1
        out.append(((words * weights).sum().item(), words.sum().item()))
    return out


def run(shape, fractions, rounds, profile, torch):
    tokens, layers, heads, kv = shape
    spec = Spec(str(ROOT / "examples/nsa_model.json"), layers=layers, H=heads, KH=kv)
    make = lambda policy: Plan(spec, policy, device="cuda", profile=profile, T=tokens, B=1)
    plans = {"keep": make({"regraph_policy": 1,
                           "budget": "100TiB"})}  # a budget: no lanes, as all others
    peak = plans["keep"].sizes.predicted_peak
    for f in tuple(fractions):
        for host in (0, 1 << 40):
            start = time.perf_counter()
            try:
                plans[f,
                      host > 0] = make({"regraph_policy": 1, "budget": int(peak * f), "host": host})
            except RegraphError as e:
                print(f"{f} of {peak} bytes: {e}")
                fractions = [k for k in fractions if k != f]
                plans.pop((f, False), None)
                break
            print(
                f"  planned {f} {'with' if host else 'without'} the host in "
                f"{time.perf_counter() - start:.1f} s",
                file=sys.stderr, flush=True)
    sizes = [p.sizes for p in plans.values()]
    blocks = {
        n: torch.empty(max(getattr(z, n)
                           for z in sizes) + 256, dtype=torch.uint8, device="cuda")
        for n in ("saved", "scratch")
    }
    blocks["host"] = torch.empty(
        max(z.host for z in sizes) + 256, dtype=torch.uint8, pin_memory=True)
    at = {n: (b.data_ptr() + 255) // 256 * 256 for n, b in blocks.items()}
    types = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    memory = {}
    torch.manual_seed(1)
    for t in plans["keep"].tensors:
        if t.dtype == "i32":
            x = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        else:
            x = torch.randn(t.shape, dtype=types[t.dtype], device="cuda")
            if t.role == _lib.INPUT and len(t.shape) == 2 and t.name != "embedded":
                x *= t.shape[1] ** -0.5
        memory[t.role, t.name] = x
    sessions, bits = {}, {}
    for key, plan in plans.items():
        session = sessions[key] = Session(plan, saved=at["saved"], scratch=at["scratch"],
                                          host=at["host"])
        for t in plan.tensors:
            x = memory[t.role, t.name]
            session.bind(t.role, t.name, x.data_ptr(), x.numel() * x.element_size())
        for _ in range(2):
            for t in plan.tensors:
                if t.role in RESULTS:
                    memory[t.role, t.name].fill_(7)
            session.run_forward()
            session.run_backward()
            session.synchronize()
        bits[key] = fingerprint(torch, memory, plan.tensors)
    took = {key: [] for key in sessions}
    for _ in range(rounds):
        for key, session in sessions.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            session.run_forward()
            session.run_backward()
            session.synchronize()
            took[key].append(1e3 * (time.perf_counter() - start))
    ms = {key: statistics.median(x) for key, x in took.items()}
    print(
        f"\n{layers} layers, {tokens} tokens, {heads}/{kv} heads: keeping all takes "
        f"{peak / GIB:.2f} GiB and "
        f"{ms['keep']:.2f} ms; medians of {rounds}")
    print(
        "| budget, GiB | recomputing: GiB, ms | over keep-all | offloading: GiB, on the host, ms "
        "| over keep-all | modelled | "
        "bits |\n|---|---|---|---|---|---|---|")
    good = True
    for f in fractions:
        a, b = plans[f, False], plans[f, True]
        over = [ms[f, x] - ms["keep"] for x in (False, True)]
        model = []
        for p in (a, b):
            text = json.loads(p.write("json"))
            model.append(text["recompute"]["extra_ms"] + text.get("offload_model_ms", 0))
        same = bits[f, False] == bits["keep"] == bits[f, True]
        good &= same
        print(
            f"| {peak * f / GIB:.2f} | {a.sizes.predicted_peak / GIB:.2f}, {ms[f, False]:.2f} | "
            f"{over[0]:+.2f} | "
            f"{b.sizes.predicted_peak / GIB:.2f}, {b.sizes.host / GIB:.2f}, {ms[f, True]:.2f} | "
            f"{over[1]:+.2f} | "
            f"{model[0]:+.2f}, {model[1]:+.2f} | {'equal' if same else 'DIFFER'} |", flush=True)
    return good


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", action="append", help="tokens,layers,heads,kv heads")
    p.add_argument("--budget", type=float, action="append", help="of what keeping everything takes")
    p.add_argument("--profile")
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    import torch

    shapes = [tuple(map(int, s.split(","))) for s in args.shape or ("65536,4,64,4", "65536,6,16,1")]
    print(torch.cuda.get_device_name())
    print(
        "the link: %.1f GB/s to the host, %.1f from it, both at once %.1f each" %
        tuple(link(torch)), flush=True)
    good = True
    for shape in shapes:
        good &= run(shape, args.budget or [0.85, 0.7, 0.55], args.rounds, args.profile, torch)
        torch.cuda.empty_cache()
    return not good


if __name__ == "__main__":
    sys.exit(main())
