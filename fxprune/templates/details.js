// What is selected or searched for: a box, a group.

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
  words.push(...frozenIn(box), ...groups.flatMap(groupDetails), ...otherGroups(box, groups));
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
    make("li", {}, `${count(channels)} because ${node ? `node ${node}` : "it"} ${reason}`, ...lineOf(source)),
  );
  if (!rows.length) rows.push(make("li", {}, "no dim of it is made of channels"));
  return [make("h3", {}, "Frozen channels"), make("ul", {}, ...rows)];
}

function groupDetails(number) {
  const group = data.groups[number];
  const share = group.after ? `${percent(group.after, group.before)} kept` : "branch removed";
  const ties = data.ties.filter((tie) => tie[5].includes(number));
  const verbs = { tie: "tied to", row: "shares rows with", crossing: "crosses" };
  return [
    make("h3", {}, dotOf(number), `Group ${number} (${group.kind}): ${change(group.before, group.after)}, ${share}`),
    make("h3", {}, `Sites (${group.cuts.length})`),
    list(group.cuts, ([name, dim, ...sizes]) => [make("code", {}, `${name}[${dim}]`), ` ${change(...sizes)}`]),
    make("h3", {}, `Ties (${ties.length})`),
    list(ties, ([a, b, node, source, relation]) => [
      make("code", {}, a), ` ${verbs[relation]} `, make("code", {}, b), ` at ${node}`, ...lineOf(source),
    ]),
  ];
}

/** Groups that cut the parameters of a layer, such as those of what it reads. */
function otherGroups(box, known) {
  if (!box.layer) return [];
  const cuts = (group) => group.cuts.filter(([name]) => name.startsWith(`${box.layer}.`));
  const others = data.groups.map((group, number) => [group, number]).filter(([, number]) => !known.includes(number));
  const rows = others.flatMap(([group, number]) => cuts(group).map((cut) => [number, cut]));
  if (!rows.length) return [];
  return [
    make("h3", {}, "Also cut by"),
    list(rows, ([number, [name, dim, ...sizes]]) => [
      make("button", { type: "button", click: () => selectGroup(number) }, dotOf(number), `group ${number}`),
      " ", make("code", {}, `${name}[${dim}]`), ` ${change(...sizes)}`,
    ]),
  ];
}

/** A square in the colour of a group. */
function dotOf(number) {
  const dot = make("span", { class: "dot" });
  dot.style.background = (data.colors[number] || ["transparent"])[0];
  return dot;
}

function lineOf(source) {
  return source ? [make("br"), make("code", { class: "quiet" }, source)] : [];
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

const hits = { boxes: [], next: 0 };

function search() {
  const words = at("search").value.trim().toLowerCase();
  const names = (box) => [box.layer, box.name, box.node].join("\n").toLowerCase();
  hits.boxes = words ? data.boxes.filter((box) => names(box).includes(words)) : [];
  hits.next = 0;
  for (const box of data.boxes) drawn.get(box.node).classList.toggle("match", hits.boxes.includes(box));
  const hint = hits.boxes.length ? ", Enter goes there" : "";
  at("matches").textContent = words ? `${hits.boxes.length} found${hint}` : "";
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
