// report/page/page.js: numbers, tables, what is selected; and everything put in its place.

const tile = (id, value, text, below) => h("div", {class: "tile"}, h("span", {class: "soft"}, id),
  h("b", {"data-number": id, "data-value": value}, text), h("span", {class: "soft"}, below));

function numbers() {
  const m = plan.memory, r = plan.recompute, backward = model.turn < model.steps.length;
  const proved = m.forward_optimal && m.backward_optimal;
  const again = plan.policy.recompute.length;
  const time = (back) => {
    const modelled = back ? plan.backward_model_ms : plan.forward_model_ms;
    const whole = measured && (back ? measured.backward_ms : measured.forward_ms);
    return whole > 0 ? tile(back ? "backward" : "forward", whole, ms(whole),
             `measured; the model says ${ms(modelled)}`) :
                       tile(back ? "backward" : "forward", modelled, ms(modelled), "by the model");
  };
  return [
    tile("peak", plan.predicted_peak_bytes, bytes(plan.predicted_peak_bytes),
      plan.gap_bytes ? `${bytes(plan.gap_bytes)} above the least possible` :
        proved ? "no packing takes less: proved" :
                 "the most alive at once"),
    tile("saved", plan.saved_bytes, bytes(plan.saved_bytes), "from forward to backward"),
    tile("scratch", plan.scratch_bytes, bytes(plan.scratch_bytes),
      `${bytes(m.no_reuse_bytes)} without reuse`),
    ...(
      plan.host_bytes ? [tile("host", plan.host_bytes, bytes(plan.host_bytes), "offloaded")] : []),
    time(false),
    ...(backward ? [time(true)] : []),
    ...(r && backward ? [tile("computed again", r.extra_ms, again ? ms(r.extra_ms) : "nothing",
          again ? `${again} of ${r.nodes.filter((n) => n.candidate).length} nodes${
            r.preset === "budget" ? r.optimal ? "; no choice is faster" :
              `; at most ${percent(100 * r.gap)} of the whole time too many` : ""}` :
                                                "backward reads what was kept")] :
                        []),
  ];
}

// ---- what is selected ----

const tensorRow = (e) => h("li", {},
  h("span", {title: `${e.tensor} ${e.dtype} [${e.shape.join(", ")}]`},
    `${e.tensor}  ${e.dtype} [${e.shape.join(", ")}]`),
  h("span", {class: "num"}, bytes(e.bytes)));
const pairs = (list) => h("dl", {}, list.filter(Boolean).map(([k, v, value,
  kind]) => [h("dt", {}, k), h("dd", {"data-value": value, class: kind}, v)]));

function showNode(n) {
  const limit = limits(model, n), why = whyPlain(n);
  $("detail").replaceChildren(
    h("div", {}, h("h3", {id: "detail-name"}, n.name),
      h("p", {class: "soft"},
        `${n.op}, ${n.back ? "backward" : "forward"}${
          n.kind === "clone" ? ", computes again" : ""}`),
      h("p", {},
        n.marks.map(
          (mark) => h("span",
            {class: "tag", style: `background:var(${MARKS[mark][0]})`, title: MARKS[mark][1]},
            mark)))),
    pairs([
      ["modelled", ms(n.model_ms), n.model_ms],
      measured && ["measured", ms(n.measured), n.measured],
      ["roofline", `${ms(n.roofline_ms)}, ${percent(limit.share)}`, n.roofline_ms],
      ["limited by", limit.by], n.kernels && ["kernel", n.kernels],
      why && ["not the tuned one", why, undefined, "why"], ["products", big(n.flops), n.flops],
      n.exps > 0 && ["exponentials", big(n.exps), n.exps],
      ["bytes moved", bytes(Math.round(n.bytes)), n.bytes],
      n.workspace_bytes > 0 && ["workspace", bytes(n.workspace_bytes), n.workspace_bytes],
      n.lane !== undefined && ["lane", n.lane],
      n.spec_node && n.spec_node !== n.name && ["node of the spec", n.spec_node]
    ]),
    h("div", {}, h("p", {class: "soft"}, "reads"),
      h("ul", {}, n.reads.filter((e) => !e.lengths).map(tensorRow))),
    h("div", {}, h("p", {class: "soft"}, "writes"), h("ul", {}, n.writes.map(tensorRow))));
}
function showPill(x) {
  const e = x.edge;
  $("detail").replaceChildren(
    h("div", {}, h("h3", {id: "detail-name"}, x.name), h("p", {class: "soft"}, {
      input: "input",
      output: "output",
      grad_in: "gradient of an output, given",
      grad_out: "gradient of an input",
      state: "state: what a step leaves for the next"
    }[x.what])),
    pairs([
      ["type", e.dtype], ["shape", `[${e.shape.join(", ")}]`], ["bytes", bytes(e.bytes), e.bytes]
    ]));
}

// One node, everywhere on the page.
function select(n) {
  showNode(n);
  lookAt(n.at, "select");
  for (const x of graph.items) x.element.classList.toggle("chosen", x.nodes.includes(n));
  for (const m of model.steps) {
    if (m.dot) m.dot.classList.toggle("on", m === n);
    if (m.row) m.row.classList.toggle("chosen", m === n);
  }
}

// ---- the table ----

function drawSteps() {
  const columns = [
    ["step", (n) => n.at, (n) => n.at, "n"],
    ["node", (n) => n.name, (n) => n.name],
    ["op", (n) => n.op, (n) => n.op],
    ["direction", (n) => n.direction, (n) => n.direction],
    ["modelled", (n) => n.model_ms, (n) => ms(n.model_ms), "n"],
    ...(measured ? [["measured", (n) => n.measured, (n) => ms(n.measured), "n"]] : []),
    ["of roofline", (n) => limits(model, n).share, (n) => percent(limits(model, n).share), "n"],
    ["limited by", (n) => limits(model, n).by, (n) => limits(model, n).by],
    ...(model.steps.some((n) => n.kernels) ?
        [["kernel", (n) => n.kernels || "", (n) => n.kernels || "", "kernel"]] :
        []),
    [
      "marks", (n) => n.marks.join(),
      (n) => n.marks.map(
        (mark) => h("span", {class: "tag", style: `background:var(${MARKS[mark][0]})`}, mark))
    ],
  ];
  const cell = (n, [key, value, text, kind]) => {
    const v = value(n), inside = text(n), why = key === "kernel" && whyPlain(n);
    return h("td", {
      class: `${kind || ""}${why ? " why" : ""}`,
      "data-column": key,
      "data-value": typeof v === "number" ? v : null
    }, Array.isArray(inside) ? inside : `${inside}`);
  };
  for (const n of model.steps)
    n.row = h("tr", {"data-step": n.name, tabindex: -1, ...press(() => select(n))},
      columns.map((column) => cell(n, column)));
  const body = h("tbody", {}, model.steps.map((n) => n.row));
  // A click sorts, another turns it over; numbers begin with the largest.
  let sorted = columns[0], rising = true;
  const sort = (column) => {
    rising = column === sorted ? !rising : column[3] !== "n";
    sorted = column;
    heads.forEach((th, k) => th.setAttribute("aria-sort",
      columns[k] !== sorted ? "none" : rising ? "ascending" : "descending"));
    const order = [...model.steps].sort((a, b) => {
      const x = sorted[1](a), y = sorted[1](b);
      return (x < y ? -1 : x > y ? 1 : a.at - b.at) * (rising ? 1 : -1);
    });
    body.append(...order.map((n) => n.row));
  };
  const heads = columns.map((column, k) => h("th",
    {class: column[3], scope: "col", "aria-sort": k ? "none" : "ascending", "data-sort": column[0]},
    h("button", {type: "button", onclick: () => sort(column)}, column[0])));
  $("steps").replaceChildren(h("thead", {}, h("tr", {}, heads)), body);
  rove("steps", "tbody tr");
}

// ---- two plans ----

function drawAgainst() {
  $("against-section").hidden = false;
  const change = (now, before, text, key) => {
    const d = now - before;
    return h("tr", {"data-compare": key}, h("td", {}, key),
      h("td", {class: "n", "data-value": now}, text(now)),
      h("td", {class: "n", "data-value": before}, text(before)),
      h("td", {class: `n ${
                 d < 0   ? "better" :
                   d > 0 ? "worse" :
                           ""}`,
        "data-value": d},
        d === 0 ?
          "the same" :
          `${d > 0 ? "+" : "−"}${text(Math.abs(d))}${
            before > 0 ? ` (${d > 0 ? "+" : "−"}${percent(Math.abs((100 * d) / before))})` : ""}`));
  };
  const key = [
    ["peak", "predicted_peak_bytes", bytes], ["saved", "saved_bytes", bytes],
    ["scratch", "scratch_bytes", bytes], ["forward, modelled", "forward_model_ms", ms],
    ["backward, modelled", "backward_model_ms", ms]
  ];
  const head = (...texts) => h(
    "thead", {}, h("tr", {}, texts.map((t, k) => h("th", {class: k ? "n" : "", scope: "col"}, t))));
  const totals = h("table", {}, head("", "this plan", "the other", "change"),
    h("tbody", {}, key.map(([name, k, text]) => change(plan[k], against[k], text, name))));
  const before = new Map(against.nodes.filter((n) => n.step).map((n) => [n.name, n]));
  const now = new Map(model.steps.map((n) => [n.name, n]));
  const gone = [...before.keys()].filter((k) => !now.has(k)),
        come = [...now.keys()].filter((k) => !before.has(k));
  const moved = model.steps.filter((n) => before.has(n.name)
      && (n.kernels !== before.get(n.name).kernels
        || Math.abs(n.model_ms - before.get(n.name).model_ms) > 1e-3 * n.model_ms));
  const list = (title, names) => names.length ?
    h("p", {}, h("b", {}, `${title} (${names.length}): `),
      names.slice(0, 24).join(", ") + (names.length > 24 ? " …" : "")) :
    null;
  const table =
    moved.length ? h("div", {class: "scroll tall"},
      h("table", {}, head("step", "this plan", "the other", "kernel"),
        h("tbody", {},
          moved
            .sort((a, b) => Math.abs(b.model_ms - before.get(b.name).model_ms)
                - Math.abs(a.model_ms - before.get(a.name).model_ms))
            .slice(0, 60)
            .map((n) => {
              const o = before.get(n.name);
              return h("tr", {onclick: () => select(n)}, h("td", {}, n.name),
                h("td", {class: "n"}, ms(n.model_ms)), h("td", {class: "n"}, ms(o.model_ms)),
                h("td", {class: "n"},
                  n.kernels === o.kernels ? n.kernels || "" :
                                            `${o.kernels || "—"} → ${n.kernels || "—"}`));
            })))) :
                   null;
  $("against-note").textContent = `with a plan of ${against.name} for ${against.device} (${
    capacity(against)}); its bytes alive are the dashed line above`;
  $("against").replaceChildren(
    ...[totals, list("Only in this plan", come), list("Only in the other", gone), table].filter(
      Boolean));
}
const capacity = (p) =>
  Object.entries(p.capacity).map(([k, v]) => `${k} = ${v.toLocaleString("en")}`).join(", ");

// ---- light and dark ----

function theme(which) {
  const dark =
    which === "dark" || (which === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  document.documentElement.dataset.wish = which;
  $("theme").textContent = {auto: "◐ auto", dark: "● dark", light: "○ light"}[which];
  $("theme").setAttribute(
    "aria-label", `colours: ${which === "auto" ? "as the system has them" : which}`);
}

function start() {
  theme("auto");
  matchMedia("(prefers-color-scheme: dark)")
    .addEventListener("change", () => theme(document.documentElement.dataset.wish));
  $("theme").addEventListener("click", () => {
    const round3 = ["auto", "dark", "light"];
    theme(round3[(round3.indexOf(document.documentElement.dataset.wish) + 1) % 3]);
  });
  document.title = `${plan.name}: a plan by regraph`;
  $("name").textContent = plan.name;
  $("what").textContent = [
    `${model.steps.length} steps, ${model.steps.length - model.turn} of them backward`,
    capacity(plan),
    plan.device === "cuda" ? plan.profile :
                             `CPU, ${plan.threads} thread${plan.threads === 1 ? "" : "s"}`,
    plan.head_groups > 1 ? `${plan.head_groups} head groups` : "",
    plan.cp ? `${plan.cp.ranks} ranks` : ""
  ].filter(Boolean).join(" · ");
  $("numbers").replaceChildren(...numbers());

  findCopies();
  drawGraph();
  $("graph-note").textContent =
    `Backward runs under forward, mirrored. Arrows are as thick as bytes, boxes as dark as ${
      measured ? "measured" : "modelled"} time; views and lengths are left out.`;
  const there = new Set(model.steps.flatMap((n) => n.marks));
  $("legend").replaceChildren(h("span", {}, h("i", {class: "ramp"}), "time"),
    ...Object.entries(MARKS).filter(([mark]) => there.has(mark)).map(([
      mark, [colour, text]
    ]) => h("span", {}, h("i", {style: `background:var(${colour})`}), `${mark}: ${text}`)));
  $("larger").addEventListener("click", () => resize(1.25 * resize(graph.scale)));
  $("smaller").addEventListener("click", () => resize(0.8 * resize(graph.scale)));
  $("fit").addEventListener("click", () => resize(0));
  $("fold").addEventListener("click", () => {
    graph.folded = graph.folded.size ? new Set() : new Set(graph.copies);
    drawGraph();
  });
  new ResizeObserver(() => resize(graph.scale)).observe($("graph"));

  drawn("memory", drawMemory);
  $("memory-note").textContent =
    "Move over it, or use the arrow keys: the cursor lists who is alive.";
  const kinds = new Set(memory.blocks.map((b) => b.kind));
  $("memory-legend").replaceChildren(...Object.entries(KINDS).filter(([k]) => kinds.has(k)).map(([
    k, text
  ]) => h("span", {}, h("i", {style: `background:var(--${k})`}), text)));
  $("to-peak").addEventListener("click", () => lookAt(memory.peak, "peak"));

  $("roof-note").textContent = `A point per step, as large as its ${
    measured ? "measured" : "modelled"} time; roofs are the profile's rates.${
    model.steps.some(whyPlain) ? " A ring marks what is not the tuned kernel." : ""}`;
  drawn("roof", drawRoof);
  if (front) {
    $("front-note").textContent = `${front.points.length} choices that no other beats${
      front.exact ?
        "" :
        `, within ${ms(front.gap_ms)}`}; a click gives the policy. The diamond is this plan.`;
    drawn("front", drawFront);
  } else {
    const most = plan.recompute ? plan.recompute.nodes.filter((n) => n.candidate).length : 0;
    $("front-note").textContent = "";
    $("front").replaceChildren(h("p", {class: "soft"},
      model.turn === model.steps.length
        ? "There is no backward, so there is nothing to choose."
        : `${most} nodes can be computed again; a page goes through all choices of small specs `
          + 'alone. "regraph pareto … --json > front.json" takes its time; "--front front.json" '
          + "shows it here."));
  }
  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("policy").textContent);
      $("copy").textContent = "copied";
    } catch {
      getSelection().selectAllChildren($("policy"));
      $("copy").textContent = "selected";
    }
  });
  showPolicy(plan.policy, "Policy of this plan");

  if (measured && measured.step_ms.some((x) => x > 0)) {
    const rows = [...model.steps].sort((a, b) => b.measured - a.measured).slice(0, 16).map((n) => ({
      name: n.name,
      values: [n.model_ms, n.measured]
    }));
    $("measured-note").textContent = `${measured.source}${
      measured.peak_bytes ? `; ${bytes(measured.peak_bytes)} asked of the allocator, ${
        bytes(plan.predicted_peak_bytes)} predicted` :
                            ""}. The ${rows.length} longest steps:`;
    $("measured")
      .replaceChildren(h("div", {class: "legend"},
                         h("span", {}, h("i", {style: "background:var(--saved)"}), "modelled"),
                         h("span", {}, h("i", {style: "background:var(--accent)"}), "measured")),
        bars(rows, ["--saved", "--accent"], ms));
  } else {
    $("measured-note").textContent = "Nothing was measured for this page: "
      + '"regraph bench … --html" writes one with times of this machine.';
  }
  if (against) drawAgainst();
  $("steps-note").textContent = "Sorted by what you click; a row shows the step above.";
  drawSteps();
  $("foot").textContent =
    `Times: ${plan.times}. Every number is one that "regraph plan --json" prints.`;
  lookAt(memory.peak, "start");
  select(model.steps[memory.peak]);
  document.documentElement.dataset.ready = "yes";
}
if (model.steps.length)
  start();
else
  document.body.append("This plan has no steps.");
