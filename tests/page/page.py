#!/usr/bin/env python3
"""The page of --html in a browser: nothing is fetched, nothing complains, what it shows is what
--json prints, and hover, click and keys do what they should.

    tests/page/page.py REGRAPH SOURCE_DIR [FOLDER]

Screenshots of 1440 and 700 pixels, light and dark, go to FOLDER, if that is given. Exits with 77,
and says so, where there is no Chromium (Debian: chromium).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cli"))
from browser import NAMES, Browser, found  # noqa: E402
from checks import check, leave  # noqa: E402

if not found():
    print(f"skipped: none of {', '.join(NAMES)} is installed (Debian: chromium)")
    sys.exit(77)

regraph, source = sys.argv[1], Path(sys.argv[2])
shots = Path(sys.argv[3]) if len(sys.argv) > 3 else None
if shots:
    shots.mkdir(parents=True, exist_ok=True)
examples = source / "examples"
work = tempfile.TemporaryDirectory()
folder = Path(work.name)


def said(*arguments):
    done = subprocess.run([regraph, *map(str, arguments)], capture_output=True, text=True)
    check(done.returncode == 0, f"{arguments}: exit {done.returncode}: {done.stderr}")
    return done.stdout


def written(name, *arguments):
    """What --json printed, and the page that was written in the same run."""
    path = folder / f"{name}.html"
    printed = json.loads(said(*arguments, "--json", "--html", path))
    text = path.read_text()
    check(
        "</script><b>" not in text and text.count("http")
        == text.count("http://www.w3.org/2000/svg") + text.count("http-equiv"),
        f"{name}: an address in the page")
    return printed, path


def values(page, selector, key="value"):
    return page.eval(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => [e.dataset.{key}, "
        f"e.textContent])"
    )


def number(page, name):
    return float(page.eval(f"document.querySelector('[data-number=\"{name}\"]').dataset.value"))


def now(page):
    return int(page.eval("document.querySelector('svg.memory').getAttribute('aria-valuenow')"))


def key_of(plan, name):
    return f'[data-key="n{next(i for i, n in enumerate(plan["nodes"]) if n["name"] == name)}"]'


def opens(browser, path, **how):
    page = browser.open(path.as_uri(), **how)
    page.wait("document.documentElement.dataset.ready")
    if shots:
        page.shot(shots /
                  f"{path.stem}-{how.get('width', 1440)}{'-dark' if how.get('dark') else ''}.png")
    check(
        page.eval("document.documentElement.scrollWidth") == how.get("width", 1440),
        f"{path.name} is wider than {how}")
    return page


# ---- the pages ----
nsa = examples / "nsa.json"
large = ["--set", "T=65536", "--device", "cuda"]
small = [
    "--set", "T=256", "--set", "B=2", "--set", "H=4", "--set", "KH=2", "--set", "D=16", "--set",
    "DV=16"
]
kept = folder / "kept.json"
kept.write_text(said("plan", nsa, *large, "--json"))
plan, nsa_page = written("nsa", "plan", nsa, *large, "--policy", "all", "--against", kept)
other = json.loads(kept.read_text())
check(nsa_page.stat().st_size < 500_000, f"the page of NSA has {nsa_page.stat().st_size} bytes")
front = json.loads(said("pareto", nsa, *small, "--json"))
bench, bench_page = written("bench", "bench", nsa, *small, "--repeat", "2")
bench_plan = json.loads(said("plan", nsa, *small, "--json"))
deep, deep_page = written("model", "plan", examples / "nsa_model.json", "--set", "T=4096",
                          "--policy", "all")
check(deep_page.stat().st_size < 2_000_000,
      f"the page of 12 layers has {deep_page.stat().st_size} bytes")
hostile = {**bench_plan, "name": "</script><b>&\u2028<!--"}
(folder / "odd.json").write_text(json.dumps(hostile))
odd, odd_page = written("odd", "plan", nsa, *small, "--no-grad", "--against", folder / "odd.json")
written("run", "run", nsa, *small, "--backward")

with Browser() as browser:
    # ---- numbers are those that are printed ----
    page = opens(browser, nsa_page)
    for name, key in (("peak", "predicted_peak_bytes"), ("saved", "saved_bytes"), ("scratch",
                                                                                   "scratch_bytes"),
                      ("forward", "forward_model_ms"), ("backward", "backward_model_ms")):
        check(
            number(page, name) == plan[key],
            f"{name}: {number(page, name)} shown, {plan[key]} printed")
    check(number(page, "computed again") == plan["recompute"]["extra_ms"], "extra time")
    steps = [n for n in plan["nodes"] if n["step"]]
    shown = values(page, "#steps td[data-column=modelled]")
    check([float(v) for v, _ in shown] == [n["model_ms"] for n in steps],
          "the table's times are not the plan's")
    check(
        all(
            abs(float(t.split()[0].replace(",", "")) * (1e-3 if "µ" in t else 1) -
                float(v)) <= 6e-4 * float(v) for v, t in shown), "texts of times")
    check([t for _, t in values(page, "#steps td[data-column=node]")] == [n["name"] for n in steps],
          "the table's nodes")
    peak = now(page)
    alive = {
        v: int(n) for v, n in page.eval(
            "[...document.querySelectorAll('[data-alive]')].map((e) => [e.dataset.alive, "
            "e.dataset.value])"
        )
    }
    at = plan["nodes"].index(steps[peak])
    want = {
        b.get("tensor") or b["workspace_of"]: b["size"]
        for b in plan["memory"]["blocks"]
        if b["region"] != "host" and b["first"] <= at <= b["last"]
    }
    check(alive == want, f"alive at the peak: {alive}, not {want}")
    scratch = max(
        sum(b["size"]
            for b in plan["memory"]["blocks"]
            if b["region"] == "scratch" and b["first"] <= i <= b["last"])
        for i in range(len(plan["nodes"])))
    check(
        int(values(page, "#alive-scratch")[0][0]) == scratch <= plan["scratch_bytes"],
        "most scratch alive")
    compared = {
        k: [
            float(x) for x in page.eval(
                f"[...document.querySelectorAll('[data-compare=\"{k}\"] [data-value]')].map((e) "
                f"=> e.dataset.value)"
            )
        ] for k in ("peak", "saved", "backward, modelled")
    }
    for name, key in (("peak", "predicted_peak_bytes"), ("saved", "saved_bytes"),
                      ("backward, modelled", "backward_model_ms")):
        a, b = plan[key], other[key]
        check(compared[name][:2] == [a, b] and abs(compared[name][2] - (a - b)) < 1e-6 * b,
              f"compared: {name}: {compared[name]}")

    # ---- hover: a tip, what is near stays lit, the memory cursor follows ----
    node = key_of(plan, "slc_o")
    page.hover(node)
    page.wait("!document.getElementById('tip').hidden")
    tip = page.eval("document.getElementById('tip').textContent")
    takes = f"{next(n['model_ms'] for n in steps if n['name'] == 'slc_o'):.4g} ms"
    check(tip.startswith(f"slc_o\nslc_attn\nforward\n{takes}"), f"tip: {tip}")
    lit = set(page.eval("[...document.querySelectorAll('.item.on')].map((e) => e.dataset.key)"))
    reads = {
        f"n{e['from']}" if e["from"] >= 0 else f"input:{e['bound_as']}"
        for e in plan["edges"]
        if not e["lengths"] and plan["nodes"].index(next(
            n for n in steps if n["name"] == "slc_o")) in e["to"]
    }
    check(reads < lit, f"lit: {lit}, but {reads} are read")
    check(steps[now(page)]["name"] == "slc_o", "the memory cursor does not follow")
    check("slc_o" in page.eval("document.querySelector('#alive h3').textContent"),
          "the list does not follow")
    page.mouse("mouseMoved", 2, 2)
    check(
        page.eval("document.getElementById('tip').hidden && !document.querySelector('svg.focus')"),
        "the tip stays")

    # ---- click: details, table, and a block leads to its node ----
    page.click(node)
    check(
        page.eval("document.getElementById('detail-name').textContent") == "slc_o",
        "details of another node")
    detail = page.eval("document.getElementById('detail').textContent")
    check(
        all(x in detail for x in (takes, "selected blocks, by queries", "idx  i32 [65536, 4, 16]")),
        f"details: {detail}")
    check(page.eval("document.querySelector('tr.chosen').dataset.step") == "slc_o", "another row")
    page.click('[data-block="swa_o.re"]')
    check(
        page.eval("document.getElementById('detail-name').textContent") == "swa_o.re",
        "a block leads to another node")
    page.place("#roof")
    bare = page.eval("""[...document.querySelectorAll('#roof .dot')].filter((e) => {
        const r = e.getBoundingClientRect();
        return document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2) === e;
    }).map((e) => e.dataset.node)""")
    check(len(bare) >= 5, f"only {bare} can be pressed in the roofline")
    page.click(f'#roof [data-node="{bare[-1]}"]')
    check(
        page.eval("document.getElementById('detail-name').textContent") == bare[-1],
        "a point leads to another node")
    page.click("#steps [data-step='cmp_o.bwd'] td")
    check(
        page.eval("document.getElementById('detail-name').textContent") == "cmp_o.bwd",
        "a row leads to another node")
    page.click("#steps [data-sort=modelled] button")
    by_time = [n["name"] for n in sorted(steps, key=lambda n: -n["model_ms"])]
    check([t for _, t in values(page, "#steps td[data-column=node]")][0] == by_time[0],
          "sorting by time")
    page.click("#to-peak")
    check(now(page) == peak, "not at the peak")

    # ---- keys ----
    page.eval("document.querySelector('svg.memory').focus()")
    page.key("ArrowLeft")
    page.key("ArrowLeft")
    check(now(page) == peak - 2, "arrow keys do not move the cursor")
    page.key("Home")
    page.key("Enter")
    check(
        page.eval("document.getElementById('detail-name').textContent") == steps[0]["name"],
        "Enter does not select")
    check(
        steps[0]["name"]
        in page.eval("document.querySelector('svg.memory').getAttribute('aria-valuetext')"),
        "no words for the slider")
    page.eval(f"document.querySelector('{key_of(plan, 'cmp_o')}').focus()")
    page.key("ArrowRight")
    check(
        page.eval("document.activeElement.dataset.key") == key_of(plan, "topk")[11:-2],
        "the arrow goes elsewhere")
    page.key("Enter")
    check(
        page.eval("document.getElementById('detail-name').textContent") == "topk",
        "Enter does not select a node")
    page.eval("document.querySelector('#roof .dot[tabindex=\"0\"]').focus()")
    page.key("ArrowDown")
    page.key("Enter")
    reached = page.eval("document.activeElement.dataset.node")
    check(reached and page.eval("document.getElementById('detail-name').textContent") == reached,
          f"keys in the roofline select {reached}")
    page.eval("document.querySelector('#steps tbody tr[tabindex=\"0\"]').focus()")
    page.key("ArrowDown")
    page.key("Enter")
    check(
        page.eval("document.activeElement.dataset.step") == page.eval(
            "document.getElementById('detail-name').textContent"), "keys in the table")
    stops = page.eval("document.querySelectorAll('main [tabindex=\"0\"], main button').length")
    check(stops < 40, f"{stops} stops on the way through the page")
    nameless = page.eval(
        "[...document.querySelectorAll('[role=button], [role=slider], [role=group], "
        "button')].filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim())).length"
    )
    check(nameless == 0, f"{nameless} things to press have no name")
    check(
        page.eval("document.querySelectorAll('svg .item[tabindex=\"0\"]').length") == 1,
        "several tab stops in the graph")

    # ---- light and dark ----
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.eval(colour)
    page.click("#theme")
    dark = page.eval(colour)
    check(light != dark, "the button changes no colour")
    check(not page.complaints, f"{nsa_page.name}: {page.complaints}")
    for width in (1440, 700):
        dusk = opens(browser, nsa_page, dark=True, width=width)
        check(dusk.eval(colour) == dark, "the system's dark is not taken")
        check(not dusk.complaints, f"dark, {width}: {dusk.complaints}")
    opens(browser, nsa_page, width=700)

    # ---- measured beside modelled; the front's policies do what they say ----
    page = opens(browser, bench_page)
    for (v, _), n in zip(values(page, "#steps td[data-column=modelled]"), bench["nodes"]):
        check(
            abs(float(v) - n["model_ms"]) <= 1e-5 * n["model_ms"],
            f"bench: {n['name']}: {v} ms by the model, {n['model_ms']} printed")
    for (v, _), n in zip(values(page, "#steps td[data-column=measured]"), bench["nodes"]):
        check(
            abs(float(v) - n["ms"]) <= 1e-5 * n["ms"],
            f"bench: {n['name']}: {v} ms shown, {n['ms']} printed")
    check(
        abs(number(page, "forward") - bench["forward_ms"]) <= 1e-5 * bench["forward_ms"],
        "bench: forward")
    check(number(page, "peak") == bench["predicted_peak_bytes"], "bench: peak")
    points = page.eval(
        "[...document.querySelectorAll('#front [data-point]')].map((e) => [+e.dataset.bytes, "
        "+e.dataset.ms])"
    )
    check(
        sorted(points) == sorted([p["peak_bytes"], p["extra_ms"]] for p in front["points"]),
        f"the front is not what pareto prints: {points}")
    for point in (0, len(points) - 1):
        page.click(f'#front [data-point="{point}"]')
        policy = page.eval("document.getElementById('policy').textContent")
        (folder / "policy.json").write_text(policy)
        twin = json.loads(said("plan", nsa, *small, "--json", "--policy", folder / "policy.json"))
        check(
            twin["predicted_peak_bytes"] == points[point][0],
            f"{policy} takes {twin['predicted_peak_bytes']} bytes, {points[point][0]} were shown")
    check(not page.complaints, f"{bench_page.name}: {page.complaints}")

    # ---- twelve layers: folded, one unfolds ----
    page = opens(browser, deep_page)
    items = "document.querySelectorAll('#graph .item').length"
    few = page.eval(items)
    check(24 <= few < 40, f"{few} things to see in 12 folded layers")
    page.click('[data-key="layer3/f"]')
    check(few + 20 < page.eval(items) < few + 90,
          f"{page.eval(items)} things to see with one layer unfolded")
    page.click("#fold")
    page.click("#fold")
    check(page.eval(items) == few, "folding all comes back to as many")
    page.click("#fold")
    check(page.eval(items) > 600, "unfolding all shows them all")
    check(
        number(page, "peak") == deep["predicted_peak_bytes"]
        and len(values(page, "#steps td[data-column=node]")) == sum(n["step"]
                                                                    for n in deep["nodes"]),
        "the model's numbers")
    check(not page.complaints, f"{deep_page.name}: {page.complaints}")

    # ---- names cannot leave their place; forward alone; another page than the first ----
    page = opens(browser, odd_page)
    check(hostile["name"] in page.eval("document.getElementById('against-note').textContent"),
          "an odd name")
    check(
        page.eval("document.querySelectorAll('[data-number=backward]').length") == 0,
        "a backward of a forward plan")
    check(not page.complaints, f"{odd_page.name}: {page.complaints}")
    page = opens(browser, folder / "run.html")
    check(
        not page.complaints
        and page.eval("document.querySelectorAll('#measured .bar').length") == 32,
        "the page of run")

    # what would be a complaint is one
    (folder / "bad.html").write_text(
        "<script>console.error('x'); throw Error('y')</script><img "
        "src='http://example.invalid/a.png'>"
    )
    bad = browser.open((folder / "bad.html").as_uri())
    bad.wait("document.readyState === 'complete'")
    check(len(bad.complaints) >= 3, f"complaints are not seen: {bad.complaints}")

leave()
