// report/page/layout.js: places things on layers. A lane is a list of items, each on a layer
// (item.layer, an integer), and arrows between them. Arrows over several layers get a bend on each
// layer between, which takes part like a small item. Orders are sought by going through the layers
// to and fro and sorting each by where neighbours stand.

function layLane(items, arrows, gap) {
  const layers = new Map();
  const put = (x) => {
    if (!layers.has(x.layer)) layers.set(x.layer, []);
    layers.get(x.layer).push(x);
  };
  const all = items.map((item) => ({item, layer: item.layer, h: item.h, before: [], after: []}));
  const cell = new Map(all.map((x) => [x.item, x]));
  all.forEach(put);
  const routes = new Map();
  for (const a of arrows) {
    let from = cell.get(a.from), to = cell.get(a.to);
    if (!from || !to || to.layer === from.layer) continue;
    const turned = to.layer < from.layer;
    if (turned) [from, to] = [to, from];
    let last = from;
    const bends = [];
    for (const layer of [...layers.keys()].sort((x, y) => x - y)) {
      if (layer <= from.layer || layer >= to.layer) continue;
      const bend = {layer, h: 7, before: [last], after: []};
      last.after.push(bend);
      last = bend;
      bends.push(bend);
    }
    last.after.push(to);
    to.before.push(last);
    bends.forEach(put);
    routes.set(a, turned ? bends.reverse() : bends);
  }
  const order = [...layers.keys()].sort((x, y) => x - y).map((k) => layers.get(k));
  const mean = (x, side) =>
    x[side].length ? x[side].reduce((sum, y) => sum + y.place, 0) / x[side].length : x.place;
  const number = (layer) => layer.forEach((x, k) => {
    x.place = k - layer.length / 2;
  });
  order.forEach(number);
  for (let turn = 0; turn < 10; turn++) {
    const down = turn % 2 === 0;
    for (const layer of down ? order : [...order].reverse()) {
      layer.forEach((x) => {
        x.want = mean(x, down ? "before" : "after");
      });
      layer.sort((x, y) => x.want - y.want);
      number(layer);
    }
  }
  // Heights: each where its neighbours are, pushed apart in order.
  for (const layer of order) {
    let y = 0;
    for (const x of layer) {
      x.y = y + x.h / 2;
      y += x.h + gap;
    }
    layer.forEach((x) => {
      x.y -= y / 2;
    });
  }
  for (let turn = 0; turn < 24; turn++) {
    for (const layer of turn % 2 ? [...order].reverse() : order) {
      const want = layer.map((x) => {
        const near = [...x.before, ...x.after];
        return near.length ? near.reduce((sum, y) => sum + y.y, 0) / near.length : x.y;
      });
      layer.forEach((x, k) => {
        x.y = (x.y + want[k]) / 2;
      });
      for (let k = 1; k < layer.length; k++) {
        const least = layer[k - 1].y + (layer[k - 1].h + layer[k].h) / 2 + gap;
        if (layer[k].y < least) layer[k].y = least;
      }
      // what was pushed down may come up by half of it, together
      const pushed = layer.reduce((sum, x, k) => sum + (x.y - want[k]), 0) / layer.length;
      layer.forEach((x) => {
        x.y -= pushed / 2;
      });
    }
  }
  let low = Infinity, high = -Infinity;
  for (const layer of order)
    for (const x of layer) {
      low = Math.min(low, x.y - x.h / 2);
      high = Math.max(high, x.y + x.h / 2);
    }
  if (!items.length) low = high = 0;
  all.forEach((x) => {
    x.item.y = x.y - low;
  });
  return {
    height: high - low,
    bends: (a) => (routes.get(a) || []).map((b) => ({layer: b.layer, y: b.y - low})),
  };
}
