"""Serving by two processes that have half of the heads each: a model of two layers, whose attention
is examples/nsa_serve.json with H/2 and KH/2 heads. Each has a Queue of its own, and of the same
requests queues make the same steps, so nothing but sums of rows travels. What they say must be what
one process with all heads says.

    python serve_ranks.py
"""

import multiprocessing
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import regraph  # noqa: E402
from regraph.serve import Queue  # noqa: E402

RANKS, LAYERS, V, W, H, KH, D = 2, 2, 61, 32, 8, 4, 16
NSA = {"D": D, "DV": D, "page": 16, "kernel": 8, "stride": 4, "block": 16, "top_n": 4, "window": 24,
       "dtype": "f32", "kv": "f32"}
SIZES = {"rows": 20, "slots": 5, "most": 8, "pages": 9, "forks": 2}


def weight(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / W**0.5


def share(array, part, parts):
    """Heads, the first axis, of one part."""
    count = array.shape[0] // parts
    return array[part * count:(part + 1) * count]


class Layer:
    """Projections and attention of a rank's heads. One rank multiplies what would be several ranks'
    in as many products: numpy's depend on the shape, and what is compared here is tokens."""

    def __init__(self, number, rank, ranks):
        self.w = {name: share(weight([number, at], heads, width, W), rank, ranks)
                  for at, (name, heads, width) in enumerate(
                      (("q", H, D), ("k", KH, D), ("v", KH, D), ("gate", H, 3)))}
        self.out = share(weight([number, 9], H, D, W), rank, ranks)
        spec = regraph.Spec(regraph.example("nsa_serve.json"), H=H // ranks, KH=KH // ranks, **NSA)
        self.session = regraph.Session(regraph.Plan(
            spec, T=SIZES["rows"], B=SIZES["slots"], M=SIZES["most"], P=SIZES["pages"],
            F=SIZES["forks"], no_grad=True))

    def forward(self, x, queue, parts):
        """[T, W] for each of `parts` of its heads: terms of the layer's sum."""
        def project(w):
            heads = [share(w, part, parts) for part in range(parts)]
            return np.concatenate([(x @ h.reshape(-1, W).T).reshape(len(x), *h.shape[:2])
                                   for h in heads], axis=1)

        o = self.session.forward(**{name: project(w) for name, w in self.w.items()},
                                 lengths=queue.lengths, context=queue.context,
                                 pages=queue.pages, forks=queue.forks)["o"]
        return [np.ascontiguousarray(share(o.transpose(1, 0, 2), part, parts).transpose(1, 0, 2))
                .reshape(len(x), -1) @ share(self.out, part, parts).reshape(-1, W)
                for part in range(parts)]


def serve(rank, ranks, exchange):
    """The tokens of all requests. `exchange` takes a rank's terms and returns those of all."""
    layers = [Layer(number, rank, ranks) for number in range(LAYERS)]
    embed, head = weight(1, V, W) * W**0.5, weight(2, V, W)
    queue = Queue(page=16, **SIZES)
    rng, said = np.random.default_rng(1), {}
    alike = rng.integers(V, size=33)
    for i in range(12):
        prompt = np.concatenate([alike[:33 if i % 3 else 0], rng.integers(V, size=1 + i)])
        said[queue.add(prompt, 10 + i)] = []
    next = np.zeros(SIZES["slots"], np.int32)
    while queue.step():
        x = embed[queue.tokens]
        for layer in layers:
            terms = exchange(layer.forward(x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6),
                                           queue, RANKS // ranks))
            x = x + sum(terms[1:], terms[0])
        ends = queue.lengths.cumsum() - 1
        next[:] = (x[ends] @ head.T).argmax(1)
        for slot in np.flatnonzero(queue.wanted):
            said[int(queue.request[slot])].append(int(next[slot]))
        queue.done(next)
    stats = queue.stats()
    assert stats.preempted and stats.found, stats
    return said


def process(rank, pipe):
    def exchange(terms):
        pipe.send(terms)
        other = pipe.recv()
        return [*terms, *other] if rank == 0 else [*other, *terms]

    pipe.send(serve(rank, RANKS, exchange))


def main():
    alone = serve(0, 1, lambda terms: terms)
    context = multiprocessing.get_context("spawn")
    between, ranks = [], []
    for rank in range(RANKS):
        here, there = context.Pipe()
        between.append(here)
        ranks.append(context.Process(target=process, args=(rank, there), daemon=True))
        ranks[-1].start()
    while True:
        got = [pipe.recv() for pipe in between]
        if isinstance(got[0], dict):
            break
        between[0].send(got[1])
        between[1].send(got[0])
    assert got[0] == got[1] == alone, "the ranks say something else"
    words = {token for tokens in alone.values() for token in tokens}
    assert len(words) > 10, f"the model says little: {words}"
    print(f"{RANKS} ranks say what one says: {sum(map(len, alone.values()))} tokens")


if __name__ == "__main__":
    main()
