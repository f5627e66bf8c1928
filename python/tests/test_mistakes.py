"""Thirty mistakes that newcomers make, and what they are told: place, value, remedy. And the
schemas, asked by a common validator, where jsonschema is installed."""

import ast
import copy
import json
import sys
import unittest
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import regraph  # noqa: E402
from regraph import RegraphError  # noqa: E402

NSA = json.loads(regraph.example("nsa.json").read_text())
SMALL = {"H": 2, "KH": 1, "D": 8, "DV": 8, "window": 20, "dtype": "f32"}


def edited(pointer, value):
    """NSA with the value at a JSON pointer replaced; None takes it away."""
    spec = copy.deepcopy(NSA)
    *path, last = pointer.strip("/").split("/")
    at = spec
    for key in path:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is None:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return spec


def plan(spec=NSA, policy=None, **dims):
    return regraph.Plan(regraph.Spec(spec, name="nsa", **SMALL), policy, **dims)


def session():
    return regraph.Session(plan(T=64, B=1))


def feed(**changed):
    shapes = {"q": (64, 2, 8), "k": (64, 1, 8), "v": (64, 1, 8), "gate": (64, 2, 3)}
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    arrays["cu_seqlens"] = [0, 64]
    return session().forward(**{**arrays, **changed})


MISTAKES = [
    ("a comma too many", lambda: regraph.Spec('{"regraph": 1,}'),
     "<text>:1:15: RG_E_SYNTAX: not JSON: string or '}' expected near '}'"),
    ("a file that is not there", lambda: regraph.Spec("nsaa.json"),
     "nsaa.json: RG_E_IO: can't be read: No such file or directory"),
    ("an example misspelt", lambda: regraph.example("nsa_lineer.json"),
     "RG_E_IO: no example 'nsa_lineer.json' ships with this package; did you mean "
     "'nsa_linear.json'?"),
    ("a key misspelt", lambda: plan({**NSA, "node": []}),
     "nsa:/node: RG_E_KEY: unknown key 'node' in a spec (nearest: 'nodes')"),
    ("an op misspelt", lambda: plan(edited("/nodes/2/op", "top_k")),
     "nsa:/nodes/2/op: RG_E_NAME: there is no op 'top_k' (nearest: 'topk'); `regraph ops` "
     "lists them, --plugin brings more"),
    ("a tensor misspelt", lambda: plan(edited("/nodes/5/in/gate", "gates")),
     "nsa:/nodes/5/in/gate: RG_E_NAME: there is no tensor 'gates' (nearest: 'gate')"),
    ("an attribute misspelt", lambda: plan(edited("/nodes/4/attrs", {"window": 20})),
     "nsa:/nodes/4/attrs/window: RG_E_KEY: swa_attn has no attribute 'window' (known: scale, "
     "softcap, window_left)"),
    ("an attribute out of range", lambda: plan(edited("/nodes/4/attrs/window_left", -2)),
     "nsa:/nodes/4/attrs/window_left: RG_E_VALUE: attribute 'window_left' is -2; expected -1 "
     "to 2147483647"),
    ("a parameter that is not there", lambda: plan(edited("/nodes/4/attrs/window_left", "$win")),
     "nsa:/nodes/4/attrs/window_left: RG_E_NAME: there is no parameter 'win' (known: H, KH, "
     "D, DV, kernel, stride, block, top_n, init, local, window, dtype)"),
    ("an input forgotten", lambda: plan(edited("/nodes/4/in/v", None)),
     "nsa:/nodes/4/in: RG_E_KEY: swa_attn needs an input on port 'v': values of the same rows"),
    ("several inputs forgotten", lambda: plan(edited("/nodes/4/in", {"q": "q"})),
     "nsa:/nodes/4/in: RG_E_KEY: swa_attn needs inputs on its ports 'k', 'v'"),
    ("an axis too few", lambda: plan(edited("/inputs/q/shape", ["T", "D"])),
     "nsa:/nodes/1/in/q: RG_E_RANK: 'q' has 2 axes, [T, 8]; port q of cmp_attn takes 3: "
     "[T,H,D]\n"
     "nsa:/nodes/4/in/q: RG_E_RANK: 'q' has 2 axes, [T, 8]; port q of swa_attn takes 3: "
     "[T,H,D]"),
    ("a type that there is not", lambda: plan(edited("/inputs/q/dtype", "fp32")),
     "nsa:/inputs/q/dtype: RG_E_VALUE: 'fp32' is no dtype; expected f32, f16, bf16 or i32 "
     "(nearest: 'f32')"),
    ("an output of nothing", lambda: plan(edited("/outputs/o", "out")),
     "nsa:/outputs/o: RG_E_NAME: there is no tensor 'out' (known: q, k, v, gate, cu_seqlens, "
     "cmp_k, cmp_v, cmp_o, cmp_lse, idx, slc_o, slc_lse, swa_o, swa_lse, o)"),
    ("a dimension left open", lambda: plan(B=1),
     "nsa: RG_E_USAGE: the dimension 'T' has no value; bind it: --set T=VALUE"),
    ("a dimension that there is not", lambda: plan(T=64, B=1, S=3),
     "nsa: RG_E_USAGE: the spec has no dimension or parameter 'S' to set (known: T, B, H, KH, "
     "D, DV, kernel, stride, block, top_n, init, local, window, dtype)"),
    ("a policy for another spec", lambda: plan(policy={
        "regraph_policy": 1, "recompute": ["swa"]}, T=64, B=1),
     "<dict>:/recompute/0: RG_E_POLICY: the spec has no node 'swa' (known: compress_kv, "
     "cmp_o, topk, slc_o, swa_o, combine)"),
    ("a budget too small", lambda: plan(policy="1KiB", T=64, B=1, threads=1),
     "1KiB: RG_E_INFEASIBLE: no choice of recomputed nodes fits 1.00 KiB of peak memory; the least "
     "any reaches is 313.8 KiB (321280 bytes)"),
    ("an array left out", lambda: session().forward(),
     "RG_E_USAGE: the input 'q' is missing; expected shape (64, 2, 8)"),
    ("an array of another shape", lambda: feed(q=np.ones((64, 2, 16), np.float32)),
     "RG_E_SHAPE: the input 'q' has shape (64, 2, 16); expected (64, 2, 8)"),
    ("lengths that fall", lambda: feed(cu_seqlens=[64, 0]),
     "RG_E_DATA: cu_seqlens[0] is 64; expected 0, where the first sequence starts"),
    ("a dimension past all integers", lambda: plan(T=2**70, B=1),
     "nsa: RG_E_USAGE: dimension 'T' is set to '1180591620717411303424'; expected an integer "
     "such as 4096 or 64K"),
    ("a word for a policy that there is not", lambda: regraph.Policy("al"),
     "al: RG_E_IO: there is no such file, and no such word for a policy (nearest: 'all')"),
    ("a policy that is not there", lambda: plan(policy="policies/al.json", T=64, B=1),
     "policies/al.json: RG_E_IO: can't open the file: No such file or directory"),
    ("a plan of a policy", lambda: regraph.Plan(regraph.Policy("all"), T=64, B=1),
     "RG_E_USAGE: a plan takes a Spec; this is a Policy"),
    ("a plan of a plan", lambda: regraph.Plan(plan(T=64, B=1), T=64, B=1),
     "RG_E_USAGE: a plan takes a Spec; this is a Plan"),
    ("a spec as a policy", lambda: plan(policy=regraph.Spec(NSA, **SMALL), T=64, B=1),
     "RG_E_USAGE: a plan takes a Policy; this is a Spec"),
    ("a number as a policy", lambda: plan(policy=0.5, T=64, B=1),
     "RG_E_USAGE: a plan takes a Policy; this is a float"),
    ("a session of a spec", lambda: regraph.Session(regraph.Spec(NSA, **SMALL)),
     "RG_E_USAGE: a session takes a Plan; this is a Spec"),
    ("a spec checked against a plan", lambda: regraph.Spec(NSA, **SMALL).check(plan(T=64, B=1)),
     "RG_E_USAGE: check takes a Policy; this is a Plan"),
    ("a policy for a context", lambda: regraph.Spec(NSA, regraph.Policy("all")),
     "RG_E_USAGE: a spec takes a Context; this is a Policy"),
]


class Mistakes(unittest.TestCase):
    maxDiff = None

    def test_all(self):
        self.assertEqual(len(MISTAKES), 31)
        for name, make, expected in MISTAKES:
            with self.subTest(name):
                with self.assertRaises(RegraphError) as caught:
                    make()
                self.assertEqual(str(caught.exception), expected)


    def test_a_file_near_one_that_is_not_there(self):
        for source, hint in ((regraph.example("nsa.json").parent / "nsa.jsn",
                              "; did you mean 'nsa.json'?"),
                             ("moba.json", "moba.json' ships, as regraph.example('moba.json')")):
            with self.assertRaises(RegraphError) as caught:
                regraph.Spec(source)
            self.assertIn("RG_E_IO: can't be read: No such file", str(caught.exception))
            self.assertTrue(str(caught.exception).endswith(hint), str(caught.exception))

    def test_plan_of_a_source(self):
        whole = regraph.Plan({**NSA, "params": {**NSA["params"], **SMALL}}, "all", T=64, B=1)
        self.assertEqual(repr(whole.sizes), repr(plan(policy="all", T=64, B=1).sizes))

    def test_several(self):
        spec = edited("/nodes/2/op", "top_k")
        spec["nodes"][4]["attrs"] = {"window": 20}
        with self.assertRaises(RegraphError) as caught:
            plan(spec)
        first, second = str(caught.exception).split("\n")
        self.assertTrue(first.startswith("nsa:/nodes/2/op: RG_E_NAME: there is no op 'top_k'"),
                        first)
        self.assertEqual(second, str(caught.exception.others[0]))
        self.assertTrue(second.startswith("nsa:/nodes/4/attrs/window: RG_E_KEY: swa_attn has no "
                                          "attribute"), second)
        with self.assertRaises(RegraphError) as caught:
            regraph.Spec(json.dumps(spec, indent=1), name="nsa.json")
        errors = caught.exception, *caught.exception.others
        self.assertEqual([(e.pointer, e.line > 1) for e in errors],
                         [("/nodes/2/op", True), ("/nodes/4/attrs/window", True)])


class Schemas(unittest.TestCase):
    def setUp(self):
        try:
            import jsonschema
        except ImportError:
            self.skipTest("jsonschema is not installed")
        context = regraph.default_context()
        self.spec, self.policy = (
            jsonschema.Draft202012Validator(json.loads(context.describe(what)))
            for what in ("schema-spec", "schema-policy"))

    def test_examples(self):
        for path in regraph.example("nsa.json").parent.glob("*.json"):
            self.spec.validate(json.loads(path.read_text()))
        for path in regraph.example("policies/all.json").parent.glob("*.json"):
            self.policy.validate({"$schema": "policy.schema.json", **json.loads(path.read_text())})

    def test_messages(self):
        for pointer, value, part in (
                ("/nodes/4/attrs/window_left", -2, "-2 is not valid"),
                ("/nodes/4/attrs", {"window_left": 3, "lft": 1}, "('lft' was unexpected)"),
                ("/nodes/2/op", "top_k", "'top_k' is not one of ['"),
                ("/nodes/4/in/v", None, "'v' is a required property")):
            errors = [error.message for error in self.spec.iter_errors(edited(pointer, value))]
            self.assertEqual(len(errors), 1, errors)
            self.assertIn(part, errors[0])


class Imports(unittest.TestCase):
    """What modules take from one another is there, whatever framework they need besides."""

    def test_names(self):
        def made(tree):
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    yield node.name
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id
                elif isinstance(node, (ast.Import, ast.ImportFrom)):
                    yield from (name.asname or name.name for name in node.names)

        folder = Path(regraph.__file__).parent
        trees = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
        for module, tree in trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    there = set(made(trees[node.module])) if node.module else set(trees)
                    for name in node.names:
                        self.assertIn(name.name, there, f"{module}.py, line {node.lineno}")


if __name__ == "__main__":
    unittest.main()
