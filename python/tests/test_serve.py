"""regraph.serve: a model of random weights, on the CPU, or where REGRAPH_TEST_DEVICE says. Runs
under `python3 -m unittest` and under pytest."""

import json
import os
import subprocess
import sys
import unittest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import regraph  # noqa: E402
from regraph import RegraphError, serve  # noqa: E402

SMALL = {"layers": 2, "V": 61, "W": 24, "F": 40, "H": 4, "KH": 2, "D": 16, "DV": 16, "page": 16,
         "kernel": 8, "stride": 4, "block": 16, "top_n": 4, "window": 24, "dtype": "f32",
         "kv": "f32"}
DEVICE = os.environ.get("REGRAPH_TEST_DEVICE", "cpu")
STEP = {"tokens", "lengths", "context", "pages", "forks"}


def spec(**params):
    return regraph.Spec(regraph.example("serve_model.json"), **{**SMALL, **params})


def weights():
    rng = np.random.default_rng(3)
    plan = regraph.Plan(spec(), T=1, B=1, M=1, P=1, forks=1)
    return {t.name: rng.standard_normal(t.shape).astype(np.float32) / t.shape[-1] ** 0.25
            for t in plan.of_role(0) if t.name not in STEP}


WEIGHTS = weights()


def engine(pages=12, slots=5, **options):
    options = {"most": 8, "rows": (5, 20), "device": DEVICE, **options}
    return serve.Engine(spec(), WEIGHTS, pages=pages, page=16, slots=slots, **options)


def prompts(count, seed=1):
    rng = np.random.default_rng(seed)
    alike = rng.integers(61, size=35)
    return [np.concatenate([alike[:35 if i % 3 else 0], rng.integers(61, size=1 + i * 5 % 23)])
            for i in range(count)]


def run(engine, requests):
    for _ in engine.steps():
        pass
    return [request.tokens for request in requests]


class Interrupt:
    """KeyboardInterrupt before bytecode `at` of those that run in regraph/serve.py."""

    def __init__(self, at):
        self.left, self.came = at, False
        self.late = False  # when the step was over but for giving back what it holds

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != serve.__file__ or frame.f_code.co_name == "<genexpr>":
            return None  # what is raised while a generator is let go, Python drops
        frame.f_trace_opcodes = True
        if event == "opcode":
            self.left -= 1
            if not self.left:
                self.came, self.late = True, "got" in frame.f_locals
                raise KeyboardInterrupt  # and nothing is traced from here on
        return self.trace

    def __enter__(self):
        sys._getframe().f_trace_opcodes = True  # before settrace: 3.12 looks then
        sys.settrace(self.trace)
        return self

    def __exit__(self, kind, *_):
        sys.settrace(None)
        return kind is KeyboardInterrupt


class Draw(unittest.TestCase):
    logits = np.array([1.0, 3.0, 2.0, 3.0, -np.inf])

    def drawn(self, **options):
        return [serve.draw(self.logits, serve.Sampling(seed=seed, **options), position)
                for seed in range(40) for position in range(50)]

    def test_greedy_takes_the_first_of_equals(self):
        self.assertEqual(serve.draw(self.logits, serve.GREEDY, 0), 1)

    def test_what_is_drawn_has_its_probability(self):
        got = np.bincount(self.drawn(temperature=1.0), minlength=5) / 2000
        want = np.exp(self.logits - 3) / np.exp(self.logits - 3).sum()
        self.assertLess(np.abs(got - want).max(), 0.03)
        self.assertEqual(got[4], 0)
        hot = np.bincount(self.drawn(temperature=100.0), minlength=5) / 2000
        self.assertLess(np.abs(hot[:4] - 0.25).max(), 0.04)

    def test_top_k_and_top_p(self):
        self.assertEqual(set(self.drawn(temperature=1.0, top_k=3)), {1, 3, 2})
        self.assertEqual(set(self.drawn(temperature=1.0, top_k=1)), {1})
        self.assertEqual(set(self.drawn(temperature=1.0, top_k=2, top_p=0.9)), {1, 3})
        self.assertEqual(set(self.drawn(temperature=1.0, top_k=9)), {0, 1, 2, 3})
        self.assertEqual(set(self.drawn(temperature=1.0, top_p=0.5)), {1, 3})
        self.assertEqual(set(self.drawn(temperature=1.0, top_p=0.01)), {1})

    def test_no_such_sampling(self):
        for options in ({"temperature": -1}, {"temperature": np.inf}, {"temperature": np.nan},
                        {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 1.5},
                        {"seed": "a"}, {"seed": 1.0}, {"temperature": None}):
            with self.assertRaisesRegex(RegraphError, f"sampling: {next(iter(options))}"):
                serve.Sampling(**options)


class Serve(unittest.TestCase):
    def test_sixty_four_say_what_each_says_alone(self):
        warm = [serve.Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=i) if i % 2 else
                serve.GREEDY for i in range(64)]
        crowd = engine(pages=8)
        requests = [crowd.add(prompt, 12 + i % 16, sampling=warm[i])
                    for i, prompt in enumerate(prompts(64))]
        for got, _ in crowd.steps():
            if got.number % 9 == 4 and len(got.tokens) == 6:
                crowd.cancel(got)
        stats = crowd.stats()
        self.assertTrue(stats.preempted and stats.found, stats)
        self.assertEqual((stats.finished, stats.cancelled, stats.pages_used), (57, 7, 0))
        self.assertEqual(stats.tokens, sum(len(request.tokens) for request in requests))
        single = engine(slots=1, rows=(200,), prefixes=False)
        for request, prompt in zip(requests, prompts(64)):
            alone = single.add(prompt, request.max_new, sampling=request.sampling)
            self.assertEqual(run(single, [alone])[0][:len(request.tokens)], request.tokens)
            self.assertEqual(len(request.tokens),
                             6 if request.state == "cancelled" else request.max_new)
        self.assertGreater(len({tuple(request.tokens[:6]) for request in requests}), 32)

    def test_stop_cancel_and_stream(self):
        one = engine()
        whole = run(one, [one.add(prompts(1)[0], 30)])[0]
        stop = whole[7]
        request = one.add(prompts(1)[0], 30, stop=[60, stop])
        self.assertEqual(list(one.stream(request)), whole[:whole.index(stop) + 1])
        self.assertEqual(request.state, "finished")
        request, other = one.add(prompts(1)[0], 30), one.add(prompts(2)[1], 30)
        for got, _ in one.steps():
            if got is request and len(got.tokens) == 4:
                one.cancel(request)
        self.assertEqual((request.state, request.tokens), ("cancelled", whole[:4]))
        self.assertEqual((other.state, len(other.tokens)), ("finished", 30))
        one.cancel(other)
        self.assertEqual(other.state, "finished")
        self.assertEqual(one.stats().cancelled, 1)

    def test_a_fork_goes_on_as_a_request_of_its_own(self):
        one = engine()
        request = one.add(prompts(1)[0], 20)
        fork = None
        for got, _ in one.steps():
            if got is request and len(got.tokens) == 5:
                fork = one.fork(request, (got.tokens[-1] + 1) % 61)
        alone = one.add([*request.prompt, *fork.tokens[:5]], 15)
        self.assertEqual(fork.tokens[5:], run(one, [alone])[0])
        self.assertEqual(fork.tokens[:4], request.tokens[:4])
        self.assertGreater(one.stats().copies, 0)

    def test_a_step_that_fails_runs_again(self):
        one, requests = engine(), prompts(4)
        want = run(one, [one.add(prompt, 9) for prompt in requests])
        asked = [one.add(prompt, 9) for prompt in requests]
        one.step()
        bound, one._run = one._run, lambda rows: 1 / 0
        with self.assertRaises(ZeroDivisionError):
            one.step()
        one._run = bound
        self.assertEqual(run(one, asked), want)

    def test_an_interrupt_anywhere_loses_no_token(self):
        """KeyboardInterrupt at every bytecode of the second step, and of what tidies up after it:
        whoever goes on gets the same tokens, and requests end."""
        one, asked = engine(), [(tokens, 4 + i) for i, tokens in enumerate(prompts(4, seed=9))]
        want = run(one, [one.add(*request) for request in asked])
        at = interrupts = 0
        while at == interrupts:
            at += 1
            requests = [one.add(*request) for request in asked]
            heard = {request: [] for request in requests}
            for request, token in one.step():
                heard[request].append(token)
            with Interrupt(at) as interrupt:
                for request, token in one.step():
                    heard[request].append(token)
            interrupts += interrupt.came
            for _ in range(40):
                for request, token in one.step():
                    heard[request].append(token)
            self.assertEqual([request.tokens for request in requests], want, f"bytecode {at}")
            self.assertEqual({request.state for request in requests}, {"finished"})
            self.assertEqual(list(one.steps()), [])
            if not interrupt.late:
                self.assertEqual(list(heard.values()), want, f"bytecode {at}")
        self.assertGreater(interrupts, 100)

    def test_without_next_the_greatest_logit_is_taken(self):
        document = json.loads(spec().write("json"))
        del document["outputs"]["next"]
        sizes = {"pages": 12, "page": 16, "slots": 5, "most": 8, "device": DEVICE}
        bare = serve.Engine(regraph.Spec(document, **SMALL), WEIGHTS, **sizes)
        one = engine()
        self.assertEqual(run(bare, [bare.add(prompts(1)[0], 9)]),
                         run(one, [one.add(prompts(1)[0], 9)]))
        document["outputs"] = {"next": "next"}
        greedy = serve.Engine(regraph.Spec(document, **SMALL), WEIGHTS, **sizes)
        with self.assertRaisesRegex(RegraphError, "needs an output 'logits'"):
            greedy.add([1], 4, sampling=serve.Sampling(temperature=1.0))

    def test_outputs_with_a_row_for_each_token(self):
        document = json.loads(Path(regraph.example("serve_model.json")).read_text())
        document["outputs"]["embedded"] = "embedded"
        for capacities in (5, 200), (200, 5, 5):  # in any order
            wide = serve.Engine(regraph.Spec(document, **SMALL), WEIGHTS, pages=12, page=16,
                                slots=5, most=8, rows=capacities, device=DEVICE)
            asked = prompts(5)
            self.assertEqual(run(wide, [wide.add(prompt, 9) for prompt in asked]),
                             run(e := engine(), [e.add(prompt, 9) for prompt in asked]))
            wide.add(asked[4], 2)
            for larger in (True, False):  # capacity
                wide.step()
                rows = int(wide.queue.lengths.sum())
                self.assertEqual(rows > 5, larger)
                np.testing.assert_array_equal(wide.output("embedded")[:rows],
                                              WEIGHTS["w_embed"][wide.queue.tokens[:rows]])
            with self.assertRaisesRegex(RegraphError, "no output 'idx'; expected one of .*logits"):
                wide.output("idx")

    def test_one_whose_logits_are_nan_fails_alone(self):
        name = next(n for n, w in WEIGHTS.items() if w.shape[0] == 61 and "head" not in n)
        asked = prompts(3)
        for sampling in serve.GREEDY, serve.Sampling(temperature=0.7, top_k=9, top_p=0.9):
            one = engine()
            want = run(one, [one.add(prompt, 9, sampling=sampling) for prompt in asked])
            odd = min(set(range(61)).difference(*want, *asked))
            table = WEIGHTS[name].copy()
            table[odd] = np.nan
            one = serve.Engine(spec(), {**WEIGHTS, name: table}, pages=12, page=16, slots=5, most=8)
            bad = one.add([3, odd, 5], 9, sampling=sampling)
            again = [one.add(prompt, 9, sampling=sampling) for prompt in asked]
            self.assertEqual(run(one, [bad, *again]), [[], *want])
            self.assertEqual([r.state for r in (bad, *again)], ["failed"] + 3 * ["finished"])

    def test_what_is_refused(self):
        one = engine()
        with self.assertRaisesRegex(RegraphError, "RG_E_LIMIT: a request of 100 tokens and 90 more "
                                                  "needs 12 pages; a sequence has at most 8"):
            one.add([1] * 100, 90)
        with self.assertRaisesRegex(RegraphError, "the weight 'w_head' is missing"):
            serve.Engine(spec(), {k: v for k, v in WEIGHTS.items() if k != "w_head"}, pages=4,
                         page=16, slots=2)
        with self.assertRaisesRegex(RegraphError, r"'w_last' has shape \(3,\); expected \(24,\)"):
            serve.Engine(spec(), {**WEIGHTS, "w_last": np.ones(3)}, pages=4, page=16, slots=2)
        with self.assertRaisesRegex(RegraphError, "expected pages of 24 tokens"):
            serve.Engine(spec(), WEIGHTS, pages=4, page=24, slots=2)
        with self.assertRaisesRegex(RegraphError, "no input '(context|lengths|pages|tokens)'"):
            serve.Engine(regraph.example("nsa.json"), {}, pages=4, page=16, slots=2)
        with self.assertRaisesRegex(RegraphError, "a row for each"):
            engine(rows=(2, 3))
        with self.assertRaisesRegex(RegraphError, r"none past 2\^31 - 1"):
            engine(rows=(2**31,))
        with self.assertRaisesRegex(RegraphError, "is not served here"):
            one.fork(engine().add([1], 3), 4)
        with self.assertRaisesRegex(RegraphError, "no token of its own yet"):
            one.fork(one.add([1], 3), 4)
        with self.assertRaisesRegex(RegraphError, "token 1 of the request is 61; expected 0 to 60"):
            one.add([1, 61], 3)
        with self.assertRaisesRegex(RegraphError, "token 0 of the request is -1; expected 0 to 60"):
            one.add([-1], 3)
        with self.assertRaisesRegex(RegraphError, "no tokens; expected one at least"):
            one.add([], 3)
        with self.assertRaisesRegex(RegraphError, "of 0 tokens more; expected one at least"):
            one.add([1], 0)
        for options in ([1.5], 3), ([1], 3.5):
            with self.assertRaises(TypeError):
                one.add(*options)
        with self.assertRaises(TypeError):
            one.add([1], 3, stop="a")

    def test_context_parallelism_is_refused_by_name(self):
        with self.assertRaisesRegex(RegraphError, "RG_E_POLICY.*cp|context parallel"):
            regraph.Plan(spec(), T=4, B=1, M=1, P=1, forks=1, cp=2)


class Page(unittest.TestCase):
    def test_the_example_of_the_page_runs(self):
        page = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
        code = page.read_text().split("```python\n")[1].split("```")[0]
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
                             timeout=120)
        self.assertEqual(out.returncode, 0, out.stderr)
        self.assertRegex(out.stdout, r"Request\(2: 3 \+ \d+ of 20 tokens, finished\) Stats\(")


class Ranks(unittest.TestCase):
    def test_two_processes_with_half_of_the_heads_each(self):
        ranks = Path(__file__).with_name("serve_ranks.py")
        out = subprocess.run([sys.executable, str(ranks)], capture_output=True, text=True,
                             timeout=120)
        self.assertEqual(out.returncode, 0, out.stderr)
        self.assertIn("2 ranks say what one says", out.stdout)


if __name__ == "__main__":
    unittest.main()
