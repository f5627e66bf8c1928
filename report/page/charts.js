// report/page/charts.js: the roofline, the front, bars of modelled and measured times.

const KIND = (n) => (n.kind === "clone" ? "again" : n.back ? "gradient" : "value");

// ---- roofline: products a second over products a byte, both in powers of ten ----

function drawRoof(width) {
  const height = 330, left = 64, right = 26, top = 26, bottom = 38;
  const r = plan.rates, inner = width - left - right, tall = height - top - bottom;
  const steps = model.steps.filter((n) => n.ms > 0 && (n.flops > 0 || n.bytes > 0));
  const used = [...new Set(steps.map((n) => n.dtype))].filter((d) => r.matrix_gflops[d] > 0);
  const withWork = steps.filter((n) => n.flops > 0 && n.bytes > 0);
  const xs = withWork.map((n) => n.flops / n.bytes);
  const knees = used.map((d) => r.matrix_gflops[d] / r.bandwidth_gbs);
  const x0 = 10 ** Math.floor(Math.log10(Math.min(...xs, ...knees, 1)) - 1);
  const x1 = 10 ** Math.ceil(Math.log10(Math.max(...xs, ...knees, 10)));
  // what multiplies nothing stands at the left edge, by the bytes it moves
  const point = (n) => n.flops > 0 && n.bytes > 0 ? [n.flops / n.bytes, n.flops / n.ms / 1e6] :
                                                    [x0, (n.bytes / n.ms / 1e6) * x0];
  const rate = Math.max(...used.map((d) => r.matrix_gflops[d]), 1e-9);
  const ys = steps.map((n) => point(n)[1]);
  const y1 = 10 ** Math.ceil(Math.log10(Math.max(rate, ...ys)) + 0.01);
  const y0 = 10 ** Math.floor(Math.log10(Math.max(1e-12, Math.min(...ys, r.bandwidth_gbs * x0))));
  const X = (v) => left + (inner * Math.log10(v / x0)) / Math.log10(x1 / x0);
  const Y = (v) => top + tall * (1 - Math.log10(Math.max(v, y0) / y0) / Math.log10(y1 / y0));
  const powers = (a, b) => {
    const at = [];
    for (let v = a; v <= b * 1.01; v *= 10) at.push(v);
    return at.filter((v, k) => at.length < 9 || k % 2 === 0);
  };
  const svg =
    s("svg", {width, height, role: "group", "aria-label": "roofline: a point for each step"});
  svg.append(yAxis(powers(y0, y1), left, inner, Y, (v) => big(v * 1e9)));
  svg.append(xAxis(powers(x0, x1), top + tall, tall, X,
    (v) => (v < 1 ? `${v.toPrecision(1)}` : `${Math.round(v)}`)));
  svg.append(s("text", {class: "soft", x: left + inner, y: height - 4, "text-anchor": "end"},
    "products per byte →"));
  svg.append(s("text", {class: "soft", x: left, y: 11}, "products per second"));
  for (const d of used) {
    const knee = r.matrix_gflops[d] / r.bandwidth_gbs;
    svg.append(s("path", {
      class: "roofs",
      d: `M${round(X(x0))} ${round(Y(r.bandwidth_gbs * x0))}L${round(X(knee))} ${
        round(Y(r.matrix_gflops[d]))}H${left + inner}`
    }));
  }
  for (const rateNow of [...new Set(used.map((d) => r.matrix_gflops[d]))]) {
    const names = used.filter((d) => r.matrix_gflops[d] === rateNow).join(", ");
    svg.append(s("text",
      {class: "soft", x: left + inner - 4, y: round(Y(rateNow) - 5), "text-anchor": "end"},
      `${big(rateNow * 1e9)}/s (${names})`));
  }
  svg.append(
    s("text", {class: "soft", x: round(X(x0) + 8), y: round(Y(r.bandwidth_gbs * x0 * 4)) - 12},
      `${digits(r.bandwidth_gbs)} GB/s`));
  const most = Math.max(...steps.map((n) => n.ms), 1e-12);
  for (const n of [...steps].sort((a, b) => b.ms - a.ms)) {
    const [px, py] = point(n), why = whyPlain(n), limit = limits(model, n);
    const text = () => [n.name, n.op, n.kernels ? `kernel: ${n.kernels}` : "",
      why ? `not the tuned kernel: ${why}` : "",
      `${ms(n.ms)}${measured ? " measured" : " modelled"}, ${percent(limit.share)} of the roofline`,
      `limited by ${limit.by}`,
      n.flops > 0 ? `${big(n.flops)} products, ${digits(n.flops / n.bytes)} a byte` :
                    `multiplies nothing, moves ${bytes(n.bytes)}`]
                         .filter(Boolean)
                         .join("\n");
    const dot = s("circle", {
      class: `dot${why ? " plain" : ""}`,
      cx: round(X(px)),
      cy: round(Y(py)),
      r: round(3.5 + 8 * Math.sqrt(n.ms / most)),
      style: `fill:var(--${KIND(n)})`,
      tabindex: 0,
      role: "button",
      "aria-label": text().split("\n").join(", "),
      "data-node": n.name,
      ...press(() => select(n)),
    });
    n.dot = dot;
    svg.append(explain(dot, text));
  }
  return svg;
}

// ---- the front ----

const policyOf = (point) => {
  const policy = {regraph_policy: 1, recompute: point.recompute};
  if (plan.policy.split_heads) policy.split_heads = plan.policy.split_heads;
  if (plan.policy.nodes) policy.nodes = plan.policy.nodes;
  for (const name of point.offload || []) policy.nodes = {...policy.nodes, [name]: "offload"};
  return policy;
};

function showPolicy(policy, title) {
  $("policy-box").hidden = false;
  $("policy-title").textContent = title;
  $("policy").textContent = JSON.stringify(policy, null, 1)
                              .replace(/\n\s*/g, " ")
                              .replace(/\[ /g, "[")
                              .replace(/ \]/g, "]");
}

function drawFront(width) {
  const height = 330, left = 74, right = 22, top = 26, bottom = 38;
  const inner = width - left - right, tall = height - top - bottom;
  const extra = plan.recompute ? plan.recompute.extra_ms : 0;
  const here = {peak: plan.predicted_peak_bytes, ms: extra};
  const mostMs = Math.max(...front.points.map((p) => p.extra_ms), here.ms, 1e-9) * 1.04;
  const mostBytes = Math.max(...front.points.map((p) => p.peak_bytes), here.peak) * 1.03;
  const least = 0.92 * Math.min(...front.points.map((p) => p.peak_bytes), here.peak);
  const X = (v) => left + (inner * (v - least)) / (mostBytes - least),
        Y = (v) => top + tall * (1 - v / mostMs);
  const svg = s(
    "svg", {width, height, role: "group", "aria-label": "front of peak memory against extra time"});
  svg.append(yAxis(marks(mostMs, 5, false), left, inner, Y, ms));
  svg.append(
    xAxis(marks(mostBytes, 8, true).filter((v) => v >= least), top + tall, tall, X, bytes));
  svg.append(s("text", {class: "soft", x: left + inner, y: height - 4, "text-anchor": "end"},
    "peak memory →"));
  svg.append(s("text", {class: "soft", x: left, y: 11}, "extra time"));
  const points = [...front.points].sort((a, b) => b.peak_bytes - a.peak_bytes);
  svg.append(s("path", {
    class: "stairs",
    d: points
         .map((p, k) => (k ? `V${round(Y(p.extra_ms))}` : "M")
             + (k ? "" : `${left + inner} ${round(Y(p.extra_ms))}`) + `H${round(X(p.peak_bytes))}`)
         .join("")
      + `V${top}`
  }));
  svg.append(explain(s("rect", {
    class: "dot",
    x: round(X(here.peak) - 9),
    y: round(Y(here.ms) - 9),
    width: 18,
    height: 18,
    transform: `rotate(45 ${round(X(here.peak))} ${round(Y(here.ms))})`,
    style: "fill:var(--mark)",
    tabindex: 0,
    role: "button",
    "aria-label": `this plan, ${bytes(here.peak)}, ${ms(here.ms)} more`,
    ...press(() => showPolicy(plan.policy, "Policy of this plan"))
  }),
    () => `this plan\n${bytes(here.peak)}, ${ms(here.ms)} more`));
  points.forEach((p, k) => {
    const text = () => `${bytes(p.peak_bytes)}, ${ms(p.extra_ms)} more\n${
      p.recompute.length ? `computes again: ${p.recompute.slice(0, 8).join(", ")}${
        p.recompute.length > 8 ? ` and ${p.recompute.length - 8} more` : ""}` :
                                 "keeps everything"      }\nclick for the policy`;
    const dot = s("circle", {
      class: "dot",
      cx: round(X(p.peak_bytes)),
      cy: round(Y(p.extra_ms)),
      r: 6,
      style: "fill:var(--accent)",
      tabindex: 0,
      role: "button",
      "aria-label": text().split("\n").join(", "),
      "data-point": k,
      "data-bytes": p.peak_bytes,
      "data-ms": p.extra_ms,
      ...press(() => {
        svg.querySelectorAll(".dot").forEach((d) => d.classList.toggle("chosen", d === dot));
        showPolicy(policyOf(p), `Policy for ${bytes(p.peak_bytes)} and ${ms(p.extra_ms)} more`);
      }),
    });
    svg.append(explain(dot, text));
  });
  return svg;
}

// ---- pairs of bars ----

function bars(rows, colours, text) {
  const most = Math.max(1e-12, ...rows.flatMap((r) => r.values));
  return h("div", {class: "bars"},
    rows.map((r) => [h("span", {title: r.name}, r.name),
               h("div", {},
                 r.values.map((v, k) => h("div", {}, h("i", {
                   class: "bar",
                   style: `width:${Math.max(0.2, (82 * v) / most)}%;background:var(${colours[k]})`
                 }),
                                h("b", {"data-value": v}, text(v))))),
  ]));
}
