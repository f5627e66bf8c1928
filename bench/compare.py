#!/usr/bin/env python3
"""regraph beside torch's attention and beside a Triton NSA (the seed), on one GPU: times, and branch by branch numbers.

    bench/compare.py                               # shape S (64/4 heads), 4K … 128K: regraph, cuDNN, FlashAttention 2
    bench/compare.py --seed PATH                   # and a checkout of mdy666/Scalable-Flash-Native-Sparse-Attention
    bench/compare.py --shape g4 --tokens 8K,32K    # 32/8 heads;  --shape pack: 64K tokens as 13 sequences
    bench/compare.py --check --seed PATH           # numbers instead of times: outputs and gradients against the seed's
    bench/compare.py --json a.json … ; bench/compare.py --merge a.json b.json --plot times.svg

Times are medians in ms between CUDA events, each run after a write of 512 MB (L2 holds nothing of its tensors, and the host has
enqueued the run before the GPU comes to it). "replay" is our CUDA graph, "eager" the same steps launched one by one. Every peer
computes dense causal attention except the seed, which computes what we do. A peer that fails gets a dash and its reason.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "bench")]

BASE = {"D": 128, "DV": 128, "kernel": 32, "stride": 16, "block": 64, "top_n": 16, "init": 1, "local": 2, "window": 512}
SHAPES = {"s": {"H": 64, "KH": 4, **BASE}, "g4": {"H": 32, "KH": 8, **BASE}, "pack": {"H": 64, "KH": 4, **BASE}}
TOKENS = {"s": "4K,8K,16K,32K,64K,128K", "g4": "8K,16K,32K,64K", "pack": "64K"}
PACK = (8192, 8192, 8192, 8192, 8192, 6000, 5000, 4096, 4096, 2500, 2048, 580, 256)  # 65536 in all
LABELS = {"replay": "regraph", "eager": "regraph, step by step", "cudnn": "cuDNN, dense",
          "fa2": "FlashAttention 2, dense", "seed": "Triton NSA"}
SIDES = {"ours": LABELS["replay"], "seed": LABELS["seed"]}  # of the times by part


def sizes(text):
    return [int(float(t[:-1]) * 1024) if t[-1] in "kK" else int(t) for t in text.split(",")]


def lengths(shape, tokens):
    if shape != "pack":
        return (tokens,)
    return tuple(n * tokens // 65536 for n in PACK)


# ---- tensors and timing ----


def make(torch, p, tokens, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = (p["H"], p["D"]), (p["KH"], p["D"]), (p["KH"], p["DV"]), (p["H"], 3), (p["H"], p["DV"])
    *x, d_o = (torch.randn(tokens, *s, generator=g, device="cuda", dtype=torch.bfloat16) for s in shapes)
    return [t.requires_grad_() for t in x], d_o


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
        """After two warm-up runs, at least 3 and at most 50 runs, for as long as the limit allows."""
        self.once(function)
        ms = max(self.once(function), 1e-3)
        return statistics.median(self.once(function) for _ in range(max(3, min(50, int(self.seconds * 1000 / ms)))))

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
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.squeeze(0).transpose(0, 1)

    return forward


def fa2(p, x, cu, longest):
    from seed_shim import Flash

    return lambda: Flash.apply(*x[:3], cu, cu, longest, longest, None, True, (-1, -1))


def seed_branches(clock, seed, x, cu, d_o):
    """Forward ms of each part of the seed."""
    q, k, v, gate = (t.detach() for t in x)
    seed.start(cu)
    with clock.torch.no_grad():
        ck, cv = seed.compressed(k, v)
        cmp, lse = seed.cmp(q, ck, cv)
        topk = seed.select(q, ck, lse)
        slc, swa = seed.slc(q, k, v, topk), seed.swa(q, k, v)
        parts = {"compress_kv": lambda: seed.compressed(k, v), "cmp_o": lambda: seed.cmp(q, ck, cv),
                 "topk": lambda: seed.select(q, ck, lse), "slc_o": lambda: seed.slc(q, k, v, topk),
                 "swa_o": lambda: seed.swa(q, k, v), "combine": lambda: seed.combine(cmp, slc, swa, gate)}
        return {name: clock.median(part) for name, part in parts.items()}


def our_branches(torch, attend, x, cu, d_o):
    """Device ms of each step, forward and backward, medians over eager runs."""
    runs = []
    for _ in range(7):
        o = attend(*x, cu)
        forward = [step for step in attend.times(*x, cu) if not step[2]]
        torch.autograd.grad(o, x, d_o)
        runs.append(forward + [step for step in attend.times(*x, cu) if step[2]])
    return {runs[0][i][0]: statistics.median(run[i][3] for run in runs) for i in range(len(runs[0]))}


def measure(torch, args, shape, tokens, seed):
    p, parts = SHAPES[shape], lengths(shape, tokens)
    x, d_o = make(torch, p, tokens)
    cu = starts(torch, parts)
    clock = Clock(torch, args.seconds)
    row = {"shape": shape, "tokens": tokens, "gpu": torch.cuda.get_device_name(), "ms": {}, "branches": {}, "failed": {}}

    def enter(name, run):
        if args.only and name not in args.only.split(","):
            return
        try:
            row["ms"][name] = run()
        except Exception as error:  # a peer may not support a shape, or run out of memory
            row["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        torch.cuda.empty_cache()

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

    enter("replay", lambda: run_ours(False))
    enter("eager", lambda: run_ours(True))
    if len(parts) == 1:
        enter("cudnn", lambda: clock.both(cudnn(torch, p, x), x[:3], d_o))
    enter("fa2", lambda: clock.both(fa2(p, x, cu, max(parts)), x[:3], d_o))
    if seed:
        enter("seed", run_seed)
    return row


# ---- numbers against the seed ----


def spec_of(inputs, node):
    """A spec of one or several nodes on tensors of shape S."""
    shapes = {"q": ["T", "H", "D"], "k": ["T", "KH", "D"], "v": ["T", "KH", "DV"], "idx": ["T", "KH", "top_n"],
              "gate": ["T", "H", 3], **{name: ["T", "H", "DV"] for name in ("cmp_o", "slc_o", "swa_o")}}
    return {"regraph": 1, "name": node[-1]["name"],
            "params": {"H": 64, "KH": 4, **BASE},
            "inputs": {**{name: {"shape": shapes[name], "dtype": "i32"} if name == "idx" else
                          {"shape": shapes[name], "dtype": "bf16", "grad": True} for name in inputs},
                       "cu_seqlens": {"shape": ["B+1"], "dtype": "i32"}},
            "nodes": node, "outputs": {"o": "o"}}


def branch_specs():
    cu = {"cu_seqlens": "cu_seqlens"}
    block = {"kernel": "$kernel", "stride": "$stride"}
    return {
        "cmp": spec_of("qkv", [
            {"name": "compress_kv", "op": "compress_kv", "in": {"k": "k", "v": "v", **cu}, "out": {"k": "ck", "v": "cv"},
             "attrs": block},
            {"name": "cmp_o", "op": "cmp_attn", "in": {"q": "q", "k": "ck", "v": "cv", **cu}, "out": {"o": "o"},
             "attrs": block}]),
        "slc": spec_of(["q", "k", "v", "idx"], [
            {"name": "slc_o", "op": "slc_attn", "in": {"q": "q", "k": "k", "v": "v", "idx": "idx", **cu},
             "out": {"o": "o"}, "attrs": {"block": "$block"}}]),
        "swa": spec_of("qkv", [
            {"name": "swa_o", "op": "swa_attn", "in": {"q": "q", "k": "k", "v": "v", **cu}, "out": {"o": "o"},
             "attrs": {"window_left": "$window"}}]),
        "combine": spec_of(["cmp_o", "slc_o", "swa_o", "gate"], [
            {"name": "combine", "op": "combine", "in": {"o": ["cmp_o", "slc_o", "swa_o"], "gate": "gate", **cu},
             "out": {"o": "o"}}])}


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
    """Outputs and gradients of each branch and of the whole, on the same tensors and the same indices."""
    import regraph.torch

    p, parts = SHAPES[shape], lengths(shape, tokens)
    x, d_o = make(torch, p, tokens, seed=1)
    q, k, v, gate = x
    cu = starts(torch, parts)
    seed.start(cu)
    worst = 0.0

    def compare(branch, inputs, names, want, got):
        nonlocal worst
        rows = [("o", got, want), *zip(["d" + n for n in names], torch.autograd.grad(got, inputs, d_o),
                                       torch.autograd.grad(want, inputs, d_o))]
        for name, a, b in rows:
            rel, largest, scale = difference(a, b)
            worst = max(worst, rel)
            print(f"{shape:5} {tokens:7} {branch:8} {name:7} rel RMS {rel:.2e}   max {largest:.2e} of {scale:.2e}"
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
    print(f"{shape:5} {tokens:7} whole    o       rel RMS {rel:.2e}   max {largest:.2e} of {scale:.2e}, each with its own "
          f"selection: {100 * share:.2f} % of the blocks are the same", flush=True)
    return worst <= limit and share >= 0.99


# ---- reports ----


def table(rows):
    names = [n for n in LABELS if any(n in r["ms"] for r in rows)]
    lines = ["| shape | tokens | " + " | ".join(f"{LABELS[n]} fwd | bwd" for n in names) + " |",
             "|---" * (2 + 2 * len(names)) + "|"]
    for r in rows:
        cells = [f"{r['ms'][n][d]:.3f}" if n in r["ms"] else "–" for n in names for d in ("forward", "backward")]
        lines.append(f"| {r['shape']} | {r['tokens'] // 1024}K | " + " | ".join(cells) + " |")
    for r in rows:
        for side, parts in r["branches"].items():
            lines.append(f"\n{r['shape']} {r['tokens'] // 1024}K, {SIDES[side]} by part: "
                         + ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items()))
        for name, reason in r["failed"].items():
            lines.append(f"\n{r['shape']} {r['tokens'] // 1024}K, {LABELS[name]}: {reason}")
    return "\n".join(lines)


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = [s for s in ("s", "g4") if sum(r["shape"] == s for r in rows) > 1]
    figure, axes = plt.subplots(len(shapes), 2, figsize=(11, 4.2 * len(shapes)), squeeze=False, sharex="row")
    style = {"replay": ("C0", "o-"), "eager": ("C0", "o:"), "cudnn": ("C2", "s--"), "fa2": ("C7", "^--"),
             "seed": ("C3", "D-")}
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
            axis.set_title(f"{direction}, {p['H']}/{p['KH']} heads of 128, bf16, {rows[0]['gpu']}", fontsize=9)
            axis.set_xlabel("tokens")
            axis.set_ylabel("ms")
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="s", choices=list(SHAPES))
    parser.add_argument("--tokens", help="such as 4K,16K")
    parser.add_argument("--seed", type=Path, help="a checkout of the seed")
    parser.add_argument("--only", help="some of replay,eager,cudnn,fa2,seed")
    parser.add_argument("--branches", action="store_true", help="times of the parts too")
    parser.add_argument("--check", action="store_true", help="compare numbers with the seed's")
    parser.add_argument("--seconds", type=float, default=0.5, help="measuring time for each figure (default 0.5)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", type=Path, nargs="*", help="rows from earlier runs instead of new ones")
    parser.add_argument("--plot", type=Path, help="PNG or SVG")
    args = parser.parse_args()
    if args.merge:
        merged = {}
        for path in args.merge:
            for r in json.loads(path.read_text()):
                into = merged.setdefault((r["shape"], r["tokens"]), r)
                for key in ("ms", "branches", "failed"):
                    into[key].update(r[key])
        rows = [merged[key] for key in sorted(merged, key=lambda k: (list(SHAPES).index(k[0]), k[1]))]
    else:
        import torch

        seed = None
        if args.seed:
            from seed_shim import Seed

            seed = Seed(args.seed, SHAPES[args.shape])
            print(f"seed's sliding window: {seed.swa_backend}")
        tokens = sizes(args.tokens or TOKENS[args.shape])
        if args.check:
            fine = [check(torch, args.shape, t, seed) for t in tokens]
            sys.exit(0 if all(fine) else 1)
        rows = []
        for t in tokens:
            rows.append(measure(torch, args, args.shape, t, seed))
            if args.json:  # after each size, so that a run cut short leaves what it had
                args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
