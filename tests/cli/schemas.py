#!/usr/bin/env python3
"""The schemas that `regraph schema` prints, asked by a common validator (Python's jsonschema).

What the command prints as JSON must be what its schema says, and no key may be missing there. What
is read: examples and shipped files fit, what the loader refuses for its form alone the schema
refuses, too, and a mistake is told by its op's rules alone, in a sentence.

    tests/cli/schemas.py REGRAPH SOURCE_DIR

Exits with 77, and says so, where no python3 has jsonschema (Debian: python3-jsonschema).
"""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import check, leave

try:
    from jsonschema import Draft202012Validator
except ImportError:
    if sys.executable != "/usr/bin/python3" and Path("/usr/bin/python3").exists():
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    print("skipped: no python3 here has jsonschema with draft 2020-12 (Debian: python3-jsonschema)")
    sys.exit(77)

regraph, source = sys.argv[1], Path(sys.argv[2])
examples, golden = source / "examples", source / "tests" / "golden"


def said(*arguments, code=0):
    done = subprocess.run([regraph, *map(str, arguments)], capture_output=True, text=True)
    check(done.returncode == code, f"{arguments}: exit {done.returncode}: {done.stderr}")
    return done.stdout


def closed(schema):
    """The schema with no keys allowed that it does not name: what is printed must all be
    described."""
    if isinstance(schema, list):
        return [closed(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {
        key: value if key in ("if", "then", "else") else closed(value)
        for key, value in schema.items()
    }
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    return schema


SCHEMA = {}
for name in ("spec", "policy", "profile", "plan", "pareto", "run", "bench", "check", "ops",
             "trace"):
    SCHEMA[name] = json.loads(said("schema", name))
    Draft202012Validator.check_schema(SCHEMA[name])


def errors(name, document, strict=False):
    schema = closed(SCHEMA[name]) if strict else SCHEMA[name]
    return [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message}"
        for e in Draft202012Validator(schema).iter_errors(document)
    ]


def fits(name, document, what, strict=False):
    found = errors(name, document, strict)
    check(not found, f"{what} against schema {name}: {found[:3]}")


# ---- what is printed ----
nsa = examples / "nsa.json"
small = ["--set", "T=256", "--set", "H=4", "--set", "KH=2", "--set", "D=16", "--set", "DV=16"]
for extra in ([], ["--policy", "least"], ["--policy", examples / "policies/groups.json"],
              ["--cp", "4"], ["--no-fuse", "--policy", "all"], ["--no-grad"], ["--device", "cuda"]):
    fits("plan", json.loads(said("plan", nsa, *small, "--json", *extra)), f"plan {extra}", True)
for spec in ("moba", "nsa_linear"):
    fits("plan", json.loads(said("plan", examples / f"{spec}.json", "--set", "T=64", "--json")),
         spec, True)
fits("pareto", json.loads(said("pareto", nsa, *small, "--json")), "pareto", True)
for extra in ([], ["--backward"], ["--backward", "--cp", "2"]):
    fits("run", json.loads(said("run", nsa, *small, "--json", *extra)), f"run {extra}", True)
with tempfile.TemporaryDirectory() as folder:
    profile = Path(folder) / "profile.json"
    said("tune", examples / "sliding_window.json", "--set", "T=64", "--repeat", "1", "--time-limit",
         "1", "--profile-out", profile)
    fits("profile", json.loads(profile.read_text()), "tune --profile-out", True)
fits("bench", json.loads(said("bench", nsa, *small, "--repeat", "1", "--json")), "bench", True)
fits(
    "bench",
    json.loads(
        said("bench", examples / "nsa_serve.json", *small[2:], "--serve", "--repeat", "1",
             "--json")), "bench --serve", True)
fits(
    "bench",
    json.loads(
        said("bench", examples / "nsa_serve.json", *small[2:], "--set", "P=16", "--serve",
             "--eager", "--repeat", "1", "--json")), "bench --serve --eager", True)
fits("check", json.loads(said("check", nsa, "--json")), "check", True)
for wrong in (golden / "run/many.json", golden / "errors/cycle_two.json", "nowhere.json"):
    fits("check", json.loads(said("check", wrong, "--json", code=3)), f"check {wrong}", True)
fits("ops", json.loads(said("ops", "--json")), "ops", True)

# ---- state has a role of its own, and its next version an edge inside it ----
with tempfile.TemporaryDirectory() as folder:
    fork = Path(folder) / "fork.json"
    fork.write_text(
        json.dumps({
            "regraph": 1, "inputs": {"forks": {"shape": ["F", 2], "dtype": "i32"}},
            "state": {"cache": {"shape": ["P", 16, 8], "dtype": "f32", "next": "now"}}, "nodes": [{
                "name": "fork", "op": "page_copy", "in": {"cache": ["cache"], "pages": "forks"},
                "out": {"cache": ["now"]}
            }], "outputs": {"copy": "now"}
        }))
    plan = json.loads(
        said("plan", fork, "--set", "F=2", "--set", "P=4", "--json", "--html",
             Path(folder) / "fork.html"))
    fits("plan", plan, "a plan with state", True)
    roles = {t["name"]: t["role"] for t in plan["tensors"]}
    check(roles == {"forks": "input", "cache": "state", "copy": "output"}, f"roles: {roles}")
    edges = {e["tensor"]: e for e in plan["edges"]}
    check(edges["cache"]["role"] == "state" and edges["now"]["inside"] == "cache",
          f"edges of state: {edges}")
    check(plan["nodes"][0]["marks"] == ["in place"],
          f"the next version of state is not in place: {plan['nodes'][0]['marks']}")

# ---- edges: whoever reads a tensor stands behind its maker; the policy makes the same plan again
# ----
offload = {"regraph_policy": 1, "nodes": {"swa_o": "offload"}, "preset": "all"}
with tempfile.TemporaryDirectory() as folder:
    policy = Path(folder) / "policy.json"
    for asked in ({"regraph_policy": 1}, {"regraph_policy": 1, "preset": "all",
                                          "split_heads": 1}, offload):
        policy.write_text(json.dumps(asked))
        plan = json.loads(said("plan", nsa, *small, "--json", "--policy", policy))
        made, nodes = set(), plan["nodes"]
        for edge in plan["edges"]:
            check(edge["from"] >= 0 or edge.get("role") in ("input", "grad_in"),
                  f"{edge['tensor']} comes from nowhere")
            check(all(edge["from"] < to < len(nodes) for to in edge["to"]),
                  f"{edge['tensor']} is read before it is made")
            check(edge["to"] or edge.get("role") in ("output", "grad_out"),
                  f"nobody reads {edge['tensor']}")
            made.add(edge["from"])
        check(made == {*range(-1, len(nodes))}, "a node makes nothing")
        lengths = {edge["tensor"] for edge in plan["edges"] if edge["lengths"]}
        check(lengths == {"cu_seqlens"}, f"lengths: {lengths}")
        policy.write_text(json.dumps(plan["policy"]))
        fits("policy", plan["policy"], "the plan's policy")
        twin = json.loads(said("plan", nsa, *small, "--json", "--policy", policy))
        same = ("predicted_peak_bytes", "saved_bytes", "nodes", "edges", "memory", "policy")
        check([twin[key] for key in same] == [plan[key] for key in same],
              f"{plan['policy']} makes another plan")
marks = {
    name: {mark
           for n in plan["nodes"]
           if n.get("spec_node") == name
           for mark in n["marks"]}
    for name in ("swa_o", "slc_o", "combine")
}
check("offloaded" in marks["swa_o"] and "again" in marks["slc_o"] and "fused" in marks["combine"],
      f"marks: {marks}")

# ---- traces: nothing overlaps on a lane, what a step waits for is over, times and bytes are the
# plan's ----
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "trace.json"
    large = ["--set", "T=65536", "--device", "cuda"]
    policies = Path(folder) / "offload.json"
    policies.write_text(json.dumps(offload))
    for command, extra, lanes in (("plan", small, 1), ("plan", large, 3),
                                  ("plan", [*small, "--policy",
                                            policies], 2), ("plan", [*small, "--cp", "2"], 2),
                                  ("run", [*small,
                                           "--backward"], 1), ("bench", [*small, "--repeat",
                                                                         "1"], 1)):
        printed = json.loads(said(command, nsa, *extra, "--json", "--trace", path))
        trace = json.loads(path.read_text())
        fits("trace", trace, f"{command} {extra} --trace", True)
        plan = printed if command == "plan" else json.loads(said("plan", nsa, *small, "--json"))
        events, names = trace["traceEvents"], [n["name"] for n in plan["nodes"] if n["step"]]
        steps = [[e for e in events if e["ph"] == "X" and e["pid"] == pid] for pid in (2, 3)]
        check([len(x) for x in steps] == [len(names), 0 if command == "plan" else len(names)],
              f"{command}: {[len(x) for x in steps]} steps")
        for process in steps:
            check([e["name"] for e in process] in (names, []),
                  f"{command}: other steps than the plan's")
            check(
                len({e["tid"] for e in process}) >= lanes or not process,
                f"{command} {extra}: lanes {({e['tid'] for e in process})}")
            for tid in {e["tid"] for e in process}:
                lane = [e for e in process if e["tid"] == tid]
                for a, b in zip(lane, lane[1:]):
                    check(a["ts"] + a["dur"] <= b["ts"] + 0.002,
                          f"{command}: {a['name']} and {b['name']} at once on lane {tid}")
        model = sum(e["dur"] for e in steps[0 if command == "plan" else 1])
        said_ms = plan["forward_model_ms"] + plan["backward_model_ms"]
        check(
            abs(model / 1e3 - said_ms) <= 1e-4 * said_ms,
            f"{command}: {model} us modelled, {said_ms} ms planned")
        if command != "plan":
            for e, n in zip(steps[0], printed["nodes"]):
                check(
                    e["name"] == n["name"]
                    and abs(e["dur"] - 1e3 * n["ms"]) < 0.01 + 1e-5 * e["dur"],
                    f"{command}: {e} where {n}")
        waits = {ph: {e["id"]: e["ts"] for e in events if e["ph"] == ph} for ph in "sf"}
        check(waits["s"].keys() == waits["f"].keys(), "arrows without an end")
        check(all(waits["s"][k] <= waits["f"][k] + 0.002 for k in waits["s"]),
              "an arrow points back in time")
        alive = [e["args"] for e in events if e["ph"] == "C"]
        memory = plan["memory"]
        bound, most = max(memory["forward_bound_bytes"],
                          memory["backward_bound_bytes"]), max(a["scratch"] for a in alive)
        check(most <= bound if "cuda" in extra else most == bound,
              f"{most} bytes of scratch alive, {bound} is the bound")
        check(
            max(a["saved"] for a in alive) <= plan["saved_bytes"],
            "more is saved than the plan says")
        check(
            sum(e["ph"] == "b" for e in events) == sum(e["ph"] == "e" for e in events) > 0,
            "blocks without an end")

# ---- a picture: a box per step, lengths nowhere, every arrow between boxes that are there ----
for device in ("cpu", "cuda"):
    dot = said("plan", examples / "nsa_layer.json", "--set", "T=64", "--dot", "--device", device)
    boxes = set(re.findall(r"^ +([st][0-9]+) \[", dot, re.MULTILINE))
    arrows = re.findall(r"^ +([st][0-9]+) -> ([st][0-9]+) \[", dot, re.MULTILINE)
    check(len(arrows) > len(boxes) > 20, f"{len(boxes)} boxes, {len(arrows)} arrows")
    check({x for arrow in arrows for x in arrow} == boxes, "arrows and boxes do not go together")
    check("cu_seqlens" not in dot and "reshape" not in dot, "lengths or views are drawn")
    check("GiB" in dot or "MiB" in dot or "KiB" in dot, "no bytes on the arrows")

# a schema that lets anything pass would pass all of this
plan = json.loads(said("plan", nsa, *small, "--json"))
for change in ({"version": 2}, {"saved_bytes": "many"}, {"nodes": [{}]}, {"surprise": 1}):
    check(errors("plan", {**plan, **change}, True), f"the plan's schema accepts {change}")
check(errors("check", {"version": 1, "ok": False}), "a check that fails without an error")

# ---- what is read ----
for path in [*examples.glob("*.json"), *(golden / "dump").glob("*.json")]:
    fits("spec", {"$schema": "spec.schema.json", **json.loads(path.read_text())}, path.name)
for path in (examples / "policies").glob("*.json"):
    fits("policy", {"$schema": "policy.schema.json", **json.loads(path.read_text())}, path.name)
for path in (source / "recompute/profiles").glob("*.json"):
    fits("profile", {"$schema": "profile.schema.json", **json.loads(path.read_text())}, path.name)

# Form alone: keys and JSON types. Names, expressions' values and what the loader counts are its own
# business.
own = {
    "key_duplicate", "key_duplicate_input", "key_lengths_of_rows", "key_missing_lengths",
    "key_several_lengths", "repeat_nested"
}
own |= {
    path.stem
    for pattern in ("type_*_param*", "type_float_for*", "type_exponent*")
    for path in (golden / "errors").glob(pattern + ".json")
}
refused = 0
for path in sorted((golden / "errors").glob("*.json")):
    if path.name.endswith(".policy.json") or path.stem in own or not path.stem.startswith(
        ("key_", "type_")):
        continue
    refused += 1
    check(errors("spec", json.loads(path.read_text())), f"the spec's schema accepts {path.name}")
check(refused > 25, f"{refused} malformed specs asked")
for path in sorted((golden / "errors").glob("*.policy.json")):
    expect = (golden / "errors" / path.name.replace(".policy.json", ".expect")).read_text()
    if any(x in expect
           for x in ("RG_E_POLICY", "RG_E_OVERFLOW", "RG_E_SYNTAX", "already listed", "duplicate")):
        continue
    check(errors("policy", json.loads(path.read_text())),
          f"the policy's schema accepts {path.name}")

# ---- a mistake is told once, in the words of its op ----
NSA = json.loads(nsa.read_text())


def edited(pointer, value):
    spec = copy.deepcopy(NSA)
    *path, last = pointer.strip("/").split("/")
    at = spec
    for key in path:
        at = at[int(key) if isinstance(at, list) else key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return spec


for pointer, value, message in (
    ("/nodes/2/op", "top_k", "nodes/2/op: 'top_k' is not one of ['add', "),
    ("/nodes/4/attrs/windowleft", 3,
     "nodes/4/attrs: Additional properties are not allowed ('windowleft' was unexpected)"),
    ("/nodes/4/attrs/window_left", None, "nodes/4/attrs: 'window_left' is a required property"),
    ("/nodes/4/attrs/window_left", -2,
     "nodes/4/attrs/window_left: -2 is not valid under any of the given schemas"),
    ("/nodes/4/in/gate", "gate",
     "nodes/4/in: Additional properties are not allowed ('gate' was unexpected)"),
    ("/nodes/4/in/v", None, "nodes/4/in: 'v' is a required property"),
    ("/nodes/4/in", None, "nodes/4: 'in' is a required property"),
    ("/nodes/4/name", "a b", "nodes/4/name: 'a b' does not match "),
    ("/nodes/4/attr", {}, "nodes/4: Additional properties are not allowed ('attr' was unexpected)"),
    ("/nodes/4/op", None, "nodes/4: 'op' is a required property"),
    ("/inputs/q/dtype", "fp32",
     "inputs/q/dtype: 'fp32' is not valid under any of the given schemas"),
    ("/node", [], ": Additional properties are not allowed ('node' was unexpected)"),
):
    found = errors("spec", edited(pointer, value))
    check(len(found) == 1 and found[0].startswith(message), f"{pointer} = {value}: {found}")

leave()
