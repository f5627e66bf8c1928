#!/usr/bin/env python3
"""regraph beside torch's attention, FlashAttention 4, cuDNN frontend and a Triton NSA (the seed),
on one GPU: times, and branch by branch numbers.

    bench/compare.py                               # shape S (64/4 heads), 4K … 128K: regraph and
                                                     the dense peers
    bench/compare.py --seed PATH                   # and a checkout of
                                                     mdy666/Scalable-Flash-Native-Sparse-Attention
    bench/compare.py --shape g4 --tokens 8K,32K    # 32/8 heads;  s192: d_qk 192;  pack: 64K tokens
                                                     as 13 sequences
    bench/compare.py --choices all                 # selected attention alone, on choices drawn in
                                                     three ways
    bench/compare.py --check --seed PATH           # numbers instead of times: outputs and gradients
                                                     against the seed's
    bench/compare.py --json a.json … ; bench/compare.py --merge a.json b.json --plot times.svg
    bench/compare.py --dry-run …                   # what would be measured and which peers are
                                                     here; needs no GPU

Times are medians in ms between CUDA events, each run after a write of 512 MB (L2 holds nothing of
its tensors, and the host has enqueued the run before the GPU comes to it). "replay" is our CUDA
graph, "eager" the same steps launched one by one. Every peer computes dense causal attention except
the seed, which computes what we do. A peer that fails gets a dash and its reason.

Peers are used where they are installed: flash-attn-4 (whose window then serves the seed too),
nvidia-cudnn-frontend with nvidia-cutlass-dsl (forward of selected attention alone; it has no
backward).
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "bench")]

BASE = {
    "D": 128, "DV": 128, "kernel": 32, "stride": 16, "block": 64, "top_n": 16, "init": 1,
    "local": 2, "window": 512
}
SHAPES = {
    "s": {"H": 64, "KH": 4, **BASE}, "g4": {"H": 32, "KH": 8, **BASE},
    "s192": {"H": 64, "KH": 4, **BASE, "D": 192}, "pack": {"H": 64, "KH": 4, **BASE}
}
TOKENS = {
    "s": "4K,8K,16K,32K,64K,128K", "g4": "8K,16K,32K,64K", "s192": "8K,32K,128K", "pack": "64K"
}
PACK = (8192, 8192, 8192, 8192, 8192, 6000, 5000, 4096, 4096, 2500, 2048, 580, 256)  # 65536 in all
LABELS = {"replay": "regraph", "eager": "regraph, step by step", "cudnn": "cuDNN, dense",
          "fa2": "FlashAttention 2, dense", "fa4": "FlashAttention 4, dense",
          "selected": "cuDNN frontend, selected attention", "seed": "Triton NSA"}
PEERS = {"fa4": "flash_attn.cute", "selected": "cudnn"}  # modules that may not be there
SIDES = {"ours": LABELS["replay"], "seed": LABELS["seed"]}  # of the times by part


def sizes(text):
    return [int(float(t[:-1]) * 1024) if t[-1] in "kK" else int(t) for t in text.split(",")]


def lengths(shape, tokens):
    if shape != "pack":
        return (tokens,)
    parts = [n * tokens // 65536 for n in PACK]
    return (*parts[:-1], tokens - sum(parts[:-1]))


# ---- tensors and timing ----


def make(torch, p, tokens, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = (p["H"], p["D"]), (p["KH"], p["D"]), (p["KH"], p["DV"]), (p["H"], 3), (p["H"], p["DV"])
    *x, d_o = (torch.randn(tokens, *s, generator=g, device="cuda", dtype=torch.bfloat16)
               for s in shapes)
    return [t.requires_grad_() for t in x], d_o


# Of how many neighbours a block's rank among the chosen is the same: each query draws for itself;
# one in ten blocks is drawn anew at each query, so that neighbours keep about 90 % of their choice;
# all queries of a block choose alike.
CHOICES = {"scattered": 1, "correlated": 10, "shared": None}


def mixed(x):
    """Bits of integers stirred, as splitmix64 does."""
    x = (x ^ (x >> 31)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 30)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 32)


def choose(torch, p, parts, how, device="cuda", seed=0):
    """idx [T, KH, top_n], ascending, -1 last: the first and the local blocks of each query, and
    others before it by drawn rank."""
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    size, keep, top = p["block"], CHOICES[how] or p["block"], p["top_n"]
    idx = torch.full((sum(parts), p["KH"], top), -1, dtype=torch.int32, device=device)
    heads = torch.arange(p["KH"], device=device)[None, :, None]
    row = 0
    for length in parts:
        for first in range(0, length, 2048):
            at = torch.arange(first, min(first + 2048, length), device=device)[:, None, None]
            own = at // size
            block = torch.arange(int(own.max()) + 1, device=device)[None, None, :]
            name = mixed(block * 4096 + heads + seed * 0x5851F42D)
            phase = name % keep if CHOICES[how] else 0
            rank = mixed(name ^ mixed((at + phase) // keep + 1)).clamp(low + 1, high - 1)
            rank = torch.where((block < p["init"]) | (block > own - p["local"]), high, rank)
            rank = torch.where(block > own, low, rank).expand(-1, p["KH"], -1)
            n = min(top, block.numel())
            best, which = rank.topk(n, dim=-1)
            which = torch.where(best == low, block.numel(), which).sort(-1).values
            idx[row + first:row + first + at.numel(), :, :n] = torch.where(
                which == block.numel(), -1, which).int()
        row += length
    return idx


def starts(torch, parts):
    return torch.tensor([0, *parts], device="cuda").cumsum(0).int()


class Clock:
    def __init__(self, torch, seconds):
        self.torch, self.seconds = torch, seconds
        self.flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def once(self, function):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def median(self, function):
        """After two warm-up runs, at least 3 and at most 50 runs, for as long as the limit
        allows."""
        self.once(function)
        ms = max(self.once(function), 1e-3)
        return statistics.median(
            self.once(function) for _ in range(max(3, min(50, int(self.seconds * 1000 / ms)))))

    def both(self, forward, x, d_o):
        """Medians of forward (with gradients to come) and backward."""
        torch, result = self.torch, {}
        result["forward"] = self.median(forward)
        o = forward()
        result["backward"] = self.median(lambda: torch.autograd.grad(o, x, d_o, retain_graph=True))
        return result


# ---- the contestants: each gives a forward closure and what it differentiates ----


def ours(torch, p, x, cu, eager):
    import regraph.torch

    attend = regraph.torch.attention(ROOT / "examples" / "nsa.json", eager=eager, **p)
    return (lambda: attend(*x, cu)), attend


def cudnn(torch, p, x):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in x[:3])

    def forward():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                 enable_gqa=True)
        return o.squeeze(0).transpose(0, 1)

    return forward


def fa2(p, x, cu, longest):
    from seed_shim import Flash

    return lambda: Flash.apply(*x[:3], cu, cu, longest, longest, None, True, (-1, -1))


def fa4(x, cu, parts):
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    if len(parts) == 1:
        q, k, v = (t.unsqueeze(0) for t in x[:3])
        return lambda: first(flash_attn_func(q, k, v, causal=True)).squeeze(0)
    return lambda: first(
        flash_attn_varlen_func(*x[:3], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(parts),
                               max_seqlen_k=max(parts), causal=True))


def selected(torch, p, x, idx, cu, longest):
    """cuDNN frontend's selected attention, forward."""
    from cudnn.native_sparse_attention.selection.api import SelectionAttention

    q, k, v = (t.detach() for t in x[:3])
    o = torch.empty(*q.shape[:2], p["DV"], dtype=q.dtype, device=q.device)
    sums, most = (torch.empty(*q.shape[:2], 1, device=q.device) for _ in range(2))
    count, idx = (idx >= 0).sum(-1).int(), idx.clamp(min=0)
    api = SelectionAttention(q, k, v, o, sums, most, idx, count, cu, cu, longest, longest,
                             block_size=p["block"], scale_softmax=p["D"]**-0.5, is_causal=True)
    api.check_support()
    api.compile()

    def forward():
        api.execute(q, k, v, o, sums, most, idx, count, cu, cu)
        return o

    return forward


def seed_branches(clock, seed, x, cu, d_o):
    """Forward ms of each part of the seed."""
    q, k, v, gate = (t.detach() for t in x)
    seed.start(cu)
    with clock.torch.no_grad():
        ck, cv = seed.compressed(k, v)
        cmp, lse = seed.cmp(q, ck, cv)
        topk = seed.select(q, ck, lse)
        slc, swa = seed.slc(q, k, v, topk), seed.swa(q, k, v)
        parts = {
            "compress_kv": lambda: seed.compressed(k, v), "cmp_o": lambda: seed.cmp(q, ck, cv),
            "topk": lambda: seed.select(q, ck, lse), "slc_o": lambda: seed.slc(q, k, v, topk),
            "swa_o": lambda: seed.swa(q, k, v),
            "combine": lambda: seed.combine(cmp, slc, swa, gate)
        }
        return {name: clock.median(part) for name, part in parts.items()}


def our_branches(torch, attend, x, cu, d_o):
    """Device ms of each step, forward and backward, medians over eager runs."""
    runs = []
    for _ in range(7):
        o = attend(*x, cu)
        forward = [step for step in attend.times(*x, cu) if not step[2]]
        torch.autograd.grad(o, x, d_o)
        runs.append(forward + [step for step in attend.times(*x, cu) if step[2]])
    return {
        runs[0][i][0]: statistics.median(run[i][3] for run in runs) for i in range(len(runs[0]))
    }


def here(name):
    """Is the peer's package installed?"""
    try:
        return importlib.util.find_spec(PEERS[name]) is not None
    except ImportError:  # not even the package around the module
        return False


def new_row(torch, shape, tokens, how=None):
    return {
        "shape": shape, "tokens": tokens, "choices": how, "gpu": torch.cuda.get_device_name(),
        "ms": {}, "branches": {}, "failed": {}
    }


def enter(torch, args, row, name, run):
    """row's times of contestant `name`, or why there are none."""
    if args.only and name not in args.only.split(","):
        return
    try:
        row["ms"][name] = run()
    except Exception as error:  # a peer may not support a shape, or run out of memory
        row["failed"][
            name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    torch.cuda.empty_cache()


def measure(torch, args, shape, tokens, seed):
    p, parts = SHAPES[shape], lengths(shape, tokens)
    x, d_o = make(torch, p, tokens)
    cu = starts(torch, parts)
    clock = Clock(torch, args.seconds)
    row = new_row(torch, shape, tokens)

    def run_ours(eager):
        forward, attend = ours(torch, p, x, cu, eager)
        result = clock.both(forward, x, d_o)
        sizes = attend.plan(*x, cu).sizes
        row["bytes"] = {"saved": sizes.saved, "scratch": sizes.scratch}
        if eager and args.branches:
            row["branches"]["ours"] = our_branches(torch, attend, x, cu, d_o)
        return result

    def run_seed():
        result = clock.both(lambda: seed(*x, cu), x, d_o)
        if args.branches:
            row["branches"]["seed"] = seed_branches(clock, seed, x, cu, d_o)
        return result

    entries = {"replay": lambda: run_ours(False), "eager": lambda: run_ours(True)}
    if len(parts) == 1:
        entries["cudnn"] = lambda: clock.both(cudnn(torch, p, x), x[:3], d_o)
    entries["fa2"] = lambda: clock.both(fa2(p, x, cu, max(parts)), x[:3], d_o)
    if here("fa4"):
        entries["fa4"] = lambda: clock.both(fa4(x, cu, parts), x[:3], d_o)
    if seed:
        entries["seed"] = run_seed
    for name, run in entries.items():
        enter(torch, args, row, name, run)
    return row


def measure_selected(torch, args, shape, tokens, seed, how):
    """Selected attention alone, on drawn choices; outputs are compared with ours."""
    import regraph.torch

    p, parts = SHAPES[shape], lengths(shape, tokens)
    x, d_o = make(torch, p, tokens)
    x, cu, idx = x[:3], starts(torch, parts), choose(torch, p, parts, how)
    clock, row = Clock(torch, args.seconds), new_row(torch, shape, tokens, how)
    attend = regraph.torch.attention(branch_specs()["slc"], **p)

    def forward():
        return attend(*x, idx, cu)

    want = forward().detach()

    def entered(other, run):
        rel = difference(other(), want)[0]
        if not rel < 1.2e-2:
            raise RuntimeError(f"rel RMS {rel:.1e} from regraph's output")
        return run()

    entries = {"replay": lambda: clock.both(forward, x, d_o)}
    if here("selected"):
        def run_selected():
            other = selected(torch, p, x, idx, cu, max(parts))
            return entered(other, lambda: {"forward": clock.median(other)})
        entries["selected"] = run_selected
    if seed:
        def run_seed():
            seed.start(cu)
            topk = torch.where(idx < 0, sum(-(-n // p["block"]) for n in parts),
                               idx).permute(1, 0, 2).contiguous()
            return entered(lambda: seed.slc(*x, topk),
                           lambda: clock.both(lambda: seed.slc(*x, topk), x, d_o))
        entries["seed"] = run_seed
    for name, run in entries.items():
        enter(torch, args, row, name, run)
    return row


# ---- numbers against the seed ----


def spec_of(inputs, node):
    """A spec of one or several nodes on tensors of shape S."""
    shapes = {
        "q": ["T", "H", "D"], "k": ["T", "KH", "D"], "v": ["T", "KH",
                                                           "DV"], "idx": ["T", "KH", "top_n"],
        "gate": ["T", "H", 3], **{name: ["T", "H", "DV"] for name in ("cmp_o", "slc_o", "swa_o")}
    }
    return {
        "regraph": 1, "name": node[-1]["name"], "params": {"H": 64, "KH": 4, **BASE}, "inputs": {
            **{
                name: {"shape": shapes[name], "dtype": "i32"} if name == "idx" else {
                    "shape": shapes[name], "dtype": "bf16", "grad": True
                } for name in inputs
            }, "cu_seqlens": {"shape": ["B+1"], "dtype": "i32"}
        }, "nodes": node, "outputs": {"o": "o"}
    }


def branch_specs():
    cu = {"cu_seqlens": "cu_seqlens"}
    block = {"kernel": "$kernel", "stride": "$stride"}
    return {
        "cmp": spec_of("qkv", [{
            "name": "compress_kv", "op": "compress_kv", "in": {"k": "k", "v": "v", **cu},
            "out": {"k": "ck", "v": "cv"}, "attrs": block
        }, {
            "name": "cmp_o", "op": "cmp_attn", "in": {"q": "q", "k": "ck", "v": "cv", **cu},
            "out": {"o": "o"}, "attrs": block
        }]), "slc": spec_of(["q", "k", "v", "idx"], [{
            "name": "slc_o", "op": "slc_attn", "in": {
                "q": "q", "k": "k", "v": "v", "idx": "idx", **cu
            }, "out": {"o": "o"}, "attrs": {"block": "$block"}
        }]), "swa": spec_of("qkv", [{
            "name": "swa_o", "op": "swa_attn", "in": {"q": "q", "k": "k", "v": "v", **cu},
            "out": {"o": "o"}, "attrs": {"window_left": "$window"}
        }]), "combine": spec_of(["cmp_o", "slc_o", "swa_o", "gate"], [{
            "name": "combine", "op": "combine",
            "in": {"o": ["cmp_o", "slc_o", "swa_o"], "gate": "gate", **cu}, "out": {"o": "o"}
        }])
    }


def our_index(torch, topk):
    """The seed's [KH, T, n] with large numbers for "none" as our [T, KH, n], ascending, -1 last."""
    none = 1 << 30
    limit = topk.shape[1] // BASE["block"] + 1
    idx = topk.permute(1, 0, 2).to(torch.int64)
    idx = torch.where((idx < 0) | (idx >= limit), none, idx).sort(-1).values
    return torch.where(idx == none, -1, idx).int().contiguous()


def difference(got, want):
    got, want = got.detach().float(), want.detach().float()
    error = (got - want).norm() / want.norm().clamp(min=1e-30)
    return error.item(), (got - want).abs().max().item(), want.abs().max().item()


def check(torch, shape, tokens, seed, limit=1.2e-2):
    """Outputs and gradients of each branch and of the whole, on the same tensors and the same
    indices."""
    import regraph.torch

    p, parts = SHAPES[shape], lengths(shape, tokens)
    x, d_o = make(torch, p, tokens, seed=1)
    q, k, v, gate = x
    cu = starts(torch, parts)
    seed.start(cu)
    worst = 0.0

    def compare(branch, inputs, names, want, got):
        nonlocal worst
        rows = [("o", got, want),
                *zip(["d" + n for n in names], torch.autograd.grad(got, inputs, d_o),
                     torch.autograd.grad(want, inputs, d_o))]
        for name, a, b in rows:
            rel, largest, scale = difference(a, b)
            worst = max(worst, rel)
            print(
                f"{shape:5} {tokens:7} {branch:8} {name:7} rel RMS {rel:.2e}   max {largest:.2e} "
                f"of {scale:.2e}"
                f"{'' if rel <= limit else '   ABOVE ' + str(limit)}", flush=True)

    attend = {name: regraph.torch.attention(spec, **p) for name, spec in branch_specs().items()}
    ck, cv = seed.compressed(k, v)
    cmp, lse = seed.cmp(q, ck, cv)
    topk = seed.select(q.detach(), ck.detach(), lse.detach())
    idx = our_index(torch, topk)
    compare("cmp", [q, k, v], "qkv", cmp, attend["cmp"](q, k, v, cu))
    compare("slc", [q, k, v], "qkv", seed.slc(q, k, v, topk), attend["slc"](q, k, v, idx, cu))
    compare("swa", [q, k, v], "qkv", seed.swa(q, k, v), attend["swa"](q, k, v, cu))
    with torch.no_grad():
        outs = [cmp, seed.slc(q, k, v, topk), seed.swa(q, k, v)]
    outs = [o.detach().clone().requires_grad_() for o in outs]
    compare("combine", [*outs, gate], ["cmp", "slc", "swa", "gate"], seed.combine(*outs, gate),
            attend["combine"](*outs, gate, cu))
    del outs, cmp, ck, cv
    whole = json.loads((ROOT / "examples" / "nsa.json").read_text())
    whole["outputs"]["idx"] = "idx"
    with torch.no_grad():
        ours = regraph.torch.attention(whole, **p)(q, k, v, gate, cu)
        picked = (ours["idx"][..., :, None] == idx[..., None, :]).any(-1) & (ours["idx"] >= 0)
        share = picked.sum().item() / (ours["idx"] >= 0).sum().item()
        rel, largest, scale = difference(ours["o"], seed(q, k, v, gate, cu))
    print(
        f"{shape:5} {tokens:7} whole    o       rel RMS {rel:.2e}   max {largest:.2e} of "
        f"{scale:.2e}, each with its own "
        f"selection: {100 * share:.2f} % of the blocks are the same", flush=True)
    return worst <= limit and share >= 0.99


# ---- reports ----


def table(rows):
    """The whole function's rows, then those of selected attention alone."""
    lines = []
    for group in ([r for r in rows if not r["choices"]], [r for r in rows if r["choices"]]):
        columns = [(n, d)
                   for n in LABELS
                   for d in ("forward", "backward")
                   if any(d in r["ms"].get(n, {}) for r in group)]
        if not columns:
            continue
        lines += [
            "", "| shape | tokens | " + ("choices | " if group[0]["choices"] else "") +
            " | ".join(f"{LABELS[n]} fwd" if d == "forward" else "bwd" for n, d in columns) + " |",
            "|---" * (len(columns) + (3 if group[0]["choices"] else 2)) + "|"
        ]
        for r in group:
            cells = [r["shape"], f"{r['tokens'] / 1024:g}K", *filter(None, [r["choices"]])]
            cells += [
                f"{r['ms'][n][d]:.3f}" if d in r["ms"].get(n, {}) else "–" for n, d in columns
            ]
            lines.append("| " + " | ".join(cells) + " |")
    for r in rows:
        for side, parts in r["branches"].items():
            lines.append(f"\n{r['shape']} {r['tokens'] // 1024}K, {SIDES[side]} by part: "
                         + ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items()))
        for name, reason in r["failed"].items():
            what = f"{r['shape']} {r['tokens'] / 1024:g}K" + (f", {r['choices']}"
                                                              if r["choices"] else "")
            lines.append(f"\n{what}, {LABELS[name]}: {reason}")
    return "\n".join(lines).lstrip("\n")


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if not r["choices"]]
    shapes = [s for s in SHAPES if sum(r["shape"] == s for r in rows) > 1]
    figure, axes = plt.subplots(len(shapes), 2, figsize=(11, 4.2 * len(shapes)), squeeze=False,
                                sharex="row")
    style = {
        "replay": ("C0", "o-"), "eager": ("C0", "o:"), "cudnn": ("C2", "s--"), "fa2": ("C7", "^--"),
        "fa4": ("C1", "v--"), "seed": ("C3", "D-")
    }
    for line, shape in enumerate(shapes):
        for axis, direction in zip(axes[line], ("forward", "backward")):
            for name, (color, marks) in style.items():
                points = sorted((r["tokens"], r["ms"][name][direction]) for r in rows
                                if r["shape"] == shape and name in r["ms"])
                if points:
                    axis.plot(*zip(*points), marks, color=color, label=LABELS[name], markersize=4)
            ticks = sorted({r["tokens"] for r in rows if r["shape"] == shape})
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(ticks, [f"{t // 1024}K" for t in ticks])
            axis.grid(alpha=0.3)
            p = SHAPES[shape]
            axis.set_title(
                f"{direction}, {p['H']}/{p['KH']} heads of {p['D']}, bf16, {rows[0]['gpu']}",
                fontsize=9)
            axis.set_xlabel("tokens")
            axis.set_ylabel("ms")
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def drawn(args):
    """The ways to draw choices; None: the whole function."""
    if not args.choices:
        return [None]
    ways = list(CHOICES) if args.choices == "all" else args.choices.split(",")
    if not set(ways) <= set(CHOICES):
        sys.exit(f"--choices takes some of {','.join(CHOICES)}, or all, not {args.choices}")
    return ways


def dry_run(args):
    for name in PEERS:
        print(f"{LABELS[name]}: {'installed' if here(name) else 'not installed'} ({PEERS[name]})")
    p = SHAPES[args.shape]
    for t, how in itertools.product(sizes(args.tokens or TOKENS[args.shape]), drawn(args)):
        parts = lengths(args.shape, t)
        print(f"{args.shape}: {p['H']}/{p['KH']} heads, d {p['D']}/{p['DV']}, {t} tokens"
              + (f" in {len(parts)} sequences" if len(parts) > 1 else "")
              + (f"; selected attention alone, {how}" if how else ""))
        if how and importlib.util.find_spec("torch"):
            import torch

            idx = choose(torch, p, tuple(min(n, 4096) for n in parts), how, device="cpu")
            print(
                f"    neighbours share {100 * kept(idx):.1f} % of their choice (of the first 4096 "
                f"rows of a sequence)"
            )


def kept(idx):
    """The share of a row's blocks that the next row has too, over rows that have all their
    entries."""
    full = (idx >= 0).all(-1)
    same = (idx[1:, :, :, None] == idx[:-1, :, None, :]).any(-1).float().mean(-1)
    return same[full[1:] & full[:-1]].mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="s", choices=list(SHAPES))
    parser.add_argument("--tokens", help="such as 4K,16K")
    parser.add_argument("--seed", type=Path, help="a checkout of the seed")
    parser.add_argument("--only", help=f"some of {','.join(LABELS)}")
    parser.add_argument(
        "--older", action="store_true",
        help="what GPUs without Hopper's instructions are given: our kernels by "
        "profile a100, the seed without TMA, FlashAttention 2 its window")
    parser.add_argument(
        "--choices",
        help=f"selected attention alone, on choices drawn so: some of {','.join(CHOICES)}, or all")
    parser.add_argument("--dry-run", action="store_true",
                        help="say what would be measured and which peers are here")
    parser.add_argument("--branches", action="store_true", help="times of the parts too")
    parser.add_argument("--check", action="store_true", help="compare numbers with the seed's")
    parser.add_argument("--seconds", type=float, default=0.5,
                        help="measuring time for each figure (default 0.5)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", type=Path, nargs="*",
                        help="rows from earlier runs instead of new ones")
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    args = parser.parse_args()
    if args.merge:
        merged = {}
        for path in args.merge:
            for r in json.loads(path.read_text()):
                r.setdefault("choices", None)  # of files written before there were any
                into = merged.setdefault((r["shape"], r["tokens"], r["choices"]), r)
                for key in ("ms", "branches", "failed"):
                    into[key].update(r[key])
        rows = [
            merged[key]
            for key in sorted(merged, key=lambda k: (list(SHAPES).index(k[0]), k[1], k[2] or ""))
        ]
    elif args.dry_run:
        dry_run(args)
        return
    else:
        import torch

        if args.older:
            os.environ["REGRAPH_PROFILE"] = "a100"
        seed = None
        if args.seed:
            from seed_shim import Seed

            seed = Seed(args.seed, SHAPES[args.shape], older=args.older)
            print(f"seed's sliding window: {seed.swa_backend}")
        tokens = sizes(args.tokens or TOKENS[args.shape])
        if args.check:
            fine = [check(torch, args.shape, t, seed) for t in tokens]
            sys.exit(0 if all(fine) else 1)
        rows = []
        for t, how in itertools.product(tokens, drawn(args)):
            rows.append(measure_selected(torch, args, args.shape, t, seed, how) if how else
                        measure(torch, args, args.shape, t, seed))
            if args.json:  # after each size, so that a run cut short leaves what it had
                args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
