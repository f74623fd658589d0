"use strict";

// A page that has failed says so, to whoever looks at it and to tests.
window.addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });

const data = JSON.parse(document.getElementById("data").textContent);
const MEANINGS = {F: "forward", B: "input gradient", W: "weight gradients", BW: "both gradients at once",
                  C: "forward again", O: "copy to the host", R: "copy back"};
// Pixels around the lanes.
const LEFT = 92, RIGHT = 112, TOP = 4, AXIS = 26;
// Of a rank's boxes and of its memory below, as many ranks as there are; and of a row of copies between them.
const FEW = {lane: 26, curve: 24, pitch: 66}, MANY = {lane: 18, curve: 15, pitch: 42}, BETWEEN = 3, COPY = 9;

const byId = (id) => document.getElementById(id);
const state = {batch: null, from: 0, to: 1, width: 0, panels: [], followed: null, scheduled: false};

function svg(name, attributes, parent, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function html(name, parent, text, className) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

// -- numbers in words

function seconds(value, digits = 4) {
  const size = Math.abs(value);
  const [factor, unit] = size >= 1 || size === 0 ? [1, "s"] : size >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  return `${Number((value * factor).toPrecision(digits))} ${unit}`;
}

function amount(value, unit) {
  if (unit !== "bytes") return `${Number(value.toPrecision(4))}`;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) { value /= 1024; power += 1; }
  return `${Number(value.toPrecision(4))} ${units[power]}`;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function nameOf([kind, stage, microBatch, piece, pieces]) {
  return `${kind}${stage}.${microBatch}${pieces > 1 ? `[${piece}/${pieces}]` : ""}`;
}

// -- one timeline

class Panel {
  constructor(id, batch) {
    this.id = id;
    this.batch = batch;
    this.timeline = batch[id];
    this.root = byId(id);
    this.root.replaceChildren();
    const size = batch.chunks.length > 5 ? MANY : FEW;
    const rows = Math.max(...["predicted", "measured"].map((which) => batch[which].ranks[0].copies.length));
    this.size = {...size, copies: rows * (COPY + 1), pitch: size.pitch + rows * (COPY + 1)};
    this.height = TOP + this.size.pitch * batch.chunks.length + AXIS;
    this.root.setAttribute("height", this.height);
    this.defs();
    this.lanes = svg("g", {"clip-path": `url(#clip-${id})`}, this.root);
    this.grid = svg("g", {}, this.lanes);
    this.axis = svg("g", {}, this.root);
    this.boxes = [];
    this.curves = [];
    this.most = Math.max(...["predicted", "measured"].flatMap((which) => batch[which].ranks.map(peakOf)), 1e-300);
    batch.chunks.forEach((stages, rank) => this.rank(stages, rank));
    this.cursor = svg("line", {class: "cursor", y1: 0, y2: this.height - AXIS, visibility: "hidden"}, this.lanes);
  }

  defs() {
    const defs = svg("defs", {}, this.root);
    this.clip = svg("rect", {x: LEFT, y: 0, height: this.height}, svg("clipPath", {id: `clip-${this.id}`}, defs));
    const hatch = svg("pattern", {id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse",
                                  patternTransform: "rotate(45)"}, defs);
    svg("rect", {width: 6, height: 6, fill: "#f7f7f5"}, hatch);
    svg("rect", {width: 1, height: 6, fill: "#d4d4cf"}, hatch);
  }

  rank(stages, rank) {
    const {lane, curve, copies, pitch} = this.size, row = this.timeline.ranks[rank];
    const top = TOP + rank * pitch, below = top + lane + copies + BETWEEN, middle = top + lane / 2;
    svg("text", {class: "rank", x: 0, y: middle + 4}, this.root, `rank ${rank}`);
    svg("text", {class: "soft", x: 0, y: below + curve / 2 + 4}, this.root,
        `stage${stages.length > 1 ? "s" : ""} ${stages.join(", ")}`);
    svg("text", {class: "soft beside", y: middle + 4}, this.root, `bubble ${percent(row.bubble)}`);
    svg("text", {class: "peak beside", y: below + curve / 2 + 4}, this.root,
        `peak ${amount(peakOf(row), this.batch.unit)}`);
    let last = 0;
    for (const pass of row.passes) {
      this.gap(last, pass[5], top);
      this.pass(pass, rank, stages, top, lane);
      last = pass[6];
    }
    row.copies.forEach((spans, direction) => {
      for (const copy of spans) this.pass(copy, rank, stages, top + lane + 1 + direction * (COPY + 1), COPY);
    });
    this.gap(last, this.timeline.makespan, top);
    for (const [what, start, end] of this.timeline.others[rank]) {
      const rect = svg("rect", {class: "other", y: top, height: this.size.lane}, this.lanes);
      rect.tip = `${what}\n${seconds(end - start)}, from ${seconds(start)}`;
      this.box(rect, start, end);
    }
    this.memory(row, below);
  }

  gap(start, end, top) {
    if (end <= start) return;
    const rect = svg("rect", {class: "gap", y: top, height: this.size.lane}, this.lanes);
    rect.tip = `bubble\n${seconds(end - start)}, from ${seconds(start)} to ${seconds(end)}`;
    this.box(rect, start, end);
  }

  pass(pass, rank, stages, top, height) {
    const [kind, stage, microBatch] = pass, [start, end] = pass.slice(5);
    const look = `${kind} c${Math.min(stages.indexOf(stage), 1)}`;
    const rect = svg("rect", {class: `pass ${look}`, y: top, height, rx: 1.5, "data-pass": nameOf(pass),
                              "data-rank": rank}, this.lanes);
    Object.assign(rect, {pass, rank, tip: `${nameOf(pass)}  ${MEANINGS[kind]}\n${seconds(end - start)}, from ` +
                                          `${seconds(start)} to ${seconds(end)}`});
    this.box(rect, start, end, height < this.size.lane ? undefined :
             {text: `${microBatch}`, look, y: top + height / 2 + 0.5});
  }

  box(rect, start, end, label) {
    this.boxes.push({rect, start, end, label, number: null});
  }

  memory(row, top) {
    const area = svg("path", {class: "area"}, this.lanes), line = svg("path", {class: "curve"}, this.lanes);
    const bottom = top + this.size.curve;
    svg("line", {class: "floor", x1: LEFT, x2: LEFT, y1: bottom, y2: bottom, "data-floor": ""}, this.root);
    this.curves.push({area, line, row, bottom});
  }

  draw() {
    const {from, to, width} = state, inner = width - LEFT - RIGHT, scale = inner / (to - from);
    const x = (time) => LEFT + (time - from) * scale;
    this.root.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.clip.setAttribute("width", inner);
    for (const text of this.root.querySelectorAll(".beside")) text.setAttribute("x", LEFT + inner + 12);
    for (const line of this.root.querySelectorAll("[data-floor]")) line.setAttribute("x2", LEFT + inner);
    for (const box of this.boxes) this.place(box, x, scale);
    for (const curve of this.curves) this.trace(curve, x);
    this.ticks(x, inner);
  }

  place(box, x, scale) {
    const left = x(box.start), wide = (box.end - box.start) * scale;
    box.rect.setAttribute("x", left.toFixed(2));
    box.rect.setAttribute("width", Math.max(wide, 0.4).toFixed(2));
    // A white frame around boxes of a pixel would leave nothing of them.
    if (box.rect.pass) box.rect.style.strokeWidth = wide < 4 ? "0" : "";
    const seen = box.end > state.from && box.start < state.to;
    const room = box.label !== undefined && seen && wide >= 5 + 6.6 * box.label.text.length;
    if (room && !box.number) {
      box.number = svg("text", {class: `number ${box.label.look.split(" ")[1]}`, y: box.label.y}, null, box.label.text);
      box.rect.after(box.number);
      box.number.classList.toggle("followed", box.rect.classList.contains("followed"));
    }
    if (box.number) {
      box.number.setAttribute("visibility", room ? "visible" : "hidden");
      if (room) box.number.setAttribute("x", (left + wide / 2).toFixed(2));
    }
  }

  trace({area, line, row, bottom}, x) {
    const y = (alive) => (bottom - alive / this.most * (this.size.curve - 1)).toFixed(2);
    let path = `M${x(0).toFixed(2)},${bottom}`;
    for (const [time, alive] of row.memory) path += `H${x(time).toFixed(2)}V${y(alive)}`;
    path += `H${x(this.timeline.makespan).toFixed(2)}`;
    line.setAttribute("d", path);
    area.setAttribute("d", `${path}V${bottom}Z`);
  }

  ticks(x, inner) {
    this.axis.replaceChildren();
    this.grid.replaceChildren();
    const step = roundStep((state.to - state.from) / (inner / 96)), bottom = this.height - AXIS;
    svg("line", {class: "floor", x1: LEFT, x2: LEFT + inner, y1: bottom, y2: bottom}, this.axis);
    const unit = state.to >= 1 ? [1, "s"] : state.to >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
    for (let tick = Math.ceil(state.from / step - 1e-9); tick * step <= state.to * (1 + 1e-9); tick += 1) {
      const at = x(tick * step).toFixed(2);
      svg("line", {class: "grid", x1: at, x2: at, y1: 0, y2: bottom}, this.grid);
      svg("text", {class: "tick", x: at, y: bottom + 17, "text-anchor": "middle"}, this.axis,
          `${Number((tick * step * unit[0]).toPrecision(6))} ${unit[1]}`);
    }
  }
}

function everyPass(row) {
  return [...row.passes, ...row.copies.flat()];
}

function peakOf(row) {
  return row.memory.reduce((most, [, alive]) => Math.max(most, alive), 0);
}

function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least);
}

// -- the view: one for both timelines

function whole() {
  const {predicted, measured} = state.batch;
  const ends = measured.others.flat().map(([, , end]) => end);
  return Math.max(predicted.makespan, measured.makespan, ...ends) * 1.005 || 1;
}

function show(from, to) {
  const most = whole(), wide = Math.min(Math.max(to - from, most * 1e-5), most);
  state.from = Math.min(Math.max(from, 0), most - wide);
  state.to = state.from + wide;
  document.documentElement.dataset.view = `${state.from} ${state.to}`;
  if (!state.scheduled) {
    state.scheduled = true;
    requestAnimationFrame(draw);
  }
}

function draw() {
  state.scheduled = false;
  for (const panel of state.panels) panel.draw();
}

function zoom(factor, share = 0.5) {
  const wide = state.to - state.from, fixed = state.from + wide * share;
  show(fixed - wide * factor * share, fixed + wide * factor * (1 - share));
}

function pan(share) {
  const by = (state.to - state.from) * share;
  show(state.from + by, state.to + by);
}

function resize() {
  state.width = Math.max(520, byId("measured").getBoundingClientRect().width);
  show(state.from, state.to);
}

// -- hover and click

function allPasses(wanted) {
  return [...document.querySelectorAll("rect.pass")].filter(wanted);
}

function point(target) {
  for (const rect of document.querySelectorAll(".pass.same")) rect.classList.remove("same");
  const name = target.dataset && target.dataset.pass;
  if (name) for (const rect of allPasses((other) => other.dataset.pass === name)) rect.classList.add("same");
}

function follow(pass) {
  const again = !pass || (state.followed && nameOf(state.followed) === nameOf(pass));
  state.followed = again ? null : pass;
  for (const {root, boxes} of state.panels) {
    root.classList.toggle("following", !again);
    for (const {rect, number} of boxes) {
      const wanted = !again && rect.pass !== undefined && rect.pass[2] === pass[2];
      rect.classList.toggle("followed", wanted);
      if (number) number.classList.toggle("followed", wanted);
    }
  }
  describe();
}

function describe() {
  const details = byId("details"), pass = state.followed;
  details.replaceChildren();
  if (!pass) {
    html("span", details, "No pass chosen: click one for what it took, what was predicted, and its message.");
    return;
  }
  const [kind, stage, microBatch] = pass, name = nameOf(pass), batch = state.batch;
  const rank = batch.chunks.findIndex((stages) => stages.includes(stage));
  const fact = (label, value) => { const item = html("span", details, `${label} `); html("em", item, value); };
  html("b", details, name);
  fact(MEANINGS[kind], `stage ${stage}, micro-batch ${microBatch}, rank ${rank}`);
  const took = {};
  for (const which of ["predicted", "measured"]) {
    const found = everyPass(batch[which].ranks[rank]).find((other) => nameOf(other) === name);
    if (!found) continue;
    took[which] = found[6] - found[5];
    fact(which, `${seconds(took[which])}, from ${seconds(found[5])} to ${seconds(found[6])}`);
  }
  if (took.predicted) fact("measured / predicted", (took.measured / took.predicted).toFixed(2));
  const message = batch.messages[`${kind === "BW" ? "B" : kind}${stage}.${microBatch}`];
  if (message && kind !== "W" && kind !== "C") {
    const [source, sent, arrived, from, to] = message;
    fact(`its input from rank ${source}`, `${seconds(Math.max(0, arrived - sent), 3)} on its way, arrived at ` +
         `${seconds(arrived)}`);
    fact("waited for it", seconds(to - from, 3));
  }
}

function tip(event) {
  const box = byId("tip"), text = event.target.tip;
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const {width, height} = box.getBoundingClientRect();
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
  box.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
}

function share(event, root) {
  const {left, width} = root.getBoundingClientRect(), inner = state.width - LEFT - RIGHT;
  return Math.min(1, Math.max(0, ((event.clientX - left) * state.width / width - LEFT) / inner));
}

function listen(root) {
  let drag = null;
  root.addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(Math.exp(event.deltaY * 0.004), share(event, root));
    } else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      pan(event.deltaX / 1000);
    }
  }, {passive: false});
  root.addEventListener("pointerdown", (event) => {
    drag = {at: share(event, root), from: state.from, to: state.to, moved: false};
  });
  root.addEventListener("pointermove", (event) => {
    const at = share(event, root);
    if (drag) {
      const by = (drag.at - at) * (drag.to - drag.from);
      if (Math.abs(drag.at - at) > 0.004 && !drag.moved) {
        drag.moved = true;
        root.classList.add("dragging");
        root.setPointerCapture(event.pointerId);
      }
      if (drag.moved) show(drag.from + by, drag.to + by);
    }
    const x = LEFT + at * (state.width - LEFT - RIGHT);
    for (const {cursor} of state.panels) {
      cursor.setAttribute("visibility", "visible");
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
    }
    point(event.target);
    tip(event);
  });
  root.addEventListener("pointerup", () => {
    // A click comes after it.
    setTimeout(() => { drag = null; root.classList.remove("dragging"); });
  });
  root.addEventListener("pointerleave", () => {
    byId("tip").hidden = true;
    for (const {cursor} of state.panels) cursor.setAttribute("visibility", "hidden");
    point(root);
  });
  root.addEventListener("click", (event) => {
    if (!drag || !drag.moved) follow(event.target.pass);
  });
}

const KEYS = {
  w: () => zoom(1 / 1.4), s: () => zoom(1.4), a: () => pan(-0.2), d: () => pan(0.2), "+": () => zoom(1 / 1.4),
  "-": () => zoom(1.4), ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), 0: () => show(0, whole()),
  Escape: () => follow(null),
};

// -- the page

function figure(name, value, beside) {
  const item = html("div", byId("figures"));
  html("dt", item, name);
  const text = html("dd", item, value);
  if (beside) html("small", text, ` ${beside}`);
}

function legend(batch) {
  const list = byId("legend");
  list.replaceChildren();
  const kinds = new Set(batch.measured.ranks.flatMap((rank) => everyPass(rank).map(([kind]) => kind)));
  const entry = (label, ...colours) => {
    const item = html("li", list);
    for (const colour of colours) html("i", item).style.background = colour;
    item.append(label);
  };
  const chunks = Math.max(...batch.chunks.map((stages) => stages.length)) > 1 ? [0, 1] : [0];
  for (const kind of Object.keys(MEANINGS).filter((kind) => kinds.has(kind))) {
    entry(`${kind}  ${MEANINGS[kind]}`, ...chunks.map((chunk) => `var(--${kind}${chunk})`));
  }
  entry("bubble", "repeating-linear-gradient(135deg, #f7f7f5 0 3px, #c9c9c3 3px 4px)");
  entry("end of the batch", "var(--end)");
  entry(batch.unit === "bytes" ? "activations kept" : "activations kept (of 1/(2p) of the model)",
        "color-mix(in srgb, var(--memory) 45%, white)");
}

function choose(batch) {
  state.batch = batch;
  const {predicted, measured, chunks} = batch, stages = chunks.flat().length;
  document.title = `${batch.schedule}, batch ${batch.number}`;
  byId("name").textContent = `${batch.schedule}, batch ${batch.number}`;
  byId("layout").textContent = `${chunks.length} ranks, ${stages} stages, ${batch.microBatches} micro-batches`;
  byId("figures").replaceChildren();
  figure("makespan, predicted", seconds(predicted.makespan));
  figure("measured", seconds(measured.makespan), `${(measured.makespan / predicted.makespan).toFixed(2)} of predicted`);
  figure("bubble, predicted", percent(predicted.bubble));
  figure("measured", percent(measured.bubble));
  byId("about-predicted").textContent = `simulated with ${batch.timesOf}`;
  byId("about-measured").textContent = `clocks of the ranks agree to ${seconds(batch.uncertainty, 2)}`;
  legend(batch);
  state.panels = ["predicted", "measured"].map((id) => new Panel(id, batch));
  state.followed = null;
  describe();
  show(0, whole());
  resize();
  draw();
  document.documentElement.dataset.ready = batch.number;
}

const select = byId("batch");
data.batches.forEach(({number}, place) => { html("option", select, number).value = place; });
byId("choice").hidden = data.batches.length < 2;
select.addEventListener("change", () => choose(data.batches[select.value]));
byId("in").addEventListener("click", () => zoom(1 / 1.6));
byId("out").addEventListener("click", () => zoom(1.6));
byId("all").addEventListener("click", () => show(0, whole()));
addEventListener("resize", resize);
addEventListener("keydown", (event) => {
  if (event.target !== select && !event.ctrlKey && !event.metaKey && KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
});
for (const id of ["predicted", "measured"]) listen(byId(id));
choose(data.batches[0]);
