// report/page/graph.js: forward runs to the right, and under it, mirrored, backward runs back to
// the left: each node of it in the column of the forward node it stems from. Layers of a model
// that are numbered copies are folded into one box each until someone wants to see them.

const BOX = {
  w: 132,
  h: 58,
  pill: 24,
  gap: 24,
  step: 36,
  pills: 72
};
const MANY = 40; // forward steps from which copies begin folded

// "layer3" of "layer3_q_proj", "d.layer3_k.cast"
const copyOf = (name) => ((name || "").match(/(?:^|\.)([A-Za-z_]+?\d+)(?=[_.])/) || [])[1] || "";

const graph = {
  folded: new Set(),
  copies: new Set(),
  scale: 0,
  items: [],
  chosen: null
};

function findCopies() {
  const count = new Map();
  for (const n of model.steps)
    if (!n.back) count.set(copyOf(n.spec_node), (count.get(copyOf(n.spec_node)) || 0) + 1);
  count.delete("");
  const stems = new Map();
  for (const [name, k] of count) {
    const stem = name.replace(/\d+$/, "");
    stems.set(stem, (stems.get(stem) || 0) + (k >= 3 ? 1 : 0));
  }
  for (const name of count.keys())
    if (stems.get(name.replace(/\d+$/, "")) >= 2) graph.copies.add(name);
  if (model.turn > MANY) graph.folded = new Set(graph.copies);
}
const copyOfNode = (n) => {
  const name = copyOf(n.spec_node || n.name);
  return graph.copies.has(name) ? name : "";
};

// Items and arrows as they are now folded.
function collect() {
  const items = new Map(), arrows = new Map();
  const item = (key, make) => {
    if (!items.has(key)) items.set(key, {key, nodes: [], marks: new Set(), ms: 0, ...make});
    return items.get(key);
  };
  const ofNode = (n) => {
    const copy = copyOfNode(n), lane = n.back ? "b" : "f";
    const folded = copy && graph.folded.has(copy);
    return folded ?
      item(`${copy}/${lane}`, {kind: "copy", lane, name: copy, copy, h: BOX.h, order: n.i}) :
      item(`n${n.i}`, {kind: n.kind, lane, name: n.name, copy, h: BOX.h, order: n.i});
  };
  for (const n of model.steps) {
    if (onlyLengths(n)) continue;
    const x = ofNode(n);
    x.nodes.push(n);
    x.ms += n.ms;
    n.marks.forEach((mark) => x.marks.add(mark));
    x.h = BOX.h + (x.marks.size > 1 ? 12 : 0); // many chips need a line of their own
    n.item = x;
  }
  const pill = (e, lane, what) => item(`${what}:${e.bound_as}`, {
    kind: "pill",
    lane,
    what,
    name: what.startsWith("grad") ? `d ${e.bound_as}` : e.bound_as,
    edge: e,
    h: BOX.pill,
    order: what === "output" || what === "grad_out" ? 1e9 : -1
  });
  const connect = (from, to, e) => {
    if (!from || !to || from === to) return;
    const key = `${from.key}>${to.key}`;
    if (!arrows.has(key)) arrows.set(key, {from, to, bytes: 0, tensors: []});
    const a = arrows.get(key);
    if (a.tensors.includes(e)) return;
    a.tensors.push(e);
    a.bytes += e.bytes;
  };
  // an input of a folded copy is inside it
  const readers = new Map();
  for (const n of model.steps)
    for (const e of n.item ? n.reads : [])
      for (const m of makers(model, e))
        if (m.input) {
          if (!readers.has(m.input)) readers.set(m.input, new Set());
          readers.get(m.input).add(n.item.kind === "copy" ? n.item.copy : n.item.key);
        }
  const inside = (e) => {
    const who = [...(readers.get(e) || [])];
    return who.length === 1 && graph.folded.has(who[0]) && copyOf(e.bound_as) === who[0];
  };
  for (const n of model.steps) {
    if (!n.item) continue;
    for (const e of n.reads) {
      if (e.lengths) continue;
      for (const m of makers(model, e)) {
        if (m.node)
          connect(m.node.item, n.item, e);
        else if (!inside(m.input))
          connect(pill(m.input, m.input.role === "grad_in" ? "b" : "f", m.input.role), n.item, e);
      }
    }
  }
  for (const e of plan.edges) {
    if (e.lengths || e.from < 0 || (e.role !== "output" && e.role !== "grad_out")) continue;
    for (const m of makers(model, e)) {
      if (!m.node || !m.node.item) continue;
      if (m.node.item.kind === "copy" && e.role === "grad_out" && inside(inputNamed(e.bound_as)))
        continue;
      connect(m.node.item, pill(e, e.role === "output" ? "f" : "b", e.role), e);
    }
  }
  return {
    items: [...items.values()].sort((x, y) => x.order - y.order),
    arrows: [...arrows.values()]
  };
}
const inputNamed = (name) => plan.edges.find((e) => e.role === "input" && e.bound_as === name);

// Columns of forward items, then of backward ones after them.
function place(g) {
  const into = new Map(g.items.map((x) => [x, []])), out = new Map(g.items.map((x) => [x, []]));
  for (const a of g.arrows) {
    into.get(a.to).push(a.from);
    out.get(a.from).push(a.to);
  }
  const forward = g.items.filter((x) => x.lane === "f"),
        boxes = forward.filter((x) => x.kind !== "pill");
  for (const x of boxes)
    x.layer = 1
      + Math.max(0,
        ...into.get(x)
          .filter((y) => y.lane === "f" && y.order < x.order && y.kind !== "pill")
          .map((y) => y.layer));
  for (const x of [...boxes].reverse()) {
    const next = out.get(x).filter((y) => y.lane === "f" && y.kind !== "pill" && y.order > x.order);
    if (next.length) x.layer = Math.max(x.layer, Math.min(...next.map((y) => y.layer)) - 1);
  }
  const end = 1 + Math.max(0, ...boxes.map((x) => x.layer));
  for (const x of forward.filter((y) => y.kind === "pill")) {
    const near = out.get(x).filter((y) => y.lane === "f").map((y) => y.layer);
    x.layer = x.what === "output" ? end : near.length ? Math.min(...near) - 1 : 0;
  }
  // Backward: under the forward node of the same origin.
  const column = new Map();
  for (const x of boxes)
    for (const n of x.nodes) {
      column.set(`${n.spec_node}/${n.group}`, x.layer);
      if (!column.has(n.spec_node)) column.set(n.spec_node, x.layer);
    }
  const copies = new Map(boxes.filter((x) => x.kind === "copy").map((x) => [x.copy, x.layer]));
  const backward = g.items.filter((x) => x.lane === "b");
  for (const x of backward) {
    const n = x.nodes[0],
          mirror = x.kind === "copy" ? copies.get(x.copy) :
      n && n.spec_node ? column.get(`${n.spec_node}/${n.group}`) ?? column.get(n.spec_node) :
                         undefined;
    const before =
      into.get(x).filter((y) => y.lane === "b" && y.column !== undefined).map((y) => y.column);
    const input =
      x.what === "grad_out" && g.items.find((y) => y.key === `input:${x.edge.bound_as}`);
    x.column = x.what === "grad_in" ? end :
      input                         ? input.layer :
      mirror !== undefined          ? mirror :
      before.length                 ? Math.max(0, Math.min(...before) - 1) :
                                      end;
    if (x.what === "grad_out" && before.length && x.column >= Math.min(...before))
      x.column = Math.min(...before) - 1;
  }
  // inside a column each stands to the left of what it reads of the same origin
  const origin = (y) => (y.nodes[0] && y.nodes[0].spec_node) || y.copy || "";
  const subs = new Map();
  for (const x of backward) {
    const here = into.get(x).filter((y) => y.lane === "b" && y.column === x.column
        && y.order < x.order && origin(y) === origin(x));
    x.sub = Math.min(3, Math.max(-1, ...here.map((y) => y.sub)) + 1);
    subs.set(x.column, Math.max(subs.get(x.column) || 0, x.sub + 1));
  }
  const low = Math.min(...g.items.map((x) => (x.lane === "f" ? x.layer : x.column)));
  const wide = new Set([
    ...boxes.map((x) => x.layer), ...backward.filter((x) => x.kind !== "pill").map((x) => x.column)
  ]);
  const left = new Map();
  let x = 12, layer = 0;
  const centre = new Map();
  for (let c = low; c <= end; c++) {
    const n = Math.max(1, subs.get(c) || 1), w = wide.has(c) ? BOX.w : BOX.pills;
    for (let k = n - 1; k >= 0; k--) {
      left.set(`${c}/${k}`, {x: x + w / 2, layer: layer++});
      x += w + (k ? BOX.step * 0.6 : BOX.step);
    }
    centre.set(c, (left.get(`${c}/${n - 1}`).x + left.get(`${c}/0`).x) / 2);
  }
  for (const y of forward) y.x = centre.get(y.layer);
  const at = new Map();
  for (const y of backward) {
    const slot = left.get(`${y.column}/${y.sub}`);
    y.x = slot.x;
    y.layer = -slot.layer;
    at.set(y.layer, y.x);
  }
  const top =
    layLane(forward, g.arrows.filter((a) => a.from.lane === "f" && a.to.lane === "f"), BOX.gap);
  const low2 =
    layLane(backward, g.arrows.filter((a) => a.from.lane === "b" && a.to.lane === "b"), BOX.gap);
  const turn = top.height + 34 + 64;
  forward.forEach((y) => {
    y.y += 34;
  });
  backward.forEach((y) => {
    y.y += turn;
  });
  for (const a of g.arrows) {
    if (a.from.lane !== a.to.lane)
      a.bends = [];
    else if (a.from.lane === "f")
      a.bends = top.bends(a).map((b) => ({x: centre.get(b.layer), y: b.y + 34}));
    else
      a.bends = low2.bends(a).map((b) => ({x: at.get(b.layer), y: b.y + turn}));
  }
  g.width = x + 12 - BOX.step;
  g.turn = backward.length ? turn - 40 : 0;
  g.height = backward.length ? turn + low2.height + 16 : top.height + 50;
  return g;
}

const half = (x) => (x.kind === "pill" ? pillWidth(x) : BOX.w) / 2;
const pillWidth = (x) => Math.min(110, Math.max(34, 14 + 7 * x.name.length));

function route(a) {
  if (a.from.lane !== a.to.lane) {  // what backward reads of forward: down
    const x1 = a.from.x, y1 = a.from.y + a.from.h / 2, x2 = a.to.x, y2 = a.to.y - a.to.h / 2;
    const bend = Math.max(26, (y2 - y1) / 2);
    return `M${round(x1)} ${round(y1)}C${round(x1)} ${round(y1 + bend)} ${round(x2)} ${
      round(y2 - bend)} ${round(x2)} ${round(y2)}`;
  }
  if (a.from.x === a.to.x) {  // in one column: round the left side
    const x = a.from.x - half(a.from), x2 = a.to.x - half(a.to), out = Math.min(x, x2) - 30;
    return `M${round(x)} ${round(a.from.y)}C${round(out)} ${round(a.from.y)} ${round(out)} ${
      round(a.to.y)} ${round(x2)} ${round(a.to.y)}`;
  }
  const way = a.to.x > a.from.x ? 1 : -1;
  const points = [
    {x: a.from.x + way * half(a.from), y: a.from.y}, ...a.bends,
    {x: a.to.x - way * half(a.to), y: a.to.y}
  ];
  let d = `M${round(points[0].x)} ${round(points[0].y)}`;
  for (let k = 1; k < points.length; k++) {
    const p = points[k - 1], q = points[k], dx = way * (q.x - p.x) > 8 ? (q.x - p.x) / 2 : way * 34;
    d += `C${round(p.x + dx)} ${round(p.y)} ${round(q.x - dx)} ${round(q.y)} ${round(q.x)} ${
      round(q.y)}`;
  }
  return d;
}

// ---- drawing ----

const cut = (text, n) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);
const says = (x) => x.kind === "pill" ?
  `${x.what.replace("_", " ")} ${x.edge.bound_as}, ${x.edge.dtype} [${x.edge.shape.join(", ")}], ${
    bytes(x.edge.bytes)}` :
  `${x.name}, ${x.kind === "copy" ? `${x.nodes.length} steps, folded` : x.nodes[0].op}, ${
    x.lane === "f" ? "forward" :
                     "backward"}, ${ms(x.ms)}${x.marks.size ? `, ${[...x.marks].join(", ")}` : ""}`;

function drawItem(x, most) {
  const w = 2 * half(x), heat = x.kind === "pill" ? 0 : Math.sqrt(x.ms / most);
  const g = s("g", {
    class: `item ${x.kind}${heat > 0.6 ? " hot" : ""}`,
    transform: `translate(${round(x.x - w / 2)} ${round(x.y - x.h / 2)})`,
    style: `--heat:${round(heat)}`,
    tabindex: -1,
    role: "button",
    "aria-label": says(x),
    "data-key": x.key,
    ...press(() => choose(x)),
  });
  g.append(s("rect", {class: "box", width: round(w), height: x.h, rx: x.kind === "pill" ? 12 : 7}));
  if (x.kind === "pill") {
    g.append(s("text", {x: round(w / 2), y: 16, "text-anchor": "middle"}, cut(x.name, 14)));
    return g;
  }
  const folded = x.kind === "copy";
  if (folded)
    g.append(s("rect",
      {class: "box", x: 4, y: -4, width: round(w), height: x.h, rx: 7, style: "opacity:.45"}));
  g.append(s("text", {class: "name", x: 9, y: 18}, cut(x.name, 18)));
  g.append(s("text", {class: "sub", x: 9, y: 32},
    cut(folded ? `${x.nodes.length} steps` : x.nodes[0].op, 20)));
  g.append(s("text", {class: "time", x: 9, y: 48}, ms(x.ms)));
  let right = w - 6; // chips sit on the lower edge
  for (const mark of Object.keys(MARKS).reverse()) {
    if (!x.marks.has(mark)) continue;
    const room = 10 + 5.4 * mark.length;
    right -= room;
    g.append(s("g", {class: "chip", transform: `translate(${round(right)} ${x.h - 8})`},
      s("rect", {width: round(room), height: 15, rx: 5, style: `fill:var(${MARKS[mark][0]})`}),
      s("text", {x: round(room / 2), y: 11, "text-anchor": "middle"}, mark)));
    right -= 3;
  }
  return g;
}

function drawGraph() {
  model.nodes.forEach((n) => {
    n.item = null;
  });
  const g = place(collect());
  graph.items = g.items;
  const mostMs = Math.max(1e-12, ...g.items.map((x) => x.ms));
  const mostBytes = Math.max(1, ...g.arrows.map((a) => a.bytes));
  const svg = s("svg", {
    viewBox: `0 0 ${round(g.width)} ${round(g.height)}`,
    role: "group",
    "aria-label": "the graph; arrow keys go from node to node, Enter selects",
  });
  svg.append(s("text", {class: "lane", x: 12, y: 16}, "forward →"));
  if (g.turn) {
    svg.append(
      s("line", {class: "peak", x1: 0, x2: round(g.width), y1: round(g.turn), y2: round(g.turn)}));
    svg.append(s("text",
      {class: "lane", x: round(g.width - 12), y: round(g.turn + 18), "text-anchor": "end"},
      "← backward"));
  }
  for (const a of g.arrows) {
    const across = a.from.lane !== a.to.lane;
    const kind = across   ? (a.from.kind === "pill" ? "reads" : "kept") :
      a.from.lane === "b" ? "back" :
                            "";
    a.path = s("path", {
      class: `edge ${kind}`,
      d: route(a),
      "stroke-width": round(1 + 6 * Math.sqrt(a.bytes / mostBytes))
    });
    explain(a.path,
      () => `${a.from.name} → ${a.to.name}\n${
        a.tensors.slice(0, 6)
          .map((e) => `${e.tensor}  ${e.dtype} [${e.shape.join(", ")}]  ${bytes(e.bytes)}`)
          .join("\n")}${a.tensors.length > 6 ? `\nand ${a.tensors.length - 6} more` : ""}`);
    svg.append(a.path);
  }
  for (const x of g.items) {
    x.element = drawItem(x, mostMs);
    explain(x.element,
      () =>
        says(x).split(", ").join("\n").replace(/\[([^\]]*)\]/g, (all) => all.replace(/\n/g, ", ")));
    const light = (on) => {
      svg.classList.toggle("focus", on);
      x.element.classList.toggle("on", on);
      for (const a of g.arrows) {
        if (a.from !== x && a.to !== x) continue;
        a.path.classList.toggle("on", on);
        a.from.element.classList.toggle("on", on);
        a.to.element.classList.toggle("on", on);
      }
      if (on && x.nodes.length === 1) lookAt(x.nodes[0].at, "graph");
    };
    x.element.addEventListener("pointerenter", () => light(true));
    x.element.addEventListener("pointerleave", () => light(false));
    x.element.addEventListener("focus", () => { // Tab comes back to where one was
      g.items.forEach((y) => y.element.setAttribute("tabindex", y === x ? 0 : -1));
    });
    svg.append(x.element);
  }
  if (g.items.length) g.items[0].element.setAttribute("tabindex", 0);
  svg.addEventListener("keydown", walk);
  graph.arrows = g.arrows;
  graph.size = [g.width, g.height];
  $("graph").replaceChildren(svg);
  resize(graph.scale);
  $("fold").hidden = graph.copies.size === 0;
  $("fold").textContent = graph.folded.size ? "unfold all" : "fold layers";
}

// To the nearest item in the arrow's direction.
function walk(e) {
  const way = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[e.key];
  const here = graph.items.find((x) => x.element === document.activeElement);
  if (!way || !here) return;
  e.preventDefault();
  let best = null, least = Infinity;
  for (const x of graph.items) {
    const along = (x.x - here.x) * way[0] + (x.y - here.y) * way[1];
    const aside = Math.abs((x.x - here.x) * way[1]) + Math.abs((x.y - here.y) * way[0]);
    if (x !== here && along > 4 && along + 2.5 * aside < least) {
      best = x;
      least = along + 2.5 * aside;
    }
  }
  if (!best) return;
  best.element.focus();
  if (best.nodes.length === 1) lookAt(best.nodes[0].at, "graph");
}

function resize(scale) {
  const [w, height] = graph.size, room = $("graph").clientWidth;
  graph.scale = scale;
  const k = scale || Math.max(0.72, Math.min(1, room / w));
  const svg = $("graph").firstElementChild;
  svg.setAttribute("width", round(w * k));
  svg.setAttribute("height", round(height * k));
  return k;
}

function choose(x) {
  if (x.kind === "copy") {
    graph.folded.delete(x.copy);
    drawGraph();
    const first = graph.items.find((y) => y.copy === x.copy && y.lane === x.lane);
    if (first) {
      first.element.focus();
      first.element.scrollIntoView({block: "nearest", inline: "center"});
    }
    return;
  }
  if (x.kind === "pill")
    showPill(x);
  else
    select(x.nodes[0]);
  graph.items.forEach((y) => y.element.classList.toggle("chosen", y === x));
}
function markNode(n) {
  for (const x of graph.items) x.element.classList.toggle("at", !!n && x.nodes.includes(n));
}
