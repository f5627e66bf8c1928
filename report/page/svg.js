// report/page/svg.js: elements, axes, the tooltip.

const $ = (id) => document.getElementById(id);
function fill(element, attributes, inside) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on"))
      element.addEventListener(key.slice(2), value);
    else
      element.setAttribute(key, value === true ? "" : value);
  }
  for (const x of inside.flat(Infinity))
    if (x !== null && x !== undefined) element.append(x);
  return element;
}
const h = (tag, attributes, ...inside) => fill(document.createElement(tag), attributes, inside);
const s = (tag, attributes, ...inside) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, inside);
const round = (x) => Math.round(x * 100) / 100;

// ---- one tooltip for all ----

const tip = {
  show(text, x, y) {
    const box = $("tip");
    box.textContent = text;
    box.hidden = false;
    const r = box.getBoundingClientRect();
    box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - r.width - 6))}px`;
    box.style.top =
      `${y + 18 + r.height > innerHeight ? Math.max(4, y - r.height - 12) : y + 18}px`;
  },
  hide() { $("tip").hidden = true; },
};
addEventListener("keydown", (e) => {
  if (e.key === "Escape") tip.hide();
});
addEventListener("scroll", tip.hide, true);

// Hover and focus show the same text.
function explain(element, text) {
  element.addEventListener("pointermove", (e) => tip.show(text(), e.clientX, e.clientY));
  element.addEventListener("pointerleave", tip.hide);
  element.addEventListener("focus", () => {
    if (!element.matches(":focus-visible")) return;
    const r = element.getBoundingClientRect();
    tip.show(text(), r.right, r.top);
  });
  element.addEventListener("blur", tip.hide);
  return element;
}
const press = (action) => ({
  onclick: action,
  onkeydown: (e) => {
    if (e.key !== "Enter" && e.key !== " ") return;
    e.preventDefault();
    action(e);
  },
});

// Of many things to press one is a tab stop; arrow keys go on from it. Call it again when they are
// others.
const roving = {};
function rove(id, selector) {
  const all = () => [...$(id).querySelectorAll(selector)];
  const stop = (x) => all().forEach((y) => y.setAttribute("tabindex", x === y ? 0 : -1));
  if (!roving[id]) {
    roving[id] = true;
    $(id).addEventListener("focusin", (e) => {
      const x = e.target.closest(selector);
      if (x) stop(x);
    });
    $(id).addEventListener("keydown", (e) => {
      const way = {ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1}[e.key];
      const x = e.target.closest(selector);
      if (!way || !x) return;
      e.preventDefault();
      const list = all(), next = list[list.indexOf(x) + way];
      if (next) next.focus();
    });
  }
  if (all().length) stop(all()[0]);
}

// ---- axes ----

// Marks for bytes stand at powers of two, others at 1, 2, 5.
function marks(most, room, ofBytes) {
  if (!(most > 0)) return [0];
  let each = ofBytes ? 1 : 10 ** Math.floor(Math.log10(most / room));
  if (ofBytes)
    while (each * room < most) each *= 2;
  else
    each *= [1, 2, 5, 10].find((k) => each * k * room >= most) || 10;
  const at = [];
  for (let x = 0; x <= most * 1.0001; x += each) at.push(x);
  return at;
}
function yAxis(at, x, width, y, text) {
  return s("g", {class: "axis", "aria-hidden": "true"},
    at.map((v) => [s("line", {x1: x, x2: x + width, y1: round(y(v)), y2: round(y(v))}),
             s("text", {x: x - 6, y: round(y(v)) + 4, "text-anchor": "end"}, text(v)),
  ]));
}
function xAxis(at, y, height, x, text) {
  return s("g", {class: "axis", "aria-hidden": "true"},
    at.map((v) => [s("line", {x1: round(x(v)), x2: round(x(v)), y1: y - height, y2: y}),
             s("text", {x: round(x(v)), y: y + 15, "text-anchor": "middle"}, text(v)),
  ]));
}
// Redrawn when its room changes.
function drawn(id, draw) {
  let width = 0;
  const again = () => {
    const now = Math.floor($(id).clientWidth);
    if (!now || now === width) return;
    width = now;
    $(id).replaceChildren(draw(now));
    rove(id, ".dot");
  };
  again();
  new ResizeObserver(again).observe($(id));
}
