"""A page in a real browser engine: `python tests/browser.py page.html < steps.json`, with a Python that has PyQt6.

Steps are `{"run": "JavaScript"}` and `{"click": "CSS selector"}`, the latter with the mouse. Prints JSON: the seconds
until the page is loaded, what it asked for and wrote to the console, and what each step gave; with a second argument,
the picture of the window goes there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SIZE = (1400, 1000)
PAUSE = 200
"""Milliseconds after each step, for what it starts to end."""
FLAGS = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}


def visit(page: Path, steps: list[dict[str, str]], picture: str | None = None) -> dict[str, Any]:
    """Load a page and take steps on it."""
    from PyQt6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
    from PyQt6.QtTest import QTest
    from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    asked, said = [], []

    class Watch(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):  # noqa: N802  (Qt's name)
            asked.append(info.requestUrl().toString())

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: N802  (Qt's name)
            said.append(message)

    app = QApplication(sys.argv[:1])
    view, watch = QWebEngineView(), Watch()
    view.setPage(Page(view))
    view.page().profile().setUrlRequestInterceptor(watch)
    view.resize(*SIZE)
    view.show()

    def wait(start) -> Any:
        loop, found = QEventLoop(), []
        start(lambda *answer: (found.extend(answer), loop.quit()))
        loop.exec()
        return found[0] if found else None

    def run(code: str) -> Any:
        return wait(lambda done: view.page().runJavaScript(code, done))

    def click(selector: str) -> None:
        found = f"document.querySelector({json.dumps(selector)})"
        run(f"{found}.scrollIntoView({{block: 'center'}})")
        x, y = run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({found}.getBoundingClientRect())")
        QTest.mouseClick(view.focusProxy(), Qt.MouseButton.LeftButton, pos=QPoint(round(x), round(y)))

    began = time.perf_counter()
    view.loadFinished.connect(lambda ok: said.append("loaded" if ok else "not loaded"))
    wait(lambda done: (view.loadFinished.connect(done), view.load(QUrl.fromLocalFile(str(page.resolve())))))
    seconds, results = time.perf_counter() - began, []
    for step in steps:
        results.append(run(step["run"]) if "run" in step else click(step["click"]))
        wait(lambda done: QTimer.singleShot(PAUSE, done))
    if picture:
        view.grab().save(picture)
    app.quit()
    return {"seconds": seconds, "asked": asked, "said": said, "results": results}


if __name__ == "__main__":
    os.environ.update(FLAGS)
    found = visit(Path(sys.argv[1]), json.load(sys.stdin), *sys.argv[2:3])
    print(json.dumps(found), flush=True)
    os._exit(0)  # Qt's own way out takes the page apart in an order that it complains about
