#!/usr/bin/env python3
"""Registers that kernels for every GPU since Ampere spill, for each of those GPUs:

    tests/spills.py [BUILD [CAPABILITY …]]   default: build, and 80 86 89 90 100 120

A full build carries these kernels as compute_80 PTX, and a driver compiles that for the GPU it
drives. This has ptxas do the same, for each compute capability that it knows, and prints every
kernel that spills, then the most registers of each file. What is looked at are the kernels on the
tensor cores (kernels/**/*mma*); the plain ones that stand in for them are not. What spills where
no call takes it (large tiles of the forward, where a block has 99 KB) is printed, not counted.

It needs ptxas, and cuobjdump of CUDA or of its pip package, in PATH, /usr/local/cuda/bin or
$CUDA_BIN. Exit code 1 where a kernel spills, 77 where a tool or the PTX is missing. Minutes of a
core for each capability."""

import glob
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from releases import tool

KERNEL = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
LARGE = re.compile(r"mma_fwd7forward.*ELi0ELb0E")  # RGK_MMA_LARGE, dense: ops/cuda/mma_fwd.c
LITTLE_SHARED = "86", "89", "120"


def skip(why):
    print(f"spills SKIPPED: {why}")
    sys.exit(77)


def ptx_of(build, folder, cuobjdump):
    """{name of the file: its PTX}, of the objects of a build."""
    found = {}
    for path in sorted(glob.glob(f"{build}/**/kernels/**/*mma*.cu.o", recursive=True)):
        subprocess.run(
            [cuobjdump, "-xptx", "all", os.path.abspath(path)],
            cwd=folder, check=True, stdout=subprocess.DEVNULL,
        )
        name = os.path.basename(path)[:-2]
        for ptx in glob.glob(f"{folder}/{name}.*.ptx"):
            found[name] = ptx
    return found


def kernels(ptxas, ptx, cc):
    """[(name, registers, bytes spilled)]"""
    said = subprocess.run(
        [ptxas, "-v", f"-arch=sm_{cc}", ptx, "-o", os.devnull], capture_output=True, text=True
    )
    if said.returncode:
        sys.exit(said.stderr)
    name, spilled, out = None, 0, []
    for line in said.stderr.splitlines():
        if match := KERNEL.search(line):
            name, spilled = match[1], 0
        elif match := SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := USED.search(line)) and name:
            out.append((name, int(match[1]), spilled))
            name = None
    return out


def main():
    build = sys.argv[1] if len(sys.argv) > 1 else "build"
    ptxas, cuobjdump = tool("ptxas"), tool("cuobjdump")
    known = subprocess.run([ptxas, "--help"], check=True, capture_output=True, text=True).stdout
    asked = sys.argv[2:] or "80 86 89 90 100 120".split()
    unknown = [cc for cc in asked if f"'sm_{cc}'" not in known]
    capabilities = [cc for cc in asked if cc not in unknown]
    if unknown:
        print("this ptxas does not know", *unknown)
    total = bad = 0
    with tempfile.TemporaryDirectory() as folder:
        ptx = ptx_of(build, folder, cuobjdump)
        if not ptx:
            skip(f"{build} has no PTX of these kernels: only a full build has")
        tasks = [(name, cc) for name in ptx for cc in capabilities]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            results = pool.map(lambda task: kernels(ptxas, ptx[task[0]], task[1]), tasks)
            for (name, cc), found in zip(tasks, results):
                total += len(found)
                for kernel, registers, spilled in found:
                    if spilled:
                        taken = cc not in LITTLE_SHARED or not LARGE.search(kernel)
                        bad += taken
                        note = "" if taken else ", never taken there"
                        print(f"{name}, sm_{cc}: {kernel}: {spilled} bytes in and out{note}")
                most = max((registers for _, registers, _ in found), default=0)
                print(f"{name}, sm_{cc}: {len(found)} kernels, up to {most} registers", flush=True)
    print(f"spills: {bad} of {total} kernels on {len(capabilities)} compute capabilities")
    sys.exit(bad > 0 or total == 0)


if __name__ == "__main__":
    main()
