// The head of the page: title, costs, light and dark.

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
    const unit = { memory: ", bytes at the peak", latency: ", predicted microseconds" }[name] || "";
    const line = `${percent(after, before)} of ${name}${unit}`;
    at("cards").append(
      make("div", { class: "card" }, line, make("b", {}, change(before, after)), make("div", { class: "track" }, bar)),
    );
  }
  const verdicts = { true: ["equal", "good"], false: ["DIFFERENT", "bad"], null: ["not verified", "quiet"] };
  const [verdict, look] = verdicts[data.passed];
  const error = data.passed === null ? "" : `worst relative error ${data.error.toExponential(1)}`;
  at("cards").append(
    make("div", { class: "card" }, "slim(x) against masked(x)", make("b", { class: look }, verdict), error),
  );
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.style.colorScheme = dark === "dark" ? "light" : "dark";
}
