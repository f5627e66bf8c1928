// report/page/memory.js: bytes alive step by step, under it who lies where, and a cursor in both
// that lists who is alive. It begins at the peak.

const look = {
  step: memory.peak,
  draw: null
};
const KINDS = {
  saved: "saved for backward",
  value: "forward value",
  again: "computed again",
  gradient: "gradient",
  work: "workspace",
};

function drawMemory(width) {
  const n = model.steps.length, left = 74, right = 10, top = 18, high = 110, gap = 34, tall = 300;
  const inner = width - left - right, x = (step) => left + (step * inner) / n;
  const saved = plan.saved_bytes, total = saved + plan.scratch_bytes;
  const otherModel = against && understand(against, null),
        other = otherModel && remember(otherModel);
  const most = Math.max(total, other ? against.saved_bytes + against.scratch_bytes : 0, 1);
  const y1 = (v) => top + high * (1 - v / most), low = top + high + gap;
  const y2 = (v) => low + tall * (1 - v / Math.max(total, 1));
  const svg = s("svg", {
    width,
    height: low + tall + 26,
    role: "slider",
    tabindex: 0,
    "aria-label": "step at which memory is looked at",
    "aria-valuemin": 0,
    "aria-valuemax": n - 1,
    class: "memory",
  });
  svg.append(s("text", {x: left, y: 11, class: "soft"}, "bytes alive"));
  svg.append(yAxis(marks(most, 3, true), left, inner, y1, bytes));
  const stairs = (row, base, count, scale) => {
    let d = "";
    for (let k = 0; k < count; k++)
      d += `${k ? "L" : "M"}${round(scale(k))} ${round(y1(base + row[k]))}H${round(scale(k + 1))}`;
    return d;
  };
  const floor = `L${round(x(n))} ${round(y1(0))}H${left}Z`;
  const reserved = new Float64Array(n).fill(saved);
  svg.append(s("path", {class: "curve", d: stairs(memory.scratch, saved, n, x) + floor}));
  if (saved > 0) svg.append(s("path", {class: "curve held", d: stairs(reserved, 0, n, x) + floor}));
  if (other) {
    const count = otherModel.steps.length;
    svg.append(s("path", {
      class: "curve other",
      d: stairs(other.scratch, against.saved_bytes, count, (k) => left + (k * inner) / count)
    }));
  }
  svg.append(s("text", {x: left, y: low - 9, class: "soft"},
    saved > 0 ? "who lies where: saved memory below, scratch above" : "who lies where"));
  svg.append(yAxis(marks(total, 5, true), left, inner, y2, bytes));
  const blocks = s("g");
  for (const b of memory.blocks) {
    if (b.region === "host") continue;
    const at = b.offset + (b.region === "saved" ? 0 : saved);
    const r = s("rect", {
      class: "block",
      x: round(x(b.start)),
      width: round(Math.max(1, x(b.end + 1) - x(b.start))),
      y: round(y2(at + b.size)),
      height: round(Math.max(0.7, y2(at) - y2(at + b.size))),
      style: `fill:var(--${b.kind})`,
      "data-block": b.name,
    });
    explain(r, () => blockSays(b));
    r.addEventListener("click", () => {
      const m = model.nodes[b.first];
      if (m.step) select(m);
    });
    if (y2(at) - y2(at + b.size) < 3) r.style.stroke = "none";
    b.element = r;
    blocks.append(r);
    const w = x(b.end + 1) - x(b.start), tallness = y2(at) - y2(at + b.size);
    if (tallness > 13 && w > 7 * b.name.length + 6)
      blocks.append(s("text", {
        x: round(x(b.start) + w / 2),
        y: round(y2(at + b.size / 2) + 4),
        "text-anchor": "middle",
        style: "pointer-events:none"
      },
        b.name));
  }
  svg.append(blocks);
  if (model.turn < n) {
    svg.append(s("line", {
      class: "peak",
      x1: round(x(model.turn)),
      x2: round(x(model.turn)),
      y1: top,
      y2: low + tall
    }));
    svg.append(s("text",
      {class: "soft", x: round(x(model.turn) - 5), y: low + tall + 16, "text-anchor": "end"},
      "forward"));
    svg.append(
      s("text", {class: "soft", x: round(x(model.turn) + 5), y: low + tall + 16}, "backward"));
  }
  const p = memory.peak;
  svg.append(s("path", {
    d: `M${round(x(p + 0.5))} ${round(y1(saved + memory.scratch[p]) - 2)}l-5 -8h10z`,
    style: "fill:var(--mark)"
  }));
  const cursor = s("line", {class: "cursor", y1: top, y2: low + tall});
  svg.append(cursor);
  const stepAt = (e) => {
    const r = svg.getBoundingClientRect();
    return Math.max(0, Math.min(n - 1, Math.floor(((e.clientX - r.left - left) / inner) * n)));
  };
  svg.addEventListener("pointermove", (e) => lookAt(stepAt(e), "memory"));
  svg.addEventListener("click", (e) => {
    if (!e.target.dataset.block) select(model.steps[stepAt(e)]);
  });
  svg.addEventListener("keydown", (e) => {
    const to = {
      ArrowLeft: look.step - 1,
      ArrowRight: look.step + 1,
      Home: 0,
      End: n - 1,
      p: memory.peak,
      PageUp: look.step + 10,
      PageDown: look.step - 10
    }[e.key];
    if (e.key === "Enter") select(model.steps[look.step]);
    if (to === undefined) return;
    e.preventDefault();
    lookAt(Math.max(0, Math.min(n - 1, to)), "keys");
  });
  look.draw = () => {
    const at = round(x(look.step + 0.5)), node = model.steps[look.step];
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    svg.setAttribute("aria-valuenow", look.step);
    svg.setAttribute("aria-valuetext",
      `step ${look.step}, ${node.name}: ${bytes(saved + memory.scratch[look.step])} held`);
  };
  look.draw();
  return svg;
}

const blockSays = (b) => {
  const e = b.edge;
  return [
    `${b.name}${b.tensor ? "" : " (workspace)"}`, e ? `${e.dtype} [${e.shape.join(", ")}]` : "",
    `${bytes(b.size)} at ${b.region} + ${b.offset.toLocaleString("en")}`,
    `from ${model.nodes[b.first].name} until ${model.nodes[b.last].name}`,
    b.in_place_of ? `in place of ${b.in_place_of}` : ""
  ].filter(Boolean)
    .join("\n");
};

// The cursor goes there, the list says who is alive, the graph shows who runs.
function lookAt(step, from) {
  if (step === look.step && from !== "start") return;
  look.step = step;
  if (look.draw) look.draw();
  const node = model.steps[step], alive = aliveAt(memory, step);
  const scratch = memory.scratch[step], saved = plan.saved_bytes;
  markNode(node);
  const most = Math.max(1, ...alive.map((b) => b.size));
  const rows = alive.slice(0, 60).map((b) => {
    const row = h("li", {
      class: "row",
      tabindex: 0,
      role: "button",
      "data-alive": b.name,
      "data-value": b.size,
      style: `background:linear-gradient(90deg,var(--grid) ${
        Math.round((100 * b.size) / most)}%,transparent 0)`,
      onpointerenter: () => b.element && b.element.classList.add("on"),
      onpointerleave: () => b.element && b.element.classList.remove("on"),
      ...press(() => {
        const m = model.nodes[b.first];
        if (m.step) select(m);
      }),
    },
      h("i", {style: `background:var(--${b.kind})`}),
      h("span", {}, b.name + (b.tensor ? "" : " · workspace")),
      h("span", {class: "num"}, bytes(b.size)));
    explain(row, () => blockSays(b));
    return row;
  });
  $("alive").replaceChildren(h("h3", {}, `Alive at step ${step}: ${node.name}`),
    h("p", {class: "soft"},
      step === memory.peak ? "the peak" : node.back ? "backward" : "forward"),
    h("dl", {}, h("dt", {}, "saved, held throughout"), h("dd", {"data-value": saved}, bytes(saved)),
      h("dt", {}, "scratch alive"),
      h("dd", {"data-value": scratch, id: "alive-scratch"}, bytes(scratch)),
      memory.comm ? [h("dt", {}, "collectives"), h("dd", {}, bytes(memory.comm))] : null),
    h("ul", {}, rows),
    ...(alive.length > 60 ? [h("p", {class: "soft"}, `and ${alive.length - 60} smaller`)] : []));
  rove("alive", ".row");
}
