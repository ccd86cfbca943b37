// The picture: boxes and edges, pan and zoom.

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
  const ends = (values) => [Math.min, Math.max].map((pick) => values.reduce((a, b) => pick(a, b)));
  const [[left, right], [top, bottom]] = [ends([...sides, ...across]), ends(rows)];
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
