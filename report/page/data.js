// report/page/data.js: what the page knows: the plan as `plan --json` prints it, and what a reader
// of pictures wants of it: who hands what to whom, with views and lengths folded away.
"use strict";

const read = (id) => {
  const element = document.getElementById(id);
  return element ? JSON.parse(element.textContent) : null;
};
const plan = read("data-plan"), front = read("data-front");
const measured = read("data-measured"), against = read("data-against");

// ---- texts ----

const bytes = (x) => {
  const unit = ["B", "KiB", "MiB", "GiB", "TiB"];
  let k = 0;
  while (Math.abs(x) >= 1024 && k < unit.length - 1) {
    x /= 1024;
    k++;
  }
  return `${k === 0 ? x : x.toFixed(Math.abs(x) < 10 ? 2 : 1)} ${unit[k]}`;
};
const digits = (x) => x === 0 ? "0" :
  Math.abs(x) >= 1000         ? Math.round(x).toLocaleString("en") :
                                Number(x.toPrecision(4)).toString();
const ms = (x) => (x !== 0 && Math.abs(x) < 0.001 ? `${digits(x * 1000)} µs` : `${digits(x)} ms`);
const big = (x) => {
  const unit = ["", "k", "M", "G", "T", "P"];
  let k = 0;
  while (x >= 1000 && k < unit.length - 1) {
    x /= 1000;
    k++;
  }
  return digits(x) + (k ? " " + unit[k] : "");
};
const percent = (x) => `${x < 10 ? x.toFixed(1) : Math.round(x)} %`;

// ---- nodes and what flows between them ----

const MARKS = {
  kept: ["--saved", "stays in saved memory for backward"],
  again: ["--again", "given up, and computed again in backward"],
  offloaded: ["--off", "waits for backward in the host's memory"],
  "in place": ["--place", "writes over what it read last"],
  fused: ["--fused", "part of a gradient that was taken apart"],
};

// Of a plan: nodes with their place, what each reads (tensors), what it writes, time and limits.
function understand(p, stepMs) {
  const nodes =
    p.nodes.map((n, i) => ({...n, i, reads: [], writes: [], back: n.direction === "backward"}));
  const steps = nodes.filter((n) => n.step);
  steps.forEach((n, k) => {
    n.at = k;
    n.ms = stepMs && stepMs.some((x) => x > 0) ? stepMs[k] : n.model_ms;
    n.measured = stepMs ? stepMs[k] : null;
  });
  for (const e of p.edges) {
    if (e.from >= 0) nodes[e.from].writes.push(e);
    for (const to of e.to) nodes[to].reads.push(e);
  }
  // where no step stands at a node (a view), the next one does
  let next = steps.length - 1;
  for (let i = nodes.length - 1; i >= 0; i--) {
    if (nodes[i].step) next = nodes[i].at;
    nodes[i].from = next;
  }
  let last = 0;
  for (const n of nodes) {
    if (n.step) last = n.at;
    n.until = last;
  }
  return {plan: p, nodes, steps, turn: steps.filter((n) => !n.back).length};
}

// What limits a step at best, and how much of that it reaches.
function limits(m, n) {
  const r = m.plan.rates, rate = r.matrix_gflops[n.dtype] || r.matrix_gflops.f32;
  const part = [
    ["products", rate > 0 ? n.flops / rate / 1e6 : 0],
    ["exponentials", r.special_gops > 0 ? n.exps / r.special_gops / 1e6 : 0],
    ["bytes", r.bandwidth_gbs > 0 ? n.bytes / r.bandwidth_gbs / 1e6 : 0],
  ];
  part.sort((a, b) => b[1] - a[1]);
  return {
    by: part[0][1] > 0 ? part[0][0] : "its start",
    share: n.ms > 0 ? (100 * n.roofline_ms) / n.ms : 0
  };
}

// "plain: d_v 40": why it is not the tuned kernel.
const whyPlain = (n) => {
  const at = (n.kernels || "").match(/^plain\b:?\s*(.*)/);
  return at ? at[1] || "no tuned kernel for this shape" : "";
};

// Who makes the bytes of a tensor: steps, or the caller; through views.
function makers(m, e, seen = []) {
  if (e.from < 0) return e.role === "grad_out" ? [] : [{input: e}];
  const n = m.nodes[e.from];
  if (n.step) return [{node: n}];
  return n.reads.filter((x) => !x.lengths && !seen.includes(x)).flatMap((x) => makers(m, x, [
    ...seen, x
  ]));
}

const onlyLengths = (n) => n.writes.length > 0 && n.writes.every((e) => e.lengths);

// ---- memory ----

// Blocks with the steps they live through, and bytes alive at each step.
function remember(m) {
  const p = m.plan, n = m.steps.length;
  const held = new Float64Array(n), scratch = new Float64Array(n);
  const maker = new Map(p.edges.map((e) => [e.tensor, e]));
  const blocks = p.memory.blocks.map((b, k) => {
    const name = b.tensor || b.workspace_of, first = m.nodes[b.first];
    const kind = !b.tensor   ? "work" :
      b.region === "saved"   ? "saved" :
      first.kind === "clone" ? "again" :
      first.back             ? "gradient" :
                               "value";
    return {
      ...b,
      k,
      name,
      kind,
      from: first.from,
      until: m.nodes[b.last].until,
      edge: maker.get(b.tensor)
    };
  });
  // where one block takes over another's bytes they count once
  const given = new Map(blocks.filter((b) => b.in_place_of).map((b) => [b.in_place_of, b.from]));
  for (const b of blocks) {
    b.end = given.has(b.name) && given.get(b.name) === b.until ? b.until - 0.5 : b.until;
    b.start = b.in_place_of ? b.from + 0.5 : b.from;
    if (b.region === "host") continue;
    const row = b.region === "saved" ? held : scratch;
    for (let s = b.from + (b.in_place_of ? 1 : 0); s <= b.until; s++) row[s] += b.size;
  }
  let peak = 0;
  for (let s = 0; s < n; s++)
    if (scratch[s] > scratch[peak]) peak = s;
  return {blocks, held, scratch, peak, comm: p.comm_bytes || 0};
}
const aliveAt = (memory, s) =>
  memory.blocks.filter((b) => b.region !== "host" && b.from <= s && s <= b.until)
    .sort((a, b) => b.size - a.size || a.k - b.k);

const model = understand(plan, measured && measured.step_ms);
const memory = remember(model);
