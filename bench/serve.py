#!/usr/bin/env python3
"""A serving step beside others', on one GPU: regraph's by `regraph bench --serve`, a Triton NSA's
(the seed), and dense attention over pages.

    bench/serve.py                        # decode and prefill of one layer, 64/4 heads; dense
                                            attention where it is installed
    bench/serve.py --seed PATH            # and a checkout of
                                            mdy666/Scalable-Flash-Native-Sparse-Attention
    bench/serve.py --dry-run              # which peers are here; needs no GPU

ms, replays of a CUDA graph one behind the other: the mean of twenty, the median of five of those,
as ours; split_kv: ours with keys of single tokens shared out, at "exact". The seed's scores have
buffers for the capacity of a sequence; its column "exact" is at buffers for the context and no
more. Dense attention is FlashAttention's with a cache in pages: FlashAttention 3
(flash_attn_interface), else 2 (flash_attn).
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench")]
SHAPE = {
    "H": 64, "KH": 4, "D": 128, "DV": 128, "kernel": 32, "stride": 16, "block": 64, "top_n": 16,
    "init": 1, "local": 2, "window": 512
}
DENSE = ("flash_attn_interface", "flash_attn")
AT_ONCE, REPEATS = 20, 5


def ours(regraph, *options):
    said = subprocess.run([
        regraph, "bench", ROOT / "examples/nsa_serve.json", "--serve", "--device", "cuda", "--json",
        *options
    ], stdout=subprocess.PIPE, check=True)
    return json.loads(said.stdout)["steps"]


def replayed(torch, function):
    """Of a CUDA graph of it."""
    function()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(REPEATS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(AT_ONCE):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / AT_ONCE)
    return statistics.median(times[1:])


class Pool:
    """Keys and values in pages of 128 tokens, as many as the longest row of the table wants."""

    def __init__(self, torch, tokens):
        shape = (tokens // 128, 128, SHAPE["KH"], SHAPE["D"])
        self.torch, self.pages = torch, shape[0]
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def table(self, batch, each):
        return (self.torch.arange(batch * each, device="cuda", dtype=self.torch.int32) %
                self.pages).view(batch, each)

    def rows(self, batch, heads, width):
        return self.torch.randn(batch, heads, width, device="cuda", dtype=self.torch.bfloat16)


def dense(torch, pool, batch, context, peer):
    attend = peer.flash_attn_with_kvcache
    table = {
        "page_table" if peer.__name__ == DENSE[0] else "block_table": pool.table(
            batch, context // 128)
    }
    q = pool.rows(batch, SHAPE["H"], SHAPE["D"]).unsqueeze(1)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    return replayed(torch,
                    lambda: attend(q, pool.k, pool.v, cache_seqlens=lengths, causal=True, **table))


def seed(torch, pool, batch, context, capacity):
    from flash_nsa.inference import nsa_decode

    rows = (context - SHAPE["kernel"]) // SHAPE["stride"] + 1
    q, gates = pool.rows(batch, SHAPE["H"], SHAPE["D"]), pool.rows(batch, SHAPE["H"], 3)
    pages, compressed = pool.table(batch, context // 128), pool.table(batch, (rows + 127) // 128)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    slots = (compressed[:, -1] * 128 + (rows - 1) % 128).to(torch.int32)
    return replayed(
        torch, lambda: nsa_decode(
            q, pool.k, pool.v, gates, context_lens=lengths, block_tables=pages, cmp_slot_mapping=
            slots, cmp_block_tables=compressed, fixed_y_maxlen=capacity // SHAPE["stride"],
            fixed_num_slc_blocks=capacity // SHAPE["block"], kernel_size=SHAPE["kernel"], stride=
            SHAPE["stride"], block_size=SHAPE["block"], top_n=SHAPE["top_n"], num_init_blocks=SHAPE[
                "init"], num_local_blocks=SHAPE["local"], window_size=SHAPE["window"]))


def tried(what, function, *arguments):
    try:
        return f"{function(*arguments):9.4f}"
    except Exception as e:  # a peer's own; the others go on
        print(f"{what}: {type(e).__name__}: {str(e)[:200]}", file=sys.stderr)
        return f"{'-':>9}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=Path, help="a checkout of the Triton NSA")
    parser.add_argument("--regraph", default=ROOT / "build/regraph",
                        help="the command (default: build/regraph)")
    parser.add_argument("--dry-run", action="store_true", help="say which peers are here")
    args = parser.parse_args()
    there = [m for m in DENSE if importlib.util.find_spec(m)]
    if args.dry_run:
        print(f"dense attention over pages: {there[0] if there else 'not installed'}")
        print(f"the Triton NSA: {args.seed if args.seed else 'no --seed'}")
        return
    if not Path(args.regraph).exists():
        parser.error(f"there is no {args.regraph}; build it, or name the command by --regraph")
    import torch

    peer = importlib.import_module(there[0]) if there else None  # before the shim takes its name
    if args.seed:
        from seed_shim import Seed

        Seed(args.seed, SHAPE)
    steps = ours(args.regraph)
    split = ours(args.regraph, "--policy", ROOT / "examples/policies/split_kv.json")
    pool = Pool(torch, max(s["batch"] * s["context"] for s in steps))
    print(f"{'context':>8} {'batch':>6} {'new':>6} " + " ".join(f"{x:>9}" for x in (
        "exact", "wide", "widest", "split_kv", "seed", "at wide", "dense")))
    for s, shared_out in zip(steps, split):
        row = [f"{x:9.4f}" for x in (*s["ms"], shared_out["ms"][0])]
        if s["new"] == 1:
            at = torch, pool, s["batch"], s["context"]
            for capacity in (s["context"], s["capacity"][1]):
                row.append(tried("seed", seed, *at, capacity) if args.seed else f"{'-':>9}")
            row.append(tried("dense", dense, *at, peer) if peer else f"{'-':>9}")
        print(f"{s['context']:8} {s['batch']:6} {s['new']:6} " + " ".join(row), flush=True)


if __name__ == "__main__":
    main()
