// The tables, which sort by every column.

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
    const title = `${name} (${table.rows.length})`;
    const tab = make("button", { type: "button", role: "tab", click: () => showTable(name) }, title);
    tab.dataset.name = name;
    at("tabs").append(tab);
  }
  showTable("Groups");
}

function showTable(name) {
  for (const tab of at("tabs").children) tab.setAttribute("aria-selected", tab.dataset.name === name);
  const { columns, rows, group } = TABLES[name];
  const body = make("tbody");
  const heads = columns.map((title, i) => {
    const look = rows.length && typeof rows[0][i] === "number" ? "number-cell" : "";
    const button = make("button", { type: "button", click: () => sort(i) }, title);
    return make("th", { scope: "col", "aria-sort": "none", class: look }, button);
  });
  function show(sorted) {
    body.replaceChildren(...sorted.map((row) => tableRow(row, columns, group)));
  }
  function sort(i) {
    const up = heads[i].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head, j) => head.setAttribute("aria-sort", j !== i ? "none" : up ? "ascending" : "descending"));
    const words = (a, b) => a.localeCompare(b, "en", { numeric: true });
    const order = (a, b) => (typeof a[i] === "number" ? a[i] - b[i] : words(a[i], b[i]));
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
  cells[0].prepend(dotOf(row[0]));
  const link = { class: "link", "data-group": row[0], tabindex: 0, click: () => selectGroup(row[0]) };
  const enter = (event) => event.key === "Enter" && selectGroup(row[0]);
  return make("tr", { ...link, keydown: enter }, ...cells);
}
