// Everything is there: show it, and listen.

showHead();
showPicture();
showTabs();
listenToPointer();
at("details").append(
  make("h2", {}, "Nothing selected"),
  make("p", { class: "quiet" }, "Click a layer in the picture, or a group in the table below."),
);
at("theme").addEventListener("click", switchTheme);
at("search").addEventListener("input", search);
at("search").addEventListener("keydown", nextHit);
at("in").addEventListener("click", () => zoomButton(1.25));
at("out").addEventListener("click", () => zoomButton(0.8));
at("fit").addEventListener("click", fit);
