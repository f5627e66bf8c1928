#!/usr/bin/env python3
"""Tokens a second in nano-vllm: with regraph's attention beside the Triton NSA's fork of it, on one
GPU.

    bench/nano_vllm.py --nano PATH --seed PATH

PATH are checkouts of GeeeekExplorer/nano-vllm and mdy666/Scalable-Flash-Native-Sparse-Attention,
which has the fork in it. A model of random weights, 12 layers of NSA with 64/4 heads of 128, as the
fork's own bench.py has it; the same weights in both. Steps of single tokens by the whole engine:
its scheduler, tables, captured graph, sampling. No prompt is run: sequences get their pages, and
caches, compressed rows too, hold random numbers. Ours goes one step ahead of the host; "waiting" is
what a step takes where it doesn't.

Each engine is a process. Both get ready side by side (imports, weights, what is compiled), then one
after the other has the memory and the time to itself. A capacity is what tables and buffers have
room for: the context, or the 128K of the fork's bench.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HIDDEN, FFN, H, KH, D, VOCABULARY = 12, 4096, 12288, 64, 4, 128, 151936
NSA = {"kernel": 32, "stride": 16, "block": 64, "top_n": 16, "init": 1, "local": 2, "window": 512}
# context at the end of a run, sequences, capacity
CASES = [(8 << 10, 512, 8 << 10), (8 << 10, 512, 128 << 10), (120 << 10, 42, 128 << 10)]
DEVICE = "cuda"
WARM, STEPS = 3, 32  # of 32 two complete a compressed row
SIDES = {"regraph": 256, "seed": 128}  # tokens of a page: what nano-vllm wants, and the fork's


# ---- an engine, in its process ----


class Config(types.SimpleNamespace):
    @classmethod
    def from_pretrained(cls, path):
        import torch

        p = NSA
        return cls(
            num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=FFN, head_dim=D,
            num_attention_heads=H, num_key_value_heads=KH, vocab_size=VOCABULARY,
            max_position_embeddings=128 << 10, rms_norm_eps=1e-6, rope_theta=1000000,
            rope_scaling=None, tie_word_embeddings=True, attention_bias=False, hidden_act="silu",
            dtype=torch.bfloat16, torch_dtype=torch.bfloat16, nsa=True, kernel_size=p["kernel"],
            stride=p["stride"], block_size=p["block"], top_n=p["top_n"], window_size=p["window"],
            # the fork hands these two on the wrong way round
            num_init_blocks=p["local"], num_local_blocks=p["init"],
            cmp_num_splits=0, slc_num_splits=0)


class Tokenizer:
    eos_token_id = -1

    @classmethod
    def from_pretrained(cls, path, **options):
        return cls()


def stand_ins():
    """No files of a model are here, so what reads them is stood in for."""
    module = types.ModuleType("transformers")
    module.AutoConfig = module.Qwen3Config = Config
    module.AutoTokenizer = Tokenizer
    sys.modules["transformers"] = module


def with_gates(models):
    """nano-vllm's Qwen3 with a gate for each head and branch, in one product with q, k and v."""
    from nanovllm.layers.linear import ColumnParallelLinear

    class Gated(models.Qwen3Attention):
        def __init__(self, hidden_size, num_heads, num_kv_heads, **rest):
            super().__init__(hidden_size, num_heads, num_kv_heads, **rest)
            self.parts = [self.q_size, self.kv_size, self.kv_size, 3 * self.num_heads]
            self.qkv_proj = ColumnParallelLinear(hidden_size, sum(self.parts))

        def forward(self, positions, hidden_states):
            q, k, v, gate = self.qkv_proj(hidden_states).split(self.parts, -1)
            q = self.q_norm(q.view(-1, self.num_heads, self.head_dim))
            k = self.k_norm(k.view(-1, self.num_kv_heads, self.head_dim))
            q, k = self.rotary_emb(positions, q, k)
            o = self.attn(q, k, v.view(-1, self.num_kv_heads, self.head_dim),
                          gate.view(-1, self.num_heads, 3))
            return self.o_proj(o.flatten(1, -1))

    models.Qwen3Attention = Gated


def wide_offsets():
    """nano-vllm's kernel that stores keys reckons where a row stands with integers of its table's
    type. Caches of a large GPU have more elements than 32 bits count, so it gets a table of 64."""
    import nanovllm.layers.attention as attention

    store = attention.store_kvcache
    attention.store_kvcache = lambda k, v, k_cache, v_cache, slots: store(
        k, v, k_cache, v_cache, slots.long())


def random_weights(model, path):
    import torch

    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        torch.nn.init.constant_(weight, 1) if weight.dim() == 1 else \
            torch.nn.init.normal_(weight, std=0.02)


class Engine:
    """One nano-vllm, and its steps of single tokens."""

    def __init__(self, side, nano, seed):
        self.side, self.page = side, SIDES[side]
        stand_ins()
        if side == "regraph":
            sys.path[:0] = [str(ROOT / "python"), str(nano)]
            import regraph.nanovllm

            regraph.nanovllm.install(nsa=NSA)
        else:
            sys.path[:0] = [str(ROOT / "bench"), str(seed / "nano-vllm")]
            from seed_shim import Seed

            Seed(seed, {**NSA, "H": H, "KH": KH, "D": D, "DV": D})
            wide_offsets()
        import nanovllm.models.qwen3 as models

        if side == "regraph":
            with_gates(models)
        import nanovllm.engine.model_runner as runner

        runner.load_model = random_weights
        self.module, allocate = runner, runner.ModelRunner.allocate_kv_cache
        runner.ModelRunner.warmup_model = lambda self: None
        runner.ModelRunner.allocate_kv_cache = lambda self: None
        from nanovllm import LLM

        self.llm = LLM(str(ROOT), enforce_eager=True, max_model_len=128 << 10,
                       max_num_batched_tokens=128 << 10, kvcache_block_size=self.page,
                       num_kvcache_blocks=64)
        self.runner = self.llm.model_runner
        self.config = self.runner.config
        self.allocate = lambda: allocate(self.runner)

    def blocks(self, sequences, length):
        """Pages for so many sequences; the fork's compressed rows take some of them."""
        each = -(-length // self.page)
        if self.side == "seed":
            each += -(-(length // NSA["stride"]) // self.page)
        return sequences * each

    def drop(self):
        """No caches."""
        import torch

        for layer in self.runner.model.model.layers:
            attention = layer.self_attn.attn
            attention.k_cache = attention.v_cache = torch.tensor([])
            attention._compressed = ()
        self.runner.kv_cache = None
        torch.cuda.empty_cache()

    def take(self, blocks):
        """Caches of so many pages, by nano-vllm's own arithmetic, full of random numbers."""
        import torch

        self.drop()
        free, total = torch.cuda.mem_get_info()
        stats = torch.cuda.memory_stats()
        other = total - free + stats["allocated_bytes.all.peak"] - \
            stats["allocated_bytes.all.current"]
        size = 2 * LAYERS * self.page * KH * D * 2
        self.config.gpu_memory_utilization = (other + (blocks + 0.5) * size) / total
        with torch.device(DEVICE):
            torch.set_default_dtype(torch.bfloat16)
            self.allocate()
            torch.set_default_dtype(torch.float32)
        if self.config.num_kvcache_blocks < blocks:
            raise RuntimeError(f"{self.config.num_kvcache_blocks} pages; {blocks} were wanted")
        for layer in self.runner.model.model.layers:
            attention = layer.self_attn.attn
            attention.k_cache.normal_()
            attention.v_cache.normal_()
            if self.side == "regraph":
                for rows in attention._compressed_of(attention.k_cache):
                    rows.normal_()

    def graph(self, batch, capacity):
        """Captures the step of a batch in nano-vllm's own way, and no other sizes'."""
        import torch

        slots = -(-batch // 16) * 16
        self.config.max_num_seqs = self.llm.scheduler.max_num_seqs = slots
        self.config.max_model_len = capacity
        if self.side == "seed":
            from nanovllm.utils import context

            constant = context.get_nsa_constant_context()
            constant.fixed_y_maxlen = capacity // NSA["stride"]
            constant.fixed_num_slc_blocks = capacity // NSA["block"]
        self.module.reversed = lambda sizes: [next(n for n in sizes if n >= batch)]
        with torch.device(DEVICE):
            torch.set_default_dtype(torch.bfloat16)
            self.runner.graphs = self.runner.graph_vars = self.runner.graph_pool = None
            self.runner.capture_cudagraph()
            torch.set_default_dtype(torch.float32)
        self.runner.enforce_eager = False

    def start(self, batch, context):
        """Sequences whose last token is still to run, in pages of their own."""
        import numpy as np
        from nanovllm import SamplingParams
        from nanovllm.engine.block_manager import BlockManager
        from nanovllm.engine.sequence import Sequence, SequenceStatus

        scheduler = self.llm.scheduler
        tokens = np.random.default_rng(0).integers(VOCABULARY, size=context).tolist()
        scheduler.block_manager = BlockManager(self.config.num_kvcache_blocks, self.page)
        scheduler.running.clear()
        params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1 << 30)
        own = {"block_size": self.page} if self.side == "seed" else {}
        for number in range(batch):  # no two begin alike, so that no page is shared
            sequence = Sequence([number, *tokens[1:]], params, **own)
            if self.side == "seed":
                scheduler.block_manager.allocate(sequence)
            else:
                scheduler.block_manager.allocate(sequence, 0)
            sequence.num_cached_tokens = context
            sequence.append_token(1)
            sequence.status = SequenceStatus.RUNNING
            scheduler.running.append(sequence)

    def run(self, batch, steps):
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            _, count = self.llm.step()
            times.append(time.perf_counter() - start)
            if count != -batch:
                raise RuntimeError(f"a step of {count}; expected {batch} single tokens")
        return times

    def ready(self, cases):
        """Everything is compiled that steps will want, over a few pages; then weights and caches
        are let go, and the other has room."""
        import torch

        self.take(64)
        for _, batch, capacity in cases:
            self.graph(batch, capacity)
            with torch.inference_mode():
                logits = self.runner.model.compute_logits(self.runner.graph_vars["outputs"][:batch])
                warm = torch.full((batch,), 0.6, device=logits.device)
                if self.side == "regraph":
                    from regraph.draw import draw

                    draw(logits, warm)
            self.runner.sampler(logits, warm.clone())
        self.runner.graphs = self.runner.graph_vars = self.runner.graph_pool = None
        self.shapes = {name: weight.shape for name, weight in self.weights()}
        for _, weight in self.weights():
            weight.data = weight.new_empty(0)
        del logits
        self.drop()

    def weights(self):
        """Matrices, there or let go."""
        return ((name, weight) for name, weight in self.runner.model.named_parameters()
                if weight.dim() > 1 or not weight.numel())

    def go(self, cases):
        """Takes all that the cases want."""
        model = self.runner.model
        for name, weight in self.weights():
            weight.data = weight.new_empty(self.shapes[name])
        random_weights(model, None)
        model.lm_head.weight.data = model.model.embed_tokens.weight.data
        self.take(max(self.blocks(batch, context) for context, batch, _ in cases))

    def times(self, context, batch, ahead, steps=STEPS):
        """Seconds of each step, those to warm up left out."""
        vars(self.llm).pop("_ahead", None)
        if not ahead:
            self.llm._ahead = None
        self.start(batch, context - WARM - steps - 1)
        self.run(batch, WARM)
        return self.run(batch, steps)

    def measure(self, context, batch, capacity):
        import torch

        self.graph(batch, capacity)
        times = waiting = self.times(context, batch, False)
        if self.side == "regraph":
            times = self.times(context, batch, True)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        graph = next(iter(self.runner.graphs.values()))
        events[0].record()
        for _ in range(8):
            graph.replay()
        events[1].record()
        events[1].synchronize()
        return {"tokens": batch * STEPS / sum(times), "ms": 1e3 * statistics.mean(times),
                "waiting_ms": 1e3 * statistics.mean(waiting),
                "graph_ms": events[0].elapsed_time(events[1]) / 8}

    def profile(self, context, batch, steps=8):
        """Microseconds of a step's kernels, how many there are, by name; the longest first."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            self.times(context, batch, True, steps - WARM)
        found = {}
        for event in seen.events():
            if event.device_type == DeviceType.CUDA:
                count, time = found.get(event.name, (0, 0))
                found[event.name] = count + 1, time + event.time_range.elapsed_us()
        return sorted(([time / steps, count / steps, name] for name, (count, time) in
                       found.items()), reverse=True)


def engine(args):
    cases = args.cases
    one = Engine(args.side, args.nano, args.seed)
    one.ready(cases)
    print("ready", flush=True)
    sys.stdin.readline()
    one.go(cases)
    for case in cases:
        row = one.measure(*case)
        if args.profile:
            row["profile"] = one.profile(*case[:2])
        print(json.dumps(row), flush=True)
    os._exit(0)  # what it holds is freed at once


# ---- both ----


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nano", type=Path, required=True, help="a checkout of nano-vllm")
    parser.add_argument("--seed", type=Path, help="a checkout of the Triton NSA")
    parser.add_argument("--cases", type=json.loads, default=CASES,
                        help="[[context, sequences, capacity], …]")
    parser.add_argument("--profile", action="store_true",
                        help="print the kernels of a step of ours, too: us, how many, name")
    parser.add_argument("--after", type=Path, help="wait until this file is there before the times")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        engine(args)
        return
    sides = [side for side in SIDES if side == "regraph" or args.seed]
    command = [sys.executable, __file__, "--nano", args.nano, "--cases", json.dumps(args.cases)]
    command += ["--seed", args.seed] if args.seed else []
    more = {"regraph": ["--profile"] if args.profile else [], "seed": []}
    running = {side: subprocess.Popen([*command, "--side", side, *more[side]], text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
               for side in sides}
    said = {side: [] for side in sides}
    for process in running.values():
        for line in process.stdout:
            if line == "ready\n":
                break
    while args.after and not args.after.exists():
        time.sleep(0.2)
    for side, process in running.items():
        said[side] = [json.loads(line) for line in process.communicate("\n")[0].splitlines()
                      if line.startswith("{")]
    columns = {"tokens": "tokens/s", "ms": "step, ms", "waiting_ms": "waiting",
               "graph_ms": "its graph"}
    shown = [(side, key) for side in sides for key in columns
             if side == "regraph" or key != "waiting_ms"]
    print("| context (batch) | capacity | " +
          " | ".join(f"{side}, {columns[key]}" for side, key in shown) + " | ratio |")
    print("|---" * (len(shown) + 3) + "|")
    for i, (context, batch, capacity) in enumerate(args.cases):
        row = {side: said[side][i] if i < len(said[side]) else None for side in sides}
        cells = [f"{row[side][key]:.{0 if key == 'tokens' else 2}f}" if row[side] else "failed"
                 for side, key in shown]
        ratio = "–"
        if len(row) == 2 and all(row.values()):
            ratio = f"{row['regraph']['tokens'] / row['seed']['tokens']:.2f}"
        print(f"| {context >> 10}K ({batch}) | {capacity >> 10}K | {' | '.join(cells)} | {ratio} |")
    for (context, batch, _), one in zip(args.cases, said["regraph"]):
        for time_us, count, name in one.get("profile", []):
            print(f"{context >> 10}K ({batch}) {time_us:9.1f} {count:6.1f}  {name[:90]}")
    sys.exit(not all(len(one) == len(args.cases) for one in said.values()))


if __name__ == "__main__":
    main()
