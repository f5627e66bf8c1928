"""The package with numpy alone, on the CPU. Runs under `python3 -m unittest` and under pytest."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
import threading
import unittest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import regraph  # noqa: E402
from regraph import RegraphError, arrays  # noqa: E402

T = 150
NSA = {"H": 4, "KH": 2, "D": 16, "DV": 16, "kernel": 16, "stride": 8, "block": 16, "top_n": 4,
       "window": 20}
SMALL = {"regraph": 1, "name": "scale",
         "inputs": {"x": {"shape": ["T", 3], "dtype": "f32", "grad": True},
                    "w": {"shape": [2, 3], "dtype": "f32", "grad": "accumulate"}},
         "nodes": [{"name": "n", "op": "linear", "in": {"x": "x", "w": "w"}, "out": {"y": "y"}}],
         "outputs": {"y": "y"}}


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def inputs(params=NSA, tokens=T):
    p = params
    return {"q": normal(tokens, p["H"], p["D"], seed=1),
            "k": normal(tokens, p["KH"], p["D"], seed=2),
            "v": normal(tokens, p["KH"], p["DV"], seed=3),
            "gate": normal(tokens, p["H"], 3, seed=4),
            "cu_seqlens": [0, 70, 70, 145]}


def nsa(dtype="f32", policy=None, **options):
    spec = regraph.Spec(regraph.example("nsa.json"), dtype=dtype, **NSA)
    return regraph.Session(regraph.Plan(spec, policy, T=T, B=3, threads=2, **options))


class Sizes(unittest.TestCase):
    def test_one_parser(self):
        for text, size in (("64KB", 64000), ("64kB", 64000), ("64KiB", 65536), ("64K", 65536),
                           ("1.5GiB", 3 << 29), ("6G", 6 << 30),
                           ("9223372036854775807", 2**63 - 1)):
            self.assertEqual(regraph.parse_size(text), size)
        for text, code in (("6Gib", "RG_E_VALUE"), ("", "RG_E_VALUE"),
                           ("8388608TiB", "RG_E_OVERFLOW")):
            with self.assertRaises(RegraphError) as caught:
                regraph.parse_size(text)
            self.assertEqual(caught.exception.status, code)

    def test_counts(self):
        spec = regraph.Spec(SMALL)
        self.assertEqual(regraph.Plan(spec, T="2K").tensors[0].shape, (2048, 3))

    def test_messages_are_one_line(self):
        with self.assertRaises(RegraphError) as caught:
            regraph.Spec({**SMALL, "name": "a\n\x1b[31m"})
        self.assertIn("a\\n\\x1b[31m", str(caught.exception))
        self.assertNotIn("\x1b", str(caught.exception) + caught.exception.message)


class Numbers(unittest.TestCase):
    def test_dense_attention(self):
        spec = regraph.Spec(regraph.example("dense_causal.json"), dtype="f32", H=2, KH=1, D=8, DV=8)
        session = regraph.Session(regraph.Plan(spec, T=20, B=1))
        q, k, v = normal(20, 2, 8, seed=1), normal(20, 1, 8, seed=2), normal(20, 1, 8, seed=3)
        out = session.forward(q=q, k=k, v=v, cu_seqlens=[0, 20])
        scores = np.einsum("ihd,jd->hij", q, k[:, 0]) / np.sqrt(8)
        scores = np.where(np.tril(np.ones((20, 20), bool)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("hij,jd->ihd", p / p.sum(-1, keepdims=True), v[:, 0])
        np.testing.assert_allclose(out["o"], expected, rtol=1e-5, atol=1e-5)

    def test_gradient_is_the_slope(self):
        session, x, d_o = nsa(), inputs(), normal(T, 4, 16, seed=9)
        session.forward(**x)
        gradient = session.backward({"o": d_o})
        at = lambda **moved: np.vdot(session.forward(**{**x, **moved})["o"].astype(np.float64), d_o)
        for name in ("v", "gate"):  # neither moves what is selected
            step = 1e-2 * normal(*x[name].shape, seed=7)
            there, here = (at(**{name: x[name] + s * step}) for s in (1, -1))
            slope = 2 * np.vdot(gradient[name].astype(np.float64), step)
            self.assertAlmostEqual((there - here) / slope, 1, delta=2e-3)

    def test_dead_rows_are_zero(self):
        session = nsa()
        o = session.forward(**inputs())["o"]
        gradient = session.backward({"o": normal(T, 4, 16)})
        self.assertFalse(o[145:].any() or any(g[145:].any() for g in gradient.values()))

    def test_recomputed_is_bit_equal(self):
        results = []
        for policy in (None, regraph.example("policies/all.json"),
                       {"regraph_policy": 1, "split_heads": 1}):
            session = nsa(policy=policy)
            o = session.forward(**inputs())["o"]
            results.append([o, *session.backward({"o": normal(T, 4, 16)}).values()])
        for other in results[1:]:
            self.assertTrue(all(np.array_equal(a, b) for a, b in zip(results[0], other)))

    def test_bf16(self):
        exact, rounded = nsa(), nsa("bf16")
        bits = {n: a if n == "cu_seqlens" else arrays.convert(a, "bf16")
                for n, a in inputs().items()}
        o = rounded.forward(**bits)["o"]
        self.assertEqual(o.dtype, arrays.NUMPY["bf16"])
        again = rounded.forward(**inputs())["o"]
        np.testing.assert_array_equal(regraph.float32(o), regraph.float32(again))
        as_bits = {n: a.view(np.uint16) if n != "cu_seqlens" else a for n, a in bits.items()}
        again = rounded.forward(**as_bits)["o"]
        np.testing.assert_array_equal(regraph.float32(o), regraph.float32(again))
        wide = {n: regraph.float32(a) if n != "cu_seqlens" else a for n, a in bits.items()}
        self.assertLess(np.abs(regraph.float32(o) - exact.forward(**wide)["o"]).max(), 0.05)
        gradient = rounded.backward({"o": normal(T, 4, 16)})
        self.assertGreater(np.abs(regraph.float32(gradient["k"])).max(), 0)

    def test_accumulates(self):
        session = regraph.Session(regraph.Plan(regraph.Spec(SMALL), T=5))
        x, w = normal(5, 3), normal(2, 3)
        np.testing.assert_allclose(session.forward(x=x, w=w)["y"], x @ w.T, rtol=1e-5)
        running = np.ones((2, 3), np.float32)
        for _ in range(2):
            gradient = session.backward({"y": np.ones((5, 2))}, accumulate={"w": running})
        np.testing.assert_allclose(running, 1 + 2 * np.tile(x.sum(0), (2, 1)), rtol=1e-5)
        self.assertIs(gradient["w"], running)
        np.testing.assert_allclose(session.backward({})["x"], 0)
        constant, held = np.ones((2, 3), np.float32), np.ones((2, 6), np.float32)
        constant.flags.writeable = False
        for given in constant, np.broadcast_to(np.float32(1), (2, 3)), held[:, ::2]:
            gradient = session.backward({"y": np.ones((5, 2))}, accumulate={"w": given})
            np.testing.assert_allclose(gradient["w"], 1 + np.tile(x.sum(0), (2, 1)), rtol=1e-5)
            self.assertTrue((given == 1).all())
        with self.assertRaisesRegex(RegraphError, "is int64 of shape .2, 3.; expected float32"):
            session.backward({}, accumulate={"w": [[1, 2, 3], [4, 5, 6]]})


class Objects(unittest.TestCase):
    def test_shapes_and_reports(self):
        spec = regraph.Spec(regraph.example("nsa.json"), **NSA)
        self.assertEqual(spec.solve({"q": (64, 4, 16), "cu_seqlens": (3,)}), {"T": 64, "B": 2})
        self.assertEqual(spec.tensors[0].shape, (-1, 4, 16))
        plan = regraph.Plan(spec, regraph.Policy(regraph.example("policies/all.json")), T=64, B=2)
        self.assertEqual(plan.tensors[0].shape, (64, 4, 16))
        self.assertEqual(plan.sizes.predicted_peak, plan.sizes.saved + plan.sizes.scratch)
        for text in (spec.write(), plan.write(), plan.write("json"), plan.report(),
                     plan.report("trace"), regraph.default_context().describe("ops")):
            self.assertIn("compress_kv", text)

    def test_plan_for_a_gpu_without_one(self):
        spec = regraph.Spec(regraph.example("nsa.json"))
        self.assertGreater(regraph.Plan(spec, device="cuda", T=4096, B=1).sizes.saved, 0)

    def test_looking_inside(self):
        session = nsa()
        session.forward(**inputs())
        idx = session.read("idx", (T, 2, 4), "i32")
        self.assertTrue((idx[:145, :, 0] == 0).all())
        self.assertIn("slc_o", [step[0] for step in session.times()])

    def test_a_refused_forward_can_be_gone_back_from(self):
        do = normal(T, NSA["H"], NSA["DV"], seed=9)
        want = None
        for wrong in {}, {"gate": normal(T, NSA["H"], 2)}, {"gate": None}, \
                {"cu_seqlens": [0, 70, 60, 145]}:
            session = nsa()
            session.forward(**inputs())
            if wrong:
                with self.assertRaises(RegraphError):
                    session.forward(**{**inputs(), "q": -inputs()["q"], **wrong})
                others = [np.full(n, 7, np.float32) for n in 100 * [T * 64, T * 32, T * 12]]
            got = session.backward({"o": do})
            want = want or got
            for name, array in want.items():
                np.testing.assert_array_equal(got[name], array)
        del others

    def test_what_changed_in_place_has_no_backward(self):
        session, given = nsa(), inputs()
        out = session.forward(**given)["o"]
        grad = normal(*out.shape, seed=5)
        want = session.backward({"o": grad})
        for array, name in ((given["q"], "input 'q'"), (given["v"][-9:], "input 'v'"),
                            (out, "output 'o'")):
            kept = array.copy()
            array *= -1
            with self.assertRaisesRegex(RegraphError, f"the {name} was changed in place"):
                session.backward({"o": grad})
            array[:] = kept
            np.testing.assert_array_equal(session.backward({"o": grad})["q"], want["q"])
        given["q"][:] = out[:]  # the next batch, and its forward
        session.forward(**given)
        session.backward({"o": grad})

    def test_forwards_that_wait_keep_what_they_ran_on(self):
        do = normal(T, NSA["H"], NSA["DV"], seed=9)
        session, single = nsa(), nsa()
        blocks = [np.zeros(session.plan.sizes.saved + 255, np.uint8) for _ in range(3)]
        at = [block.ctypes.data + -block.ctypes.data % 256 for block in blocks]
        for seed, address in enumerate(at):
            session.bind_saved(address)
            session.forward(**{**inputs(), "q": normal(T, 4, 16, seed=20 + seed)})
        others = [np.full(n, 7, np.float32) for n in 100 * [T * 64, T * 32, T * 12]]
        for seed in 1, 0, 2:
            session.bind_saved(at[seed])
            got = session.backward({"o": do})
            session.forget_saved(at[seed])
            single.forward(**{**inputs(), "q": normal(T, 4, 16, seed=20 + seed)})
            for name, array in single.backward({"o": do}).items():
                np.testing.assert_array_equal(got[name], array)
        self.assertFalse(session._kept)
        del others

    def test_rows_of_ranks_by_whole_starts(self):
        for call in (lambda starts: regraph.cp_rows(starts, 64, 2, 0),
                     lambda starts: regraph.cp_document_rows(starts, 2, 0)):
            call(np.array([0, 20, 64]))
            for start in 2**33, 2**32 + 20, -2**31 - 1:
                with self.assertRaisesRegex(RegraphError, f"sequence start 1 is {start}"):
                    call([0, start, 64])
            with self.assertRaises(TypeError):
                call([0, 20.5, 64])

    def test_no_integer_is_cut(self):
        spec = regraph.Spec(SMALL)
        for options in {"threads": 2**32 + 1}, {"cp": 2**64 + 2}, {"threads": -2**31 - 1}:
            name, value = next(iter(options.items()))
            with self.assertRaisesRegex(RegraphError, f"RG_E_VALUE: {name} is {value}; expected"):
                regraph.Plan(spec, T=8, **options)
        with self.assertRaisesRegex(RegraphError, "RG_E_VALUE.* is 4294967298; expected"):
            regraph.cp_rows([0, 64], 64, 2**32 + 2, 0)

    def test_device_memory_has_bounds(self):
        memory = regraph.core.DeviceMemory(nsa().plan, 16)
        there, wide = np.arange(4, dtype=np.float32), np.zeros(8, np.float32)
        memory.write(there)
        for wrong in wide, wide[::2]:
            for copy_ in memory.write, memory.read:
                with self.assertRaisesRegex(RegraphError, "expected a dense one of at most 16"):
                    copy_(wrong)
        self.assertFalse(wide.any())
        memory.read(wide[2:5])
        self.assertEqual(wide.tolist(), [0, 0, 0, 1, 2, 0, 0, 0])
        wide.flags.writeable = False
        with self.assertRaisesRegex(RegraphError, "may not be written"):
            memory.read(wide[:4])

    def test_handles_stay_in_their_process(self):
        session = nsa()
        plan = session.plan
        spec = regraph.Spec(SMALL)
        for handle in plan, spec, regraph.Policy("all"), spec.context:
            self.assertIs(copy.copy(handle), handle)
            self.assertIs(copy.deepcopy([handle])[0], handle)
            with self.assertRaisesRegex(RegraphError, "is memory of this process, and can't be "):
                pickle.dumps(handle)
        for copied in copy.copy, copy.deepcopy, pickle.dumps:
            with self.assertRaisesRegex(RegraphError, "a Session is memory of this process"):
                copied(session)

    def test_one_thread_at_a_time(self):
        session, refused = nsa(), []
        whole = session.run_forward

        def other():
            for call in (lambda: session.forward(**inputs()), lambda: session.backward({}),
                         session.state):
                try:
                    call()
                except RegraphError as error:
                    refused.append(str(error))

        def run():
            session.run_forward = whole
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            whole()

        session.run_forward = run
        session.forward(**inputs())
        self.assertEqual([r[r.index(": ") + 2:r.index(": the")] for r in refused],
                         ["forward", "backward", "state"])
        self.assertIn("make one for each thread, of the same plan", refused[0])
        session.forward(**inputs())

    def test_several_calls_in_flight(self):
        session = nsa()
        calls = []
        for seed in range(3):
            x = {**inputs(), "q": normal(T, 4, 16, seed=20 + seed)}
            session.forward(**x)
            calls.append((x, session.backward({"o": normal(T, 4, 16)})))
        plan = session.plan
        blocks = [np.zeros(plan.sizes.saved + 255, np.uint8) for _ in calls]
        at = [block.ctypes.data + -block.ctypes.data % 256 for block in blocks]
        other = regraph.Session(plan)
        for address, (x, _) in zip(at, calls):
            other.bind_saved(address)
            other.forward(**x)
        for k in (1, 0, 2):  # a session that ran none of them
            x, expected = calls[k]
            third = regraph.Session(plan)
            third.forward(**x)
            third.adopt_saved(at[k])
            gradient = third.backward({"o": normal(T, 4, 16)})
            third.forget_saved(at[k])
            self.assertTrue(all(np.array_equal(gradient[n], expected[n]) for n in expected))


class Failures(unittest.TestCase):
    def fails(self, status, part, function, *args, **named):
        with self.assertRaises(RegraphError) as caught:
            function(*args, **named)
        self.assertEqual(caught.exception.status, status)
        self.assertIn(part, str(caught.exception))
        return caught.exception

    def test_specs(self):
        bad = {**SMALL, "nodes": [{**SMALL["nodes"][0], "in": {"x": "z", "w": "w"}}]}
        error = self.fails("RG_E_NAME", "'z'", regraph.Spec, bad)
        self.assertEqual(error.pointer, "/nodes/0/in/x")
        self.assertEqual(self.fails("RG_E_SYNTAX", "<text>", regraph.Spec, "{\n  1}").line, 2)
        self.fails("RG_E_IO", "/nowhere/x.json", regraph.Spec, "/nowhere/x.json")
        self.fails("RG_E_USAGE", "T", regraph.Plan, regraph.Spec(SMALL))
        self.fails("RG_E_SHAPE", "", regraph.Spec(SMALL).solve, {"x": (4, 5)})
        self.fails("RG_E_IO", "no example", regraph.example, "none.json")

    def test_arrays(self):
        session = regraph.Session(regraph.Plan(regraph.Spec(SMALL), T=5))
        x, w = normal(5, 3), normal(2, 3)
        self.fails("RG_E_USAGE", "'w' is missing", session.forward, x=x)
        self.fails("RG_E_USAGE", "no input 'v'", session.forward, x=x, w=w, v=w)
        self.fails("RG_E_SHAPE", "(5, 2)", session.forward, x=x[:, :2], w=w)
        self.fails("RG_E_DTYPE", "complex", session.forward, x=x.astype(complex), w=w)
        self.fails("RG_E_USAGE", "without a forward", session.backward, {})
        session.forward(x=x, w=w)
        self.fails("RG_E_SHAPE", "running", session.backward, {}, {"w": np.zeros(3, np.float32)})
        self.fails("RG_E_USAGE", "does not accumulate", session.backward, {}, {"x": x})

    def test_lengths(self):
        self.fails("RG_E_DATA", "cu_seqlens", nsa().forward,
                   **{**inputs(), "cu_seqlens": [0, 80, 70, 145]})

    def test_missing_library(self):
        code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
                "try: import regraph\nexcept RuntimeError as e: print(e)")
        package = str(Path(regraph.__file__).parents[1])
        found = subprocess.run([sys.executable, "-c", code, package], text=True,
                               env={**os.environ, "REGRAPH_LIBRARY": "/nowhere.so"},
                               capture_output=True)
        self.assertIn("REGRAPH_LIBRARY", found.stdout)
        self.assertIn("/nowhere.so", found.stdout)


class Policies(unittest.TestCase):
    def test_by_name_and_by_budget(self):
        file = nsa(policy=regraph.example("policies/all.json")).plan
        self.assertEqual(nsa(policy="all").plan.sizes.saved, file.sizes.saved)
        budget = f"{nsa().plan.sizes.predicted_peak - 1}"
        self.assertLess(nsa(policy=budget).plan.sizes.predicted_peak, int(budget) + 1)
        with self.assertRaisesRegex(RegraphError, "nowhere: RG_E_IO"):
            nsa(policy="nowhere")


class Builder(unittest.TestCase):
    def nsa(self):
        g = regraph.Graph("nsa", **NSA, dtype="f32")
        q, k, v, gate = (g.input(name, ["T", heads, width], grad=True) for name, heads, width in
                         (("q", "H", "D"), ("k", "KH", "D"), ("v", "KH", "DV"), ("gate", "H", 3)))
        g.input("cu_seqlens", ["B+1"], "i32")
        blocks = {"kernel": "$kernel", "stride": "$stride"}
        ck, cv = g.compress_kv(k, v, name="compress_kv", **blocks)
        cmp_o, lse = g.cmp_attn(q, ck, cv, name="cmp_o", **blocks)
        idx = g.topk(q, ck, lse, block="$block", top_n="$top_n", init=1, local=2, **blocks)
        slc_o, _ = g.slc_attn(q, k, v, idx, block="$block", name="slc_o")
        swa_o, _ = g.swa_attn(q, k, v, window_left="$window", name="swa_o")
        g.output("o", g.combine([cmp_o, slc_o, swa_o], gate, name="combine"))
        return g

    def test_same_as_the_file(self):
        g, file = self.nsa(), regraph.Spec(regraph.example("nsa.json"), dtype="f32", **NSA)
        results = []
        ours, theirs = (regraph.Session(regraph.Plan(spec, T=T, B=3)) for spec in
                        (g.spec(), file))
        for x, y in ((s.forward(**inputs())["o"], s.backward({"o": normal(T, 4, 16)}))
                     for s in (ours, theirs)):
            results.append({"o": x, **y})
        for name, array in results[0].items():
            np.testing.assert_array_equal(array, results[1][name], name)

    def test_round_trip(self):
        g = self.nsa()
        again = regraph.Spec(g.json())
        self.assertEqual(again.write("json"), g.spec().write("json"))
        self.assertEqual(regraph.Spec(again.write("json")).write("json"), again.write("json"))

    def test_names_of_its_own_are_free(self):
        g = regraph.Graph("chain", dtype="f32")
        x = g.input("x", ["T", 4])
        for name in (None, "silu_3", None):
            x = g.silu(x, name=name)
        g.output("y", g.silu(x))
        self.assertEqual([node["name"] for node in g.document["nodes"]],
                         ["silu", "silu_3", "silu_4", "silu_5"])
        g.spec()

    def test_typed_from_the_table(self):
        g = regraph.Graph()
        signature = inspect.signature(g.swa_attn)
        self.assertEqual(list(signature.parameters)[:3], ["q", "k", "v"])
        self.assertIs(signature.parameters["window_left"].annotation, int)
        self.assertIn("attribute window_left", g.swa_attn.__doc__)
        self.assertIn("swa_attn", dir(g))

    def test_mistakes(self):
        g = self.nsa()
        q = regraph.graph.Value(g, "q")
        for code, part, call in (
                ("RG_E_KEY", "'window_lft'; did you mean 'window_left'?",
                 lambda: g.swa_attn(q, q, q, window_lft=3)),
                ("RG_E_USAGE", "'k' is 7; expected a tensor", lambda: g.swa_attn(q, 7, q)),
                ("RG_E_USAGE", "'q' is given twice", lambda: g.swa_attn(q, q=q)),
                ("RG_E_NAME", "'q' stands in inputs already", lambda: g.input("q", ["T"])),
                ("RG_E_NAME", "'o' stands in outputs already", lambda: g.output("o", q))):
            with self.assertRaises(RegraphError) as error:
                call()
            self.assertEqual(error.exception.status, code)
            self.assertIn(part, error.exception.message)
        with self.assertRaisesRegex(AttributeError, "no op 'swa_atn'; did you mean 'swa_attn'"):
            g.swa_atn


class State(unittest.TestCase):
    @staticmethod
    def graph():
        """Rows of `x` into pages of a cache; the sum of its pages before."""
        g = regraph.Graph("state", dtype="f32")
        x, pages = g.input("x", ["T", 1, 4]), g.input("pages", ["B", "M"], "i32")
        lengths, context = g.input("lengths", ["B"], "i32"), g.input("context", ["B"], "i32")
        k, v = (g.state(name, ["P", 2, 1, 4]) for name in "kv")
        cu, _, context, pages, _ = g.paged_batch(x, k, lengths, context, pages)
        g.output("before", g.cast(k))
        for old, new in zip((k, v), g.kv_append(x, x, cu, context, pages, k, v)):
            g.next(old, new)
        return g

    def test_lives_from_run_to_run(self):
        session = regraph.Session(regraph.Plan(self.graph().spec(), T=3, B=1, M=2, P=3))
        x = normal(3, 1, 4)
        step = {"x": x, "lengths": [3], "pages": [[2, 0]]}
        self.assertFalse(session.forward(**step, context=[3])["before"].any())
        now = session.state()["k"]
        np.testing.assert_array_equal(now.reshape(6, 4)[[4, 5, 0]], x[:, 0])
        self.assertFalse(now.reshape(6, 4)[1:4].any())
        again = session.forward(**step, context=[4])["before"].reshape(6, 4)
        np.testing.assert_array_equal(again[[4, 5, 0]], x[:, 0])
        np.testing.assert_array_equal(session.state()["v"].reshape(6, 4)[[5, 0, 1]], x[:, 0])
        mine = np.ones((3, 2, 1, 4), np.float32)
        session.state(k=mine)
        before = session.forward(**step, context=[3])["before"]
        self.assertTrue((before == 1).all() and (mine == 1).all())
        with self.assertRaisesRegex(RegraphError, "no state 'q'; it has k, v"):
            session.state(q=mine)
        with self.assertRaisesRegex(RegraphError, "context.0. is 5; expected 0 to 4"):
            session.forward(**step, context=[5])

    def test_mistakes(self):
        g = self.graph()
        with self.assertRaisesRegex(RegraphError, "'x' is no state"):
            g.next(regraph.graph.Value(g, "x"), regraph.graph.Value(g, "x"))


if __name__ == "__main__":
    unittest.main()
