#!/usr/bin/env python3
"""Builds in turn on one machine: what each takes for a graph's directions and nodes, beside the
first.

    bench/builds.py OLD NEW … --case "T=4096 B=1" --case "T=8192 B=1 H=32 KH=8"

A build is a folder with `regraph` and its library. Each case runs `regraph bench SPEC --json` with
every build in turn, the order reversed from round to round; times are medians over rounds of the
command's own medians, in ms. A node is printed where a build's time is further than --apart from
the first's (nothing is said of what lies within it).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bench(build, args, case):
    """Times of one run: the directions', then the nodes'."""
    flags = [x for setting in case.split() for x in ("--set", setting)]
    command = [
        build / "regraph", "bench", args.spec, *flags, "--device", args.device, "--repeat",
        str(args.repeat), "--json"
    ]
    paths = [str(build), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    run = subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": ":".join(paths)},
                         capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{build}: {run.stderr.strip()}")
    got = json.loads(run.stdout)
    return {
        "forward": got["forward_ms"], "backward": got["backward_ms"],
        **{n["name"]: n["ms"] for n in got["nodes"]}
    }


def compare(args, case):
    runs = {build: [] for build in args.build}
    for i in range(args.rounds):
        for build in args.build[:: -1 if i % 2 else 1]:
            runs[build].append(bench(build, args, case))
    times = {
        build: {
            name: statistics.median(r[name] for r in of if name in r) for name in dict.fromkeys(
                n for r in of for n in r)
        } for build, of in runs.items()
    }
    first = times[args.build[0]]
    print(f"{case}: {args.build[0]} {first['forward']:.3f} / {first['backward']:.3f}")
    for build in args.build[1:]:
        told = [
            f"{name} {first[name]:.3f} -> {ms:.3f}" for name, ms in list(times[build].items())[2:]
            if name in first and abs(ms - first[name]) > args.apart * first[name]
        ]
        ratios = " / ".join(f"{times[build][d] / first[d]:.3f}" for d in ("forward", "backward"))
        print(
            f"    {build} {times[build]['forward']:.3f} / {times[build]['backward']:.3f}, times "
            f"{ratios}: "
            + (", ".join(told) or "no node further apart"), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, nargs="+",
                        help="folders with builds; the first is what others are held against")
    parser.add_argument("--case", action="append", required=True,
                        help="settings, as in \"T=4096 B=1\"; repeatable")
    parser.add_argument("--spec", type=Path, default=ROOT / "examples" / "nsa.json")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--apart", type=float, default=0.02, help="of a node's time (default 0.02)")
    args = parser.parse_args()
    args.build = [build.resolve() for build in args.build]
    for case in args.case:
        compare(args, case)


if __name__ == "__main__":
    main()
