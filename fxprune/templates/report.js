"use strict";

// All text comes from `data` and goes into the page through textContent: names are never read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en-US");
const percent = (after, before) => (before ? `${((100 * after) / before).toFixed(1)}%` : "–");
const change = (before, after) => (before === after ? count(before) : `${count(before)} → ${count(after)}`);
const HEIGHT = 24;

/** Make an element: `children` are elements or text. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of the drawing. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(at("graph").namespaceURI, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// ---- Head: title, costs, light and dark --------------------------------------------------------

function showHead() {
  const groups = data.groups;
  const sum = (key) => groups.reduce((total, group) => total + group[key], 0);
  at("title").textContent = `${data.network}, pruned to ${data.budget || "a plan"}`;
  at("subtitle").append(
    `${data.method}; traced by ${data.frontend}; ${groups.length} groups keep ${count(sum("after"))} of `,
    `${count(sum("before"))} channels; ${data.coverage}.`,
  );
  for (const [name, before, after] of data.costs) {
    const bar = make("div");
    bar.style.width = percent(after, before);
    const line = `${percent(after, before)} of ${name}${name === "memory" ? ", bytes at the peak" : ""}`;
    at("cards").append(
      make("div", { class: "card" }, line, make("b", {}, change(before, after)), make("div", { class: "track" }, bar)),
    );
  }
  const verdict = { true: "equal to the masked original", false: "DIFFERENT", null: "not verified" }[data.passed];
  const look = { true: "good", false: "bad", null: "quiet" }[data.passed];
  const proof = make("div", { class: "card", title: data.proof }, "slim(x) against masked(x)");
  proof.append(make("b", { class: look }, verdict), make("span", { class: "quiet" }, data.proof.split(", ").pop().split("\n")[0]));
  at("cards").append(proof);
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.style.colorScheme = dark === "dark" ? "light" : "dark";
}

// ---- Picture: boxes and edges, pan and zoom ----------------------------------------------------

const boxOf = new Map(data.boxes.map((box) => [box.node, box]));
const drawn = new Map();
const view = { x: 0, y: 0, scale: 1 };
const groupsOf = (box) => box.segments.map((segment) => segment[0]).filter((group) => group !== null);

function showPicture() {
  for (const [from, to, points] of data.edges) {
    let path = `M${points[0]} ${points[1] + HEIGHT / 2}`;
    for (let i = 2; i < points.length; i += 2) {
      const [x0, y0, x1, y1] = [points[i - 2], points[i - 1] + HEIGHT / 2, points[i], points[i + 1] - HEIGHT / 2];
      path += `V${y0}C${x0} ${(y0 + y1) / 2} ${x1} ${(y0 + y1) / 2} ${x1} ${y1}`;
    }
    at("world").append(draw("path", { class: "edge", d: path, "data-from": from, "data-to": to }));
  }
  for (const box of data.boxes) {
    drawn.set(box.node, drawBox(box));
    at("world").append(drawn.get(box.node));
  }
  if (data.boxes.length) start();
}

function drawBox(box) {
  const [left, top] = [box.x - box.width / 2, box.y - HEIGHT / 2];
  const label = `${box.layer || box.name} ${box.size}`;
  const g = draw("g", { class: `box ${box.kind}`, tabindex: 0, role: "button", "aria-label": label });
  const rect = (x, width, attributes) => draw("rect", { x, y: top, width, height: HEIGHT, ...attributes });
  const total = box.segments.reduce((sum, segment) => sum + segment[1], 0) || 1;
  let x = left;
  for (const [group, before, after] of box.segments) {
    const width = (box.width * before) / total;
    const [solid, pale] = group === null ? ["url(#hatch)", "#ffffff"] : data.colors[group];
    g.append(rect(x, width, { fill: pale }), rect(x, (width * after) / (before || 1), { fill: solid }));
    x += width;
  }
  g.append(rect(left, box.width, { class: "frame", rx: box.segments.length ? 0 : 8 }));
  const groups = groupsOf(box);
  const number = groups.length === 1 ? [draw("tspan", { class: "number" }, `${groups[0]} `)] : [];
  const words = { x: box.x, y: box.y, "text-anchor": "middle" };
  g.append(draw("text", words, ...number, [box.name, box.size].filter(Boolean).join(" ")));
  g.append(draw("title", {}, label));
  fill(g, { click: () => moved || select(box), keydown: (event) => event.key === "Enter" && select(box) }, []);
  return g;
}

function place() {
  at("world").setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
}

function extent() {
  const sides = data.boxes.flatMap((box) => [box.x - box.width / 2, box.x + box.width / 2]);
  const across = data.edges.flatMap((edge) => edge[2].filter((_, i) => i % 2 === 0));
  const rows = data.boxes.map((box) => box.y);
  const [left, right] = [[...sides, ...across].reduce((a, b) => Math.min(a, b)), [...sides, ...across].reduce((a, b) => Math.max(a, b))];
  const [top, bottom] = [rows.reduce((a, b) => Math.min(a, b)), rows.reduce((a, b) => Math.max(a, b))];
  return { left: left - 20, top: top - 30, width: right - left + 40, height: bottom - top + 60 };
}

/** Show everything. */
function fit() {
  const [{ left, top, width, height }, frame] = [extent(), at("graph").getBoundingClientRect()];
  view.scale = Math.min(frame.width / width, frame.height / height, 1.2);
  view.x = (frame.width - width * view.scale) / 2 - left * view.scale;
  view.y = (frame.height - height * view.scale) / 2 - top * view.scale;
  place();
}

/** Show the top of the network, legibly. */
function start() {
  fit();
  if (view.scale < 0.75) {
    const { top } = extent();
    const first = boxOf.get(data.boxes[0].node);
    view.scale = 0.9;
    view.x = at("graph").getBoundingClientRect().width / 2 - first.x * view.scale;
    view.y = -top * view.scale;
    place();
  }
}

/** Zoom by a factor; the point (x, y) of the frame stays where it is. */
function zoom(factor, x, y) {
  const scale = Math.min(Math.max(view.scale * factor, 0.02), 4);
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  place();
}

function zoomButton(factor) {
  const frame = at("graph").getBoundingClientRect();
  zoom(factor, frame.width / 2, frame.height / 2);
}

let moved = false;
function listenToPointer() {
  const svg = at("graph");
  let from = null;
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const frame = svg.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 400), event.clientX - frame.left, event.clientY - frame.top);
  }, { passive: false });
  svg.addEventListener("pointerdown", (event) => {
    from = { x: event.clientX - view.x, y: event.clientY - view.y, atX: event.clientX, atY: event.clientY };
    moved = false;
  });
  svg.addEventListener("pointermove", (event) => {
    if (!from) return;
    if (!moved && Math.hypot(event.clientX - from.atX, event.clientY - from.atY) < 4) return;
    if (!moved) svg.setPointerCapture(event.pointerId);
    moved = true;
    svg.classList.add("moving");
    [view.x, view.y] = [event.clientX - from.x, event.clientY - from.y];
    place();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    svg.addEventListener(end, () => {
      from = null;
      svg.classList.remove("moving");
    });
  }
}

/** Bring a box into the middle of the frame. */
function goTo(box) {
  const frame = at("graph").getBoundingClientRect();
  view.scale = Math.max(view.scale, 0.8);
  [view.x, view.y] = [frame.width / 2 - box.x * view.scale, frame.height / 2 - box.y * view.scale];
  place();
}

// ---- Selection: what a box or a group is -------------------------------------------------------

/** Light up the boxes of groups and the edges of one box; without groups, light up everything. */
function light(groups, node) {
  at("world").classList.toggle("dimmed", groups.length > 0);
  for (const [name, g] of drawn) {
    g.classList.toggle("lit", name === node || groupsOf(boxOf.get(name)).some((group) => groups.includes(group)));
    g.classList.toggle("selected", name === node);
  }
  for (const edge of at("world").querySelectorAll(".edge")) {
    edge.classList.toggle("near", edge.dataset.from === node || edge.dataset.to === node);
  }
  for (const row of at("table").querySelectorAll("tr.link")) {
    row.classList.toggle("selected", groups.includes(Number(row.dataset.group)));
  }
}

function select(box) {
  const groups = groupsOf(box);
  light(groups, box.node);
  const words = [make("h2", {}, box.layer || box.name)];
  words.push(make("p", { class: "quiet" }, `${box.kind}${box.kind === "output" ? "" : `, node ${box.node}`}`));
  if (box.size) words.push(make("p", {}, `width of its output: ${box.size}`));
  if (box.source) words.push(make("p", {}, make("code", {}, box.source)));
  words.push(...frozenIn(box), ...groups.flatMap(groupDetails));
  at("details").replaceChildren(...words);
  at("details").scrollTop = 0;
}

function selectGroup(group) {
  light([group], null);
  at("details").replaceChildren(...groupDetails(group));
  at("details").scrollTop = 0;
  const first = data.boxes.find((box) => groupsOf(box).includes(group));
  if (first) goTo(first);
}

function frozenIn(box) {
  const stays = box.segments.filter((segment) => segment[0] === null).reduce((sum, segment) => sum + segment[1], 0);
  if (!stays && !box.held.length) return [];
  const rows = box.held.map(([channels, node, source, reason]) =>
    make("li", {}, `${count(channels)} because ${node ? `node ${node}` : "it"} ${reason}`, ...(source ? [make("br"), make("code", {}, source)] : [])),
  );
  if (!rows.length) rows.push(make("li", {}, "no dim of it is made of channels"));
  return [make("h3", {}, "Frozen channels"), make("ul", {}, ...rows)];
}

function groupDetails(number) {
  const group = data.groups[number];
  const dot = make("span", { class: "dot" });
  dot.style.background = (data.colors[number] || ["transparent"])[0];
  const width = group.after ? `${change(group.before, group.after)}, ${percent(group.after, group.before)} kept` : "branch removed";
  const ties = data.ties.filter((tie) => tie[5].includes(number));
  const verbs = { tie: "tied to", row: "shares rows with", crossing: "crosses" };
  return [
    make("h3", {}, dot, `Group ${number} (${group.kind}): ${width}`),
    make("h3", {}, `Sites (${group.cuts.length})`),
    list(group.cuts, ([name, dim, before, after]) => [make("code", {}, `${name}[${dim}]`), ` ${change(before, after)}`]),
    make("h3", {}, `Ties (${ties.length})`),
    list(ties, ([a, b, node, source, relation]) => [
      make("code", {}, a), ` ${verbs[relation]} `, make("code", {}, b), ` at ${node}`,
      ...(source ? [make("br"), make("code", { class: "quiet" }, source)] : []),
    ]),
  ];
}

/** A list that shows its first entries, and the others on demand. */
function list(rows, words, shown = 12) {
  const items = (part) => part.map((row) => make("li", {}, ...words(row)));
  const found = make("ul", {}, ...items(rows.slice(0, shown)));
  if (rows.length > shown) {
    const more = make("button", { type: "button" }, `${count(rows.length - shown)} more`);
    more.addEventListener("click", () => more.parentElement.replaceWith(...items(rows.slice(shown))));
    found.append(make("li", {}, more));
  }
  return found;
}

// ---- Search ------------------------------------------------------------------------------------

const hits = { boxes: [], next: 0 };

function search() {
  const words = at("search").value.trim().toLowerCase();
  const names = (box) => [box.layer, box.name, box.node].join("\n").toLowerCase();
  hits.boxes = words ? data.boxes.filter((box) => names(box).includes(words)) : [];
  hits.next = 0;
  for (const box of data.boxes) drawn.get(box.node).classList.toggle("match", hits.boxes.includes(box));
  at("matches").textContent = words ? `${hits.boxes.length} found${hits.boxes.length ? ", Enter goes there" : ""}` : "";
  if (hits.boxes.length) goTo(hits.boxes[0]);
}

function nextHit(event) {
  if (event.key !== "Enter" || !hits.boxes.length) return;
  const box = hits.boxes[hits.next % hits.boxes.length];
  hits.next += 1;
  at("matches").textContent = `${((hits.next - 1) % hits.boxes.length) + 1} of ${hits.boxes.length}`;
  goTo(box);
  select(box);
}

// ---- Tables ------------------------------------------------------------------------------------

const TABLES = {
  Groups: {
    columns: ["group", "first site", "kind", "sites", "before", "after", "kept"],
    rows: data.groups.map((g, i) => [i, g.name, g.kind, g.cuts.length, g.before, g.after, g.after / g.before]),
    group: true,
  },
  Frozen: { columns: ["channels", "node", "line", "because it"], rows: data.frozen },
  "What holds the rest": { columns: ["macs", "params", "node", "held because", "line"], rows: data.blocked },
  Costs: {
    columns: ["cost", "before", "after", "kept"],
    rows: data.costs.map(([name, before, after]) => [name, before, after, after / before]),
  },
  Notes: { columns: ["note"], rows: data.notes.map((note) => [note]) },
};

function showTabs() {
  for (const [name, table] of Object.entries(TABLES)) {
    const tab = make("button", { type: "button", role: "tab", click: () => showTable(name) }, `${name} (${table.rows.length})`);
    tab.dataset.name = name;
    at("tabs").append(tab);
  }
  showTable("Groups");
}

function showTable(name) {
  for (const tab of at("tabs").children) tab.setAttribute("aria-selected", tab.dataset.name === name);
  const { columns, rows, group } = TABLES[name];
  const body = make("tbody");
  const heads = columns.map((title, i) =>
    make("th", { scope: "col", "aria-sort": "none" }, make("button", { type: "button", click: () => sort(i) }, title)),
  );
  function show(sorted) {
    body.replaceChildren(...sorted.map((row) => tableRow(row, columns, group)));
  }
  function sort(i) {
    const up = heads[i].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head, j) => head.setAttribute("aria-sort", j !== i ? "none" : up ? "ascending" : "descending"));
    const order = (a, b) => (typeof a[i] === "number" ? a[i] - b[i] : a[i].localeCompare(b[i], "en", { numeric: true }));
    show([...rows].sort((a, b) => (up ? order(a, b) : order(b, a))));
  }
  show(rows);
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  at("table").replaceChildren(rows.length ? table : make("p", { class: "quiet" }, "None."));
}

function tableRow(row, columns, group) {
  const cells = row.map((value, i) => {
    if (columns[i] === "kept") {
      const cell = make("td", { class: "number-cell share" }, value ? percent(value, 1) : "branch removed");
      cell.style.setProperty("--part", `${100 * value}%`);
      return cell;
    }
    return typeof value === "number" ? make("td", { class: "number-cell" }, count(value)) : make("td", {}, value);
  });
  if (!group) return make("tr", {}, ...cells);
  const link = { class: "link", "data-group": row[0], tabindex: 0, click: () => selectGroup(row[0]) };
  return make("tr", { ...link, keydown: (event) => event.key === "Enter" && selectGroup(row[0]) }, ...cells);
}

showHead();
showPicture();
showTabs();
listenToPointer();
at("details").append(make("h2", {}, "Nothing selected"), make("p", { class: "quiet" }, "Click a layer in the picture, or a group in the table below."));
at("theme").addEventListener("click", switchTheme);
at("search").addEventListener("input", search);
at("search").addEventListener("keydown", nextHit);
at("in").addEventListener("click", () => zoomButton(1.25));
at("out").addEventListener("click", () => zoomButton(0.8));
at("fit").addEventListener("click", fit);
