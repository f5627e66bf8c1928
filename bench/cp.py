#!/usr/bin/env python3
"""Context parallelism on the GPUs of one host: one process a GPU, NCCL in the graphs. Needs numpy,
no torch.

    bench/cp.py                                # 1, 2, 4, 8 ranks as far as there are GPUs: 16K x 8,
                                                 128K, 1M tokens
    bench/cp.py --ranks 1,4 --tokens 128K      # some of it;  --sequences 8 shares the tokens out to
                                                 as many
    bench/cp.py --check                        # outputs, row by row of chunks, and dq against one
                                                 rank's bits
    bench/cp.py --kill 1                       # rank 1 dies during the third run: how every other
                                                 rank ends, and when
    bench/cp.py --stall 1 --deadline 5         # or it only sleeps, for longer than the deadline
    bench/cp.py --alone --ranks 2,8            # on one GPU: what each of so many ranks would take,
                                                 over wires of --wire GB/s
    bench/cp.py --seed PATH                    # and a checkout of
                                                 mdy666/Scalable-Flash-Native-Sparse-Attention
                                                 (needs torch)
    bench/cp.py --ranks 2 --against 93.2,163.1,256.1       # one rank's times as an earlier call
                                                             printed them: it does not run
    bench/cp.py --nodes                        # step by step besides: what the nodes of each op
                                                 take, by direction
    bench/cp.py --timeline FOLDER              # how long nothing but NCCL is on the GPU, and Chrome
                                                 traces, by torch's profiler
    bench/cp.py --device cpu --ranks 1,2 --tokens 2K --check      # the same over sockets, to try
                                                                    the kit

Times are medians in ms of the slowest rank, from where all ranks have met to the end of its GPU's
work: of each direction by itself, and of both one after the other with nothing between ("both").
"linear" is one rank's time over theirs, divided by the number of ranks. GPUs differ by several per
cent, so one rank runs on every GPU that the others will have, on all at once; each is printed, and
the slowest (by "both") is what "linear" measures against. In brackets stands what a line took from
start to end. --alone runs the first and the last rank by themselves: collectives take a rank's own
bytes for the others', by a kernel on 16 multiprocessors that takes as long as the wire would, and
nobody waits for anybody. "collectives", with --nodes, is what the collectives' nodes take step by
step: an upper bound of what is exposed, since graphs hide it behind other nodes. "exposed" is for
how long the timeline has a collective and no other kernel, on the rank where that is longest.
Clocks are the GPUs' own: lock them for figures to report.
"""

import argparse
import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]
CHUNKS = 16  # of the rows, for --check: 2 for each of the most ranks
MEET = 600  # s until a process that does not come is given up
WARM = 16384  # tokens of a sequence, for the seed's first call
TELL = 1000  # ms from which a call is long
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "halo", "halo_add")


WIRE = b"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry wire(.param .u64 to, .param .u64 from, .param .u64 n, .param .u64 ns)
.maxntid 512, 1, 1
{ // to[0 ... n) = from, 16 bytes each, in no less than ns
  .reg .pred %p;
  .reg .b32 %r<6>;
  .reg .b64 %d<12>;
  ld.param.u64 %d1, [to];
  ld.param.u64 %d2, [from];
  ld.param.u64 %d3, [n];
  ld.param.u64 %d4, [ns];
  mov.u64 %d5, %globaltimer;
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %tid.x;
  mad.lo.u32 %r1, %r1, 512, %r2;
  cvt.u64.u32 %d6, %r1;
  mov.u32 %r3, %nctaid.x;
  mul.wide.u32 %d7, %r3, 512;
COPY:
  setp.ge.u64 %p, %d6, %d3;
  @%p bra WAIT;
  shl.b64 %d8, %d6, 4;
  add.s64 %d9, %d1, %d8;
  add.s64 %d10, %d2, %d8;
  ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%d10];
  st.global.v4.u32 [%d9], {%r2, %r3, %r4, %r5};
  add.s64 %d6, %d6, %d7;
  bra COPY;
WAIT:
  mov.u64 %d11, %globaltimer;
  sub.s64 %d11, %d11, %d5;
  setp.lt.u64 %p, %d11, %d4;
  @%p bra WAIT;
  ret;
}
\0"""


class Alone:
    """One of several ranks, by itself: what the others would send are its own bytes, as late as
    `rate` GB/s bring them."""

    def __init__(self, _lib, cuda, rank, ranks, rate):
        self.rate, self.failed = rate, 0
        if cuda:
            self.cuda = ctypes.CDLL("libcuda.so.1")
            context, module, self.wire = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
            for call in (lambda: self.cuda.cuInit(0),
                         lambda: self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
                         lambda: self.cuda.cuCtxSetCurrent(context),
                         lambda: self.cuda.cuModuleLoadData(ctypes.byref(module), WIRE), lambda:
                         self.cuda.cuModuleGetFunction(ctypes.byref(self.wire), module, b"wire")):
                if code := call():
                    raise RuntimeError(f"the wire's kernel: error {code} of the driver")

        def gather(_, node, send, recv, size, stream, error):
            # greetings: {"regraph", format, size, rank, …} (cp/comm.h)
            if not stream and node == b"start-up":
                for r in range(ranks):
                    ctypes.memmove(recv + r * size, send, size)
                    ctypes.c_uint32.from_address(recv + r * size + 16).value = r
                return 0
            return max(
                self.move(recv + r * size, send, size, stream, r == rank) for r in range(ranks))

        def exchange(_, node, send, recv, size, stream, error):
            return max(
                self.move(recv + r * size, send + r * size, size, stream, r == rank)
                for r in range(ranks))

        def halo(_, node, h, size, stream, error):
            h = h.contents
            return max(rank > 0 and self.move(h.from_previous, h.to_previous, size, stream, False),
                       rank + 1 < ranks and self.move(h.from_next, h.to_next, size, stream, False))

        self.meet = lambda: None
        calls = gather, exchange, halo, lambda *_: 0, lambda *_: None
        self.stub = _lib.Comm(_lib.OP_ABI, ranks, rank, None,
                              *(t(f) for t, f in zip(_lib.COMM_FUNCTIONS, calls)), captures=cuda)
        self.handle = ctypes.addressof(self.stub)

    def move(self, to, source, size, stream, own):
        if not stream:
            ctypes.memmove(to, source, size)
            return 0
        values = [
            ctypes.c_uint64(x)
            for x in (to, source, size // 16, 0 if own else int(size / self.rate))
        ]
        places = (ctypes.c_void_p * 4)(*(ctypes.addressof(v) for v in values))
        code = self.cuda.cuLaunchKernel(self.wire, 16, 1, 1, 512, 1, 1, 0, ctypes.c_void_p(stream),
                                        places, None)
        return 15 if code or size % 16 else 0

    def close(self):
        pass


class Comm:
    """This process's end of a communicator."""

    def __init__(self, _lib, context, rank, ranks, port, cuda, deadline):
        self._lib = _lib
        options = _lib.CommOptions(rank=rank, ranks=ranks, address=b"127.0.0.1", port=port,
                                   cuda=cuda, deadline=deadline)
        self.handle = _lib.create("rg_comm_processes", context.handle, ctypes.byref(options))

    def meet(self):
        comm, error = self._lib.Comm.from_address(self.handle), self._lib.Error()
        if comm.barrier(self.handle, b"bench/cp.py", ctypes.byref(error)):
            self._lib.fail(error)

    def close(self):
        self._lib.lib.rg_comm_destroy(self.handle, None)


def fill(_lib, plan, t, at, rows, tokens):
    """Normal numbers. Rows of a chunk depend on the chunk alone, so that ranks draw no more than
    their own."""
    import numpy as np
    from regraph import arrays

    table = arrays.convert(np.random.default_rng(1).standard_normal(1 << 16, np.float32), t.dtype)
    n = tokens // CHUNKS
    part = np.empty((n, *t.shape[1:]), table.dtype)
    pieces = np.array_split(part, min(16, n))

    def draw(job):
        seed, piece = job
        piece[...] = table[np.random.default_rng(seed).integers(0, 1 << 16, piece.shape, np.uint16)]

    first = 0
    with ThreadPoolExecutor() as pool:
        for own in rows:
            for c in range(own.start // n, own.stop // n):
                seed = int.from_bytes(
                    hashlib.sha256(f"{t.role} {t.name} {c}".encode()).digest()[:8], "little")
                list(pool.map(draw, [((seed, i), piece) for i, piece in enumerate(pieces)]))
                _lib.call("rg_memory_write", plan.handle, at.address + first, part.ctypes.data,
                          part.nbytes)
                first += part.nbytes


def covered(spans):
    """Of (begin, end) in order of begin: the union, as disjoint ones."""
    out = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([begin, end])
    return out


def length(spans):
    return sum(end - begin for begin, end in spans)


def timeline(directions, trace):
    """For each direction, ms: from the first kernel to the last, with one of NCCL, with one of NCCL
    alone, with none."""
    import torch

    torch.cuda.init()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for run in directions * 2:  # the first two for warmth
            run()
            time.sleep(0.5)
    profiler.export_chrome_trace(str(trace))
    events = json.load(open(trace))["traceEvents"]
    events = sorted(((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events
                     if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")))
    groups, last = [], -1e18
    for begin, end, name in events:
        if begin - last > 3e5:
            groups.append([])
        groups[-1].append((begin, end, name))
        last = max(last, end)
    if len(groups) != 4:
        raise RuntimeError(f"the profiler saw {len(groups)} runs; expected 4")
    result = []
    for group in groups[2:]:
        wire = covered([e[:2] for e in group if "nccl" in e[2] or e[2] == "wire"])
        rest = covered(
            [e[:2] for e in group if not ("nccl" in e[2] or e[2] == "wire" or "stamp" in e[2])])
        both = covered(wire + rest)
        result.append([
            x / 1e3 for x in (both[-1][1] - both[0][0], length(wire), length(both) - length(rest),
                              both[-1][1] - both[0][0] - length(both))
        ])
    return result


def place(job, index):
    """The GPU that process `index` of a launch has, for all that it will do."""
    if job["device"] == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = job["gpus"][0 if job["alone"] else index]


def measure(job, meet, forward, backward, wait, tell=False):
    """ms of each run: forward, backward, and both with nothing between; `meet` returns when all are
    there. `tell`: of long ones as they come."""
    times = []
    for run in range(job["runs"]):
        row = []
        for calls in (forward,), (backward,), (forward, backward):
            meet(run if calls == (forward,) else None)
            begun = time.perf_counter()
            for each in calls:
                each()
            wait()
            row.append(1e3 * (time.perf_counter() - begun))
            if row[-1] > TELL and tell:
                print(
                    f"  run {run + 1} of {job['runs']}: {' and '.join(f.__name__ for f in calls)} "
                    f"took {row[-1] / 1e3:.1f} s",
                    file=sys.stderr, flush=True)
        times.append(row)
    return times


def work(job, index, port, barrier, pipe):
    rank = index if job["ranks"] > 1 else 0
    place(job, index)
    import numpy as np
    from regraph import _lib, arrays, core

    try:
        context = core.Context()
        ranks, tokens = job["ranks"], job["tokens"]
        comm = None
        if ranks > 1 and job["alone"]:
            comm = Alone(_lib, job["device"] == "cuda", rank, ranks, job["wire"])
        elif ranks > 1:
            comm = Comm(_lib, context, rank, ranks, port, job["device"] == "cuda", job["deadline"])
        spec = core.Spec(str(ROOT / "examples/nsa.json"), context, **job["params"])
        policy = {"regraph_policy": 1, "cp": {"ranks": ranks}, **job["policy"]}
        plan = core.Plan(spec, core.Policy(policy, context), device=job["device"], T=tokens,
                         B=job["sequences"])
        starts = (np.arange(job["sequences"] + 1) * tokens // job["sequences"]).astype(np.int32)
        rows = core.cp_rows(starts, tokens, ranks, rank) if ranks > 1 else [slice(0, tokens)]
        options = _lib.SessionOptions(eager=job["eager"], comm=comm.handle if comm else None)
        session = _lib.create("rg_session_create", plan.handle, ctypes.byref(options))
        memory = {}
        for t in plan.tensors:
            at = core.DeviceMemory(plan, t.nbytes)
            memory[t.role, t.name] = at, t
            _lib.call("rg_session_bind", session, t.role, t.name.encode(), at.address, t.nbytes)
            if t.role not in (_lib.INPUT, _lib.GRAD_IN):
                continue
            if t.name == "cu_seqlens":
                at.write(starts)
                continue
            fill(_lib, plan, t, at, rows, tokens)

        def forward():
            _lib.call("rg_session_forward", session)

        def backward():
            _lib.call("rg_session_backward", session)

        def wait():
            _lib.call("rg_session_synchronize", session)

        def meet(run):
            comm.meet() if comm else barrier.wait(MEET)
            if job["kill"] == rank and run == 2:
                forward()
                pipe.send({"failed": "is killed", "at": time.time()})
                os.kill(os.getpid(), signal.SIGKILL)
            if job["stall"] == rank and run == 2:
                pipe.send({"failed": "sleeps", "at": time.time()})
                time.sleep(job["deadline"] + 5)

        times = measure(job, meet, forward, backward, wait, index == 0)
        nodes, node, i = {}, _lib.NodeTime(), 0
        while _lib.lib.rg_session_node_time(session, i, ctypes.byref(node)) == 0:
            i += 1
            at = node.op.decode(), bool(node.backward)
            nodes[at] = nodes.get(at, 0) + node.ms
        trace = job["timeline"] and Path(job["timeline"]) / f"{tokens}-{index}-of-{ranks}.json"
        seen = timeline([lambda f=f: (meet(None), f(), wait())
                         for f in (forward, backward)], trace) if trace else None
        hashes = {}
        for role, name in ((_lib.OUTPUT, "o"), (_lib.GRAD_OUT, "q")) if job["check"] else ():
            at, t = memory[role, name]
            got = np.empty(t.shape, arrays.NUMPY[t.dtype])
            at.read(got)
            first = 0
            for own in rows:
                for c in range(own.start * CHUNKS // tokens, own.stop * CHUNKS // tokens):
                    n = tokens // CHUNKS
                    hashes[name, c] = hashlib.sha256(got[first:first + n].tobytes()).hexdigest()
                    first += n
        pipe.send({
            "times": times, "nodes": nodes, "timeline": seen, "hashes": hashes,
            "comm": plan.sizes.comm, "peak": plan.sizes.predicted_peak
        })
        _lib.lib.rg_session_destroy(session)
        if comm:
            comm.close()
    except Exception as problem:  # told to the parent, which prints it
        barrier.abort()
        pipe.send({"failed": str(problem) or repr(problem), "at": time.time()})
        os._exit(1)


def seed_work(job, index, port, barrier, pipe):
    """The same by the seed: its own rule for the mode, one head at a time, as its own bench has
    it."""
    rank = index if job["ranks"] > 1 else 0
    place(job, index)
    import torch
    from seed_shim import Seed

    try:
        ranks, tokens, group, p = job["ranks"], job["tokens"], None, job["params"]
        if ranks > 1:
            torch.distributed.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank,
                                                 world_size=ranks)
            group = torch.distributed.new_group(list(range(ranks)))
        seed = Seed(job["seed"], p, group, recompute=bool(job["policy"]))
        o, sequences = None, job["sequences"]

        def inputs(tokens):
            def normal(*shape):
                return torch.randn(tokens // ranks, *shape, device="cuda", dtype=torch.bfloat16)

            x = [
                normal(p["H"], p["D"]),
                normal(p["KH"], p["D"]),
                normal(p["KH"], p["DV"]),
                normal(p["H"], 3)
            ]
            cu = (torch.arange(sequences + 1) * tokens // sequences).to("cuda", torch.int32)
            return [t.requires_grad_() for t in x], normal(p["H"], p["DV"]), cu

        def forward():
            nonlocal o
            o = seed(*x, cu, 2 if 1 / sequences >= 1.5 / ranks else 1)

        def backward():
            for t in x:
                t.grad = None
            o.backward(d_o)

        def meet(_):
            barrier.wait(MEET)

        x, d_o, cu = inputs(min(tokens, WARM * sequences))
        forward()  # compiles its kernels
        backward()
        o = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        x, d_o, cu = inputs(tokens)
        times = measure(job, meet, forward, backward, torch.cuda.synchronize, index == 0)
        pipe.send(
            {"times": times, "peak": torch.cuda.max_memory_allocated(), "swa": seed.swa_backend})
        if group:
            torch.distributed.destroy_process_group()
    except Exception as problem:
        barrier.abort()
        pipe.send({"failed": str(problem) or repr(problem), "at": time.time()})
        os._exit(1)


def launch(job, work=work):
    """Each rank's result, from a process of its own. One rank runs once on each GPU, on all at
    once; ranks that are alone run one after the other, the first and the last."""
    if job["alone"] and job["ranks"] > 1:
        return [run([r], job, work)[0] for r in (0, job["ranks"] - 1)]
    return run(range(job["ranks"] if job["ranks"] > 1 else job["used"]), job, work)


def run(ranks, job, work):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe(False) for _ in ranks]
    barrier = context.Barrier(len(ends))
    processes = [
        context.Process(target=work, args=(job, r, port, barrier, end))
        for r, (_, end) in zip(ranks, ends)
    ]
    for p in processes:
        p.start()
    for _, child in ends:
        child.close()
    results = []
    for mine, _ in ends:
        try:
            results.append(mine.recv())
        except EOFError:
            results.append({"failed": "ended without a word", "at": time.time()})
    for p in processes:
        p.join()
    return results


def size(text):
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1].lower())
    return int(text[:-1]) * scale if scale else int(text)


def gpus():
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [d.name[6:] for d in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def main():
    a = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--ranks", help="such as 1,2,4,8")
    a.add_argument("--tokens", default="16K,128K,1M")
    a.add_argument("--sequences", type=int,
                   help="default: 8 at 16K (each of 16K: T is 128K), else 1")
    a.add_argument("--runs", type=int, default=7)
    a.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    a.add_argument("--check", action="store_true")
    a.add_argument("--kill", type=int, default=-1, metavar="RANK")
    a.add_argument("--stall", type=int, default=-1, metavar="RANK")
    a.add_argument("--seed", type=Path)
    a.add_argument("--deadline", type=float, default=30)
    a.add_argument("--alone", action="store_true")
    a.add_argument("--wire", type=float, default=200, metavar="GB/S")
    a.add_argument("--against", metavar="MS,MS,MS")
    a.add_argument("--nodes", action="store_true")
    a.add_argument("--timeline", metavar="FOLDER")
    o = a.parse_args()
    have = gpus() if o.device == "cuda" else [str(i) for i in range(8)]
    ranks = [int(r) for r in o.ranks.split(",")
             ] if o.ranks else [r for r in (1, 2, 4, 8) if r <= len(have)]
    if not ranks or max(ranks) > (8 if o.alone and have else len(have)) or any(CHUNKS % (2 * r)
                                                                               for r in ranks):
        sys.exit(f"bench/cp.py: ranks {ranks}, GPUs {have}: nothing to run")
    params = {"H": 64, "KH": 4} if o.device == "cuda" else {"H": 4, "KH": 2, "D": 16, "DV": 16}
    whole_params = {**json.load(open(ROOT / "examples/nsa.json"))["params"], **params}
    bad, victim = 0, max(o.kill, o.stall)
    for text in o.tokens.split(","):
        tokens, sequences = size(text), o.sequences or 1
        if text == "16K" and not o.sequences:
            tokens, sequences = 8 * tokens, 8
        whole = tokens >= 1 << 20  # everything recomputed, or it does not fit
        job = {
            "device": o.device, "gpus": have, "tokens": tokens, "sequences": sequences,
            "params": params, "runs": o.runs,
            "policy": {"preset": "all", "split_heads": 1} if whole else {}, "check": o.check,
            "kill": -1, "stall": -1, "deadline": o.deadline, "eager": False, "timeline": None,
            "alone": o.alone, "wire": o.wire,
            "used": 1 if o.alone or o.device == "cpu" else max(ranks)
        }
        alone = {"ours": [float(ms) for ms in o.against.split(",")]} if o.against else {
        }  # one rank's medians; hashes
        for n in ranks:
            head = f"{text:>5} x {sequences}  {n} ranks  "

            def times(results, label, begun):
                """Of the slowest rank; of one rank, for each GPU, and the slowest GPU's are
                kept."""
                def medians(results):
                    counted = range(o.runs > 1, o.runs)
                    return [
                        statistics.median(max(x["times"][i][d]
                                              for x in results)
                                          for i in counted)
                        for d in range(3)
                    ]

                def tell(ms, peak):
                    whats = zip(("forward", "backward", "both"), ms)
                    return "".join(f"{what} {t:9.3f}  " for what, t in whats) + \
                        f"peak {peak / 2**30:.2f} GiB"

                if n == 1:
                    each = [medians([x]) for x in results]
                    alone[label] = max(each, key=lambda ms: ms[2])
                    return "\n".join(f"{head}{label:<6} {tell(ms, x['peak'])}" +
                                     (len(each) > 1) * f"  on GPU {have[g]}" +
                                     (len(each) > 1 and ms is alone[label]) *
                                     ", the slowest, which \"linear\" is against"
                                     for g, (ms, x) in enumerate(zip(
                                         each, results))) + f"  ({time.time() - begun:.0f} s)"
                ms = medians(results)
                line = f"{head}{label:<6} {tell(ms, max(x['peak'] for x in results))}"
                if label in alone:
                    line += "  linear " + " ".join(f"{one / t / n:5.3f}"
                                                   for one, t in zip(alone[label], ms))
                return line + f"  ({time.time() - begun:.0f} s)"

            fate = {"kill": o.kill, "stall": o.stall} if n > 1 else {}
            started = begun = time.time()
            results = launch({**job, **fate, "ranks": n, "timeline": o.timeline})
            if fate and victim >= 0:
                begun = results[victim].get("at", begun)
            failed = [
                f"rank {r}: {x['failed']} after {x['at'] - begun:.1f} s"
                for r, x in enumerate(results)
                if "failed" in x
            ]
            if failed:
                bad += victim < 0 or any(
                    "RG_E_COMM" not in x.get("failed", "") or x["at"] - begun > o.deadline + 2
                    for r, x in enumerate(results)
                    if r != victim)
                print(head + "; ".join(failed), flush=True)
                continue
            line = times(results, "ours", started)
            if n > 1:
                line += f"  comm {results[0]['comm'] / 2**20:.1f} MiB"
            steps = launch({**job, "ranks": n, "eager": True, "runs": 2}) if o.nodes else []
            if any("failed" in x for x in steps):
                steps = []
            if n > 1 and steps:
                spent = max(
                    sum(ms
                        for (op, _), ms in x["nodes"].items()
                        if op in COLLECTIVES)
                    for x in steps)
                line += f"  collectives {spent:8.3f}"
            if o.check and n == 1:
                alone["hashes"] = results[0]["hashes"]
                differ = sum(x["hashes"] != alone["hashes"] for x in results)
                bad += differ
                if differ:
                    line += f"  GPUS DIFFER: {differ} of {len(results)} have other bits than "
                    line += "the first"
            if o.check and n > 1 and "hashes" in alone:
                want, got = alone["hashes"], {k: v for x in results for k, v in x["hashes"].items()}
                wrong = [k for k in want if got.get(k) != want[k]]
                bad += len(wrong)
                same = len(want) - len(wrong)
                line += f"  {same} of {len(want)} chunks of o and dq are one rank's bits"
            print(line, flush=True)
            for d, direction in enumerate(("forward", "backward")):
                if o.timeline:
                    span, wire, exposed, idle = (max(x["timeline"][d][i]
                                                     for x in results)
                                                 for i in range(4))
                    print(
                        f"      {direction}: {span:.3f} ms on the GPU, NCCL in {wire:.3f}, "
                        f"exposed {exposed:.3f} "
                        f"({100 * exposed / span:.1f} %), nothing in {idle:.3f}", flush=True)
                if o.nodes and steps:
                    spent = {
                        op: max(x["nodes"].get((op, bool(d)), 0)
                                for x in steps)
                        for op, _ in steps[0]["nodes"]
                    }
                    print(
                        f"      {direction}, step by step: " +
                        ", ".join(f"{op} {ms:.3f}"
                                  for op, ms in sorted(spent.items(), key=lambda x: -x[1])
                                  if ms), flush=True)
            if o.seed:
                begun = time.time()
                results = launch({**job, "ranks": n, "params": whole_params, "seed": str(o.seed)},
                                 seed_work)
                failed = [x["failed"] for x in results if "failed" in x]
                print(head + "seed   " + failed[0] if failed else times(results, "seed", begun),
                      flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
