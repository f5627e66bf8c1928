#!/usr/bin/env python3
"""Shared memory given back while a read of it may still be under way, found in machine code:

    tests/releases.py [BUILD | FILE …]   a build folder (default: build), or libraries, objects,
    cubins

A load from shared memory names a scoreboard in its control bits; only an instruction that waits for
that scoreboard knows that the data has left shared memory. Arriving at an mbarrier does not wait by
itself, and whoever it lets go on may have the copy engine overwrite what is still to be read. So
this follows each kernel's flow graph and lists every arrive that can be reached from an LDS or LDSM
(or a load through a generic address, LD) with no wait for its scoreboard in between.

Left out, since they give nothing back to the copy engine: arrives that announce bytes (a
producer's), and named barriers, behind which only ordinary accesses and wgmma come (docs/gpu.md,
"Hand-overs"). What products (wgmma) read is not looked at: they wait in their own way, see
device/mbarrier.cuh.

Control bits of a 128-bit instruction, sm_70 to sm_90: 110-112 the scoreboard it sets when its
result is there (7: none), 116-121 a mask of those it waits for. DEPBAR.LE SBn, 0x0 waits as well.

It needs cuobjdump and nvdisasm, of CUDA or of its pip packages, in PATH, /usr/local/cuda/bin or
$CUDA_BIN. Exit code 1 on any finding, 77 where a disassembler is missing.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);?\s*/\* 0x([0-9a-f]{16}) \*/")
MORE = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_x_\d+|\$?[\w$.]+):")
PLACE = re.compile(r'//## File "([^"]*)", line (\d+)')
PREDICATE = re.compile(r"^@!?U?P[0-9T]+\s+")
TARGET = re.compile(r"`\(([^)]*)\)")
READS = ("LDS", "LDSM", "LD")
BOARDS = 6


class Instruction:
    def __init__(self, at, text, low, place):
        self.at, self.place, self.low, self.board, self.waits = at, place, low, 7, 0
        self.predicated = bool(PREDICATE.match(text))
        self.text = PREDICATE.sub("", text).strip().rstrip(";").strip()
        self.op, _, self.operands = self.text.partition(" ")
        self.next = []

    def control(self, high):
        self.board, self.waits = high >> 46 & 7, high >> 52 & 63
        if re.match(r"DEPBAR\.LE SB\d, 0x0\b", self.text):
            self.waits |= 1 << int(self.operands[2])

    @property
    def reads(self):
        return self.op.split(".")[0] in READS

    @property
    def arrives(self):
        return self.op.startswith("SYNCS.ARRIVE") and ".A1T0" in self.op


def tool(name):
    for folder in [os.environ.get("CUDA_BIN"), None, "/usr/local/cuda/bin"]:
        found = shutil.which(name, path=folder)
        if found:
            return found
    print(f"{os.path.basename(sys.argv[0])[:-3]} SKIPPED: no {name} on this machine")
    sys.exit(77)


def kernels(cubin, nvdisasm):
    """(name, instructions, {label: index}) of each code section."""
    text = subprocess.run(
        [nvdisasm, "-c", "-hex", "-g", cubin], check=True, capture_output=True, text=True
    ).stdout
    name, code, labels, place = None, [], {}, None
    for line in text.splitlines():
        if line.startswith(".text.") and line.endswith(":"):
            if code:
                yield name, code, labels
            name, code, labels, place = line[6:-1], [], {}, None
        elif m := LINE.match(line):
            code.append(Instruction(int(m[1], 16), m[2], int(m[3], 16), place))
        elif (m := MORE.match(line)) and code:
            code[-1].control(int(m[1], 16))
        elif m := PLACE.search(line):
            place = f"{os.path.basename(m[1])}:{m[2]}"
        elif m := LABEL.match(line):
            labels[m[1]] = len(code)
    if code:
        yield name, code, labels


def connect(code, labels):
    """Successors of each instruction. BSYNC goes where a BSSY of its register points, see
    follow()."""
    every = sorted({i for i in labels.values() if i < len(code)})
    for i, x in enumerate(code):
        onward = [i + 1] if i + 1 < len(code) else []
        targets = [labels[t] for t in TARGET.findall(x.operands) if t in labels]
        op = x.op.split(".")[0]
        if op in ("EXIT", "RET", "KILL"):
            x.next = onward if x.predicated else []
        elif op in ("BRX", "BRXU", "JMX", "JMXU"):
            listed = re.findall(r"\.L_x_\d+", x.text)
            x.next = [labels[t] for t in listed] or every
        elif op == "BRA":
            plain = x.op in ("BRA", "BRA.U") and x.operands.strip().startswith("`(")
            always = plain and not x.predicated
            x.next = targets + ([] if always else onward)
        elif op in ("WARPSYNC", "CALL"):
            x.next = targets + onward
        elif op == "BSYNC":
            x.next = onward if x.predicated else []
        else:
            x.next = onward


def follow(code, labels):
    """{arrive: loads} that no wait separates. A state is, for each scoreboard, the loads that it
    stands for, and for each convergence barrier, the labels that it may lead to; all as bits."""
    reads = [i for i, x in enumerate(code) if x.reads and x.board < BOARDS]
    bit = {i: 1 << n for n, i in enumerate(reads)}
    state = {0: ((0,) * BOARDS, ())}
    work, found = [0], {}
    while work:
        i = work.pop()
        boards, goals = state[i]
        x = code[i]
        if x.waits:
            boards = tuple(0 if x.waits >> b & 1 else v for b, v in enumerate(boards))
        if x.arrives and any(boards):
            for v in boards:
                found[i] = found.get(i, 0) | v
        if i in bit:
            boards = tuple(v | bit[i] if b == x.board else v for b, v in enumerate(boards))
        onward = x.next
        op = x.op.split(".")[0]
        if op == "BSSY":
            register = x.operands.split(",")[0].strip()
            goal = (register, labels[TARGET.search(x.operands)[1]])
            goals = tuple(sorted([g for g in goals if g[0] != register] + [goal]))
        elif op == "BSYNC":
            onward = onward + [g[1] for g in goals if g[0] == x.operands.strip()]
        for n in onward:
            old = state.get(n)
            if old is None:
                state[n] = (boards, goals)
            else:
                merged = (
                    tuple(a | b for a, b in zip(old[0], boards)),
                    tuple(sorted({*old[1], *goals})),
                )
                if merged == old:
                    continue
                state[n] = merged
            work.append(n)
    return {i: [r for r in reads if bit[r] & bits] for i, bits in found.items()}


def plain(names):
    if not names or not shutil.which("c++filt"):
        return {n: n for n in names}
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True).stdout.splitlines()
    return dict(zip(names, out))


def where(x):
    return f"{x.at:#06x} {x.text[:44]}" + (f"  {x.place}" if x.place else "")


def cubins(files, folder, cuobjdump):
    for n, file in enumerate(files):
        if file.endswith(".cubin"):
            yield file
            continue
        into = os.path.join(folder, str(n))
        os.mkdir(into)
        subprocess.run(
            [cuobjdump, "-xelf", "all", os.path.abspath(file)],
            check=True,
            cwd=into,
            capture_output=True,
        )
        yield from sorted(glob.glob(os.path.join(into, "*.cubin")))


def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    files = sys.argv[1:] or [os.path.join(here, "build")]
    if os.path.isdir(files[0]): # only files of that name use mbarriers
        files = glob.glob(os.path.join(files[0], "CMakeFiles/*/kernels/**/*_sm90.cu.o"),
                          recursive=True)
    if not files:
        print("releases SKIPPED: a build without CUDA")
        sys.exit(77)
    nvdisasm, cuobjdump = tool("nvdisasm"), tool("cuobjdump")
    seen = arrives = bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for cubin in cubins(files, folder, cuobjdump):
            all_kernels = list(kernels(cubin, nvdisasm))
            names = plain([k[0] for k in all_kernels])
            for name, code, labels in all_kernels:
                connect(code, labels)
                seen += 1
                arrives += sum(x.arrives for x in code)
                for at, loads in sorted(follow(code, labels).items()):
                    bad += 1
                    print(f"{names[name][:160]}\n  {where(code[at])}  reached before the data of")
                    for load in loads:
                        print(f"    {where(code[load])}")
    print(f"{seen} kernels, {arrives} arrives: {bad} may come before what was read")
    if not arrives:
        print("no machine code with arrives found")
    return 1 if bad or not arrives else 0


if __name__ == "__main__":
    sys.exit(main())
