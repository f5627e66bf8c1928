#!/usr/bin/env python3
"""A model that learns to find needles in text, trained by regraph's backward and served by its
engine: bytes in, bytes out, no download.

    python3 examples/needles.py                    # on a GPU: bf16, 4K and 8K bytes, half a minute
    python3 examples/needles.py --device cpu       # the same in small: fp32, 192 bytes, seconds

The text is letters and blanks. In it stand needles, runs of one byte of 128 and more: which of
`kinds` a needle is, its upper bits say. At the end come questions, a capital letter for each kind,
and the answer is the needle of that kind. Where it counts, needles stand farther from the first
question than the window reaches, so that what answers is the blocks that were chosen, and
compressed keys.

What is trained is examples/serve_model.json without its pages (`unpaged`), by gradients of
regraph.torch. What is served is that file as it is, by regraph.serve.Engine. Checked is that the
engine chose, layer by layer and row by row, prompts in pieces and single bytes, the very blocks
that training's forward chose; said is how many needles are found. Exit code 1 where blocks differ,
or fewer than nine in ten are found.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import regraph  # noqa: E402
import regraph.torch  # noqa: E402
from regraph.serve import Engine  # noqa: E402

# What a model is, what it is trained at (bytes, texts at once, steps at most) and served at.
SIZES = {
    "cuda": {"params": dict(layers=2, V=256, W=256, F=512, H=16, KH=1, D=128, DV=128, page=128,
                            top_n=16, window=512, theta=1e9, dtype="bf16", kv="bf16"),
             "kinds": 8, "values": 16, "run": 8, "rate": 2e-3, "served": (4096, 8192), "texts": 32,
             "train": ((128, 64, 800), (512, 32, 400), (2048, 16, 400), (8192, 4, 400))},
    "cpu": {"params": dict(layers=2, V=256, W=32, F=32, H=4, KH=2, D=16, DV=16, page=16, kernel=8,
                           stride=4, block=16, top_n=8, window=24, theta=1e9, dtype="f32",
                           kv="f32"),
            "kinds": 4, "values": 4, "run": 2, "rate": 8e-3, "served": (192,), "texts": 8,
            "train": ((64, 8, 400), (192, 4, 400))}}
NEW = 12  # bytes that follow a prompt whose blocks are compared


# ---- text ----


def text(rng, length, sizes, window=0):
    """(bytes, rows whose next byte is an answer). Needles stand further than `window` in front of
    the first question."""
    kinds, values, run = sizes["kinds"], sizes["values"], sizes["run"]
    said = np.where(rng.random(length) < 0.18, ord(" "), rng.integers(97, 123, length))
    tail = length - 2 * kinds
    needles = 128 + values * np.arange(kinds) + rng.integers(values, size=kinds)
    at = run * rng.permutation((tail - window) // run)[:kinds]
    said[at[:, None] + np.arange(run)] = needles[:, None]
    order = rng.permutation(kinds)
    said[tail:] = np.stack([ord("A") + order, needles[order]], 1).ravel()
    return said.astype(np.int32), tail + 2 * np.arange(kinds)


# ---- the graph without pages ----


PAGES = ("page_copy", "kv_append", "paged_batch", "gather_rows", "argmax", "embed")
CACHES = {"k_cache": "k", "v_cache": "v", "k_now": "k", "v_now": "v", "k_cmp_now": "cmp_k",
          "v_cmp_now": "cmp_v", "ends": "h_last"}


def unpaged(document, layers):
    """The graph of a step whose sequences are all there: no caches, no tables, layer by layer, a
    row of logits for each token, gradients for weights, and the blocks that each layer chose."""
    block = next(node for node in document["nodes"] if "repeat" in node)
    spec = {**document, "name": "unpaged", "nodes": [], "inputs": {
        "embedded": {"shape": ["T", "W"], "dtype": "$dtype"},
        "cu_seqlens": {"shape": ["B+1"], "dtype": "i32"}}}

    def add(node, named):
        """Tensors are named by `named` where it knows them."""
        if node["op"] in PAGES:
            return
        node = {**node, "op": node["op"].removeprefix("paged_")}
        inputs = {CACHES.get(port, port): name for port, name in node["in"].items()
                  if port not in ("context", "pages", "q_offset")}
        if node["op"] == "kv_compress":
            node["op"], inputs = "compress_kv", {"k": "k", "v": "v"}
            node["out"] = {"k": "cmp_k", "v": "cmp_v"}
        if node["op"] != "reshape":
            inputs["cu_seqlens"] = "cu_seqlens"

        def here(name):
            if isinstance(name, list):
                return [here(one) for one in name]
            name = CACHES.get(name, name)
            return named.get(name, name)

        node["in"] = {port: here(name) for port, name in inputs.items()}
        node["out"] = {port: here(name) for port, name in node["out"].items()}
        spec["nodes"].append(node)

    for node in document["nodes"]:
        if node is not block:
            add(node, {"h_last": f"layer{layers - 1}_y"})
            continue
        own = [*block["inputs"], *(name for one in block["nodes"] if one["op"] not in PAGES
                                   for name in one["out"].values()), "cmp_k", "cmp_v"]
        for i in range(layers):
            named = {name: f"layer{i}_{name}" for name in own}
            named["x"] = f"layer{i - 1}_y" if i else "embedded"
            for one in block["nodes"]:
                add({**one, "name": f"layer{i}_{one['name']}"}, named)
            spec["inputs"] |= {named[name]: what for name, what in block["inputs"].items()}
    spec["inputs"] |= {name: document["inputs"][name] for name in ("w_last", "w_head")}
    for name in spec["inputs"].keys() - {"cu_seqlens"}:
        spec["inputs"][name] = {**spec["inputs"][name], "grad": True}
    spec["outputs"] = {"logits": "logits", **{f"idx{i}": f"layer{i}_idx" for i in range(layers)}}
    return spec


def invariant(document):
    """Products whose bits don't hang on how many rows there are: a step's are training's."""
    spec = copy.deepcopy(document)
    for nodes in (spec["nodes"], *(node["nodes"] for node in spec["nodes"] if "repeat" in node)):
        for node in nodes:
            if node.get("op") == "linear":
                node.setdefault("attrs", {})["batch_invariant"] = True
    return spec


# ---- training ----


class Model(torch.nn.Module):
    """The graph, behind an embedding."""

    def __init__(self, spec, device, params):
        super().__init__()
        names = sorted(spec["inputs"].keys() - {"embedded", "cu_seqlens"})
        self.graph = regraph.torch.Module(spec, parameters=names, device=device, **params)
        drawn = torch.randn(params["V"], params["W"], device=device)
        self.w_embed = torch.nn.Parameter(drawn.to(self.graph.w_head.dtype))

    def forward(self, tokens, starts):
        embedded = torch.nn.functional.embedding(tokens, self.w_embed)
        return self.graph(embedded=embedded, cu_seqlens=starts)


def train(model, sizes, device, rng):
    """AdamW on fp32 copies of the weights. A length ends early once nearly all answers of 20 steps
    are right."""
    weights = list(model.parameters())
    masters = [w.detach().float().clone() for w in weights]
    optimizer = torch.optim.AdamW(masters, sizes["rate"], betas=(0.9, 0.98), weight_decay=0.01)
    done, start = 0, time.perf_counter()
    for length, batch, steps in sizes["train"]:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        share = 0.0
        for step in range(steps):
            made = [text(rng, length, sizes) for _ in range(batch)]
            tokens = torch.from_numpy(np.concatenate([t for t, _ in made])).to(device)
            rows = np.concatenate([r + i * length for i, (_, r) in enumerate(made)])
            rows = torch.from_numpy(rows).to(device)
            done += 1
            for group in optimizer.param_groups:
                group["lr"] = sizes["rate"] * min(1, done / 50)
            logits = model(tokens, starts)["logits"][rows].float()
            wanted = tokens[rows + 1].long()
            loss = torch.nn.functional.cross_entropy(logits, wanted)
            loss.backward()
            for weight, master in zip(weights, masters):
                master.grad, weight.grad = weight.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            with torch.no_grad():
                for weight, master in zip(weights, masters):
                    weight.copy_(master)
            share += 0.1 * ((logits.argmax(1) == wanted).float().mean().item() - share)
            if step % 50 == 49 or share > 0.98:
                print(f"{length} bytes, step {step + 1}: loss {loss.item():.3f}, "
                      f"{100 * share:.0f} % right, {time.perf_counter() - start:.1f} s", flush=True)
            if share > 0.98:
                break


# ---- serving ----


def engine_of(document, model, sizes, device, length):
    """Serves the model, up to a length, and hands out the blocks that layers chose."""
    p = sizes["params"]
    document = copy.deepcopy(document)
    document["outputs"] = {"next": "next", **{f"idx{i}": f"layer{i}_idx"
                                              for i in range(p["layers"])}}
    weights = {name.removeprefix("graph."): weight.detach()
               for name, weight in model.named_parameters()}
    most = -(-(length + NEW) // p["page"])
    return Engine(regraph.Spec(document, **p), weights, pages=4 * most, page=p["page"], slots=8,
                  most=most, rows=(8, 4 * p["page"]), device=device)


def blocks(engine, prompt, layers):
    """What follows a prompt, and the blocks of each layer for all of its rows: of prompts in
    pieces, then of single tokens."""
    request, rows = engine.add(prompt, NEW), []
    while request.state == "live":
        engine.step()
        count = int(engine.queue.lengths[0])
        rows.append([engine.output(f"idx{i}")[:count] for i in range(layers)])
    return request.tokens, [np.concatenate(layer) for layer in zip(*rows)]


def same_blocks(engine, model, prompt, layers, device):
    """(rows that differ, rows) between training's forward and the engine."""
    tokens, served = blocks(engine, prompt, layers)
    whole = torch.tensor([*prompt, *tokens[:-1]], dtype=torch.int32, device=device)
    with torch.no_grad():
        trained = model(whole, torch.tensor([0, len(whole)], dtype=torch.int32, device=device))
    trained = [trained[f"idx{i}"].cpu().numpy() for i in range(layers)]
    return sum(int((a != b).any((1, 2)).sum()) if a.shape == b.shape else len(a)
               for a, b in zip(trained, served)), layers * len(whole)


def found(engine, sizes, length, rng):
    """The share of needles that are found, each by a request of its own after a common text."""
    asked = []
    for _ in range(sizes["texts"]):
        said, rows = text(rng, length, sizes, sizes["params"]["window"])
        common = said[:rows[0]]
        asked += [(engine.add([*common, said[row]], 1), said[row + 1]) for row in rows]
    for _ in engine.steps():
        pass
    return sum(request.tokens == [needle] for request, needle in asked) / len(asked)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda")
    device = parser.parse_args(argv).device
    sizes, rng = SIZES[device], np.random.default_rng(1)
    layers = sizes["params"]["layers"]
    if device == "cpu":
        torch.set_num_threads(1)  # products this small gain nothing by more
    torch.manual_seed(1)
    document = invariant(json.loads(Path(regraph.example("serve_model.json")).read_text()))
    model = Model(unpaged(document, layers), device, sizes["params"])
    train(model, sizes, device, rng)
    good = True
    for length in sizes["served"]:
        engine = engine_of(document, model, sizes, device, length)
        prompt, _ = text(rng, length, sizes)
        differ, rows = same_blocks(engine, model, prompt.tolist(), layers, device)
        start = time.perf_counter()
        share = found(engine, sizes, length, rng)
        stats = engine.stats()
        print(f"{length} bytes: {differ} of {rows} rows of blocks differ from training's; "
              f"{100 * share:.1f} % of {sizes['texts'] * sizes['kinds']} needles found, farther "
              f"than {sizes['params']['window']} bytes; {stats.found} bytes were in pages "
              f"already, {stats.rows} ran, {time.perf_counter() - start:.1f} s", flush=True)
        good = good and differ == 0 and share >= 0.9
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
