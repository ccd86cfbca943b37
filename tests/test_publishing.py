"""The report as one HTML file: what it holds, what it must not hold, and what a browser makes of it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
import torchvision
from small import Multitask, settled
from torch import nn

import fxprune
from fxprune import Budget, FxPruneError, Report
from fxprune.publishing import page_of

NASTY = "</script><img src=x onerror=alert(1)>&'\u2028{{style}}"  # fx itself stumbles over a double quote


class Tags(HTMLParser):
    """Collects the tags of a page, and what its data element holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data = ""
        self._inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag == "script" and ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data
            self._inside = False


def data_of(page: str) -> dict[str, Any]:
    return json.loads(Tags(page).data)


def report_of(model: nn.Module, x: torch.Tensor) -> Report:
    return fxprune.report(fxprune.compile(model, x, Budget(macs=0.5), verify=False, progress=False))


@pytest.fixture(scope="module")
def report() -> Report:
    return fxprune.report(
        fxprune.compile(settled(Multitask()), torch.randn(2, 3, 16, 16), Budget(macs=0.5), progress=False)
    )


@pytest.fixture(scope="module")
def resnet152(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    with torch.device("meta"):
        model = torchvision.models.resnet152()
    model = model.to_empty(device="cpu").eval()
    for p in model.parameters():
        nn.init.constant_(p.data, 0.5)
    report_of(model, torch.zeros(1, 3, 64, 64)).to_html(path)
    return path


def test_the_data_hold_all_groups_boxes_and_tables(report: Report) -> None:
    data = data_of(page_of(report))
    found = [(g["name"], g["kind"], len(g["cuts"]) > 0, g["before"], g["after"]) for g in data["groups"]]
    assert found == [(g.name, g.kind, True, g.before, g.after) for g in report.groups]
    assert [row[3] for row in data["frozen"]] == [row.reason for row in report.frozen]
    assert [row[0] for row in data["blocked"]] == [row.macs for row in report.coverage.blocked]
    assert [row[1] for row in data["costs"]] == list(report.costs.before.to_dict().values())
    nodes = {box["node"] for box in data["boxes"]}
    assert {a for a, _, _ in data["edges"]} | {b for _, b, _ in data["edges"]} <= nodes
    assert {segment[0] for box in data["boxes"] for segment in box["segments"]} - {None} <= set(range(len(found)))
    assert data["passed"] is True


def test_the_cuts_of_the_groups_add_up_to_the_plan(report: Report) -> None:
    gone: dict[tuple[str, int], int] = {}
    for group in data_of(page_of(report))["groups"]:
        for name, dim, before, after in group["cuts"]:
            gone[name, dim] = gone.get((name, dim), 0) + before - after
    plan = report.plan
    assert gone == {key: plan.sizes[key] - kept.shape[-1] for key, kept in plan.kept.items()}


def test_ties_join_all_sites_of_a_group(report: Report) -> None:
    data = data_of(page_of(report))
    for number, group in enumerate(data["groups"]):
        graph = nx.Graph([tie[:2] for tie in data["ties"] if number in tie[5]])
        sites = {f"{name}[{dim}]" for name, dim, _, _ in group["cuts"]}
        assert len(sites) == 1 or sites <= nx.node_connected_component(graph, next(iter(sites)))


def test_groups_of_rows_have_cuts_and_ties_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 5, 1))
    groups = data_of(page_of(report_of(model, torch.randn(1, 3, 8, 8))))["groups"]
    rows = [group for group in groups if group["kind"] == "rows"]
    assert rows
    for group in rows:
        assert {(name, dim): before for name, dim, before, _ in group["cuts"]}.items() >= {
            ("1.weight", 0): 16,
            ("2.weight", 1): 16,
        }.items()


def test_every_layer_that_is_held_says_why(report: Report) -> None:
    boxes = {box["layer"]: box for box in data_of(page_of(report))["boxes"] if box["kind"] == "layer"}
    held = {name: row for name, box in boxes.items() for row in box["held"]}
    stay = {name for name, box in boxes.items() if any(segment[0] is None for segment in box["segments"])}
    assert stay - set(held) == {"depth.2"}  # whose one output is no channel among others
    assert all(row[3] == "is an output of the network" for row in held.values())
    assert all(sum(row[0] for row in boxes[name]["held"]) == boxes[name]["segments"][0][1] for name in held)


def test_the_page_asks_for_nothing_from_outside(report: Report) -> None:
    page = page_of(report)
    assert not re.search(r"https?:|//\w+\.\w|\b(src|href|srcset|action)\s*=|@import|\bfetch\(|XMLHttpRequest", page)
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#hatch"}
    assert "default-src 'none'" in page


def test_names_cannot_break_out() -> None:
    class Hostile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(NASTY, nn.Conv2d(3, 8, 1))
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.get_submodule(NASTY)(x))

    Hostile.__name__ = "<b>Net"
    report = report_of(Hostile(), torch.randn(1, 3, 8, 8))
    page, plain = page_of(report), Tags(page_of(report_of(settled(Multitask()), torch.randn(2, 3, 16, 16))))
    parsed = Tags(page)
    assert parsed.tags == plain.tags
    assert json.loads(parsed.data)["groups"][0]["name"] == f"{NASTY}.weight"
    assert json.loads(parsed.data)["network"] == "<b>Net"
    assert "img" not in Tags(report._repr_html_() + report.plan._repr_html_()).tags


def test_a_network_that_was_loaded_has_the_same_picture(tmp_path: Path) -> None:
    slim = fxprune.compile(settled(Multitask()), torch.randn(2, 3, 16, 16), Budget(macs=0.5), progress=False)
    fxprune.save(slim, tmp_path)
    loaded = fxprune.report(fxprune.load(tmp_path, settled(Multitask())))
    assert loaded.sketch == fxprune.report(slim).sketch
    assert data_of(page_of(loaded))["passed"] is None


def test_the_page_of_resnet152_is_small(resnet152: Path) -> None:
    assert resnet152.stat().st_size < 300_000
    assert len(data_of(resnet152.read_text())["groups"]) == 105


def test_a_file_that_cannot_be_written_is_an_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "report.html"):
        with pytest.raises(FxPruneError, match=r"cannot write '.*Name a file in a folder"):
            report.to_html(path)


def test_couplings_and_plans_render_in_notebooks() -> None:
    coupling = fxprune.couple(fxprune.trace(settled(Multitask()), torch.randn(2, 3, 16, 16)))
    page = coupling._repr_html_()
    assert page.count("<table") == page.count("</table>") == 2
    assert "Multitask, traced by symbolic_trace" in page
    assert f"in {len(coupling.groups())} groups" in page
    page = fxprune.plan(coupling, Budget(macs=0.5))._repr_html_()
    assert page.count("<table") == page.count("</table>") == 2
    assert "trunk.0.weight" in page


def browse(page: Path, *steps: dict[str, str]) -> dict[str, Any]:
    """Take steps on a page in Chromium's engine, in a process of its own."""
    python = os.environ.get("FXPRUNE_BROWSER_PYTHON", sys.executable)
    if python == sys.executable and not importlib.util.find_spec("PyQt6"):
        pytest.skip(
            "PyQt6 is not installed: `pip install PyQt6 PyQt6-WebEngine`, or name a Python that has it in "
            "FXPRUNE_BROWSER_PYTHON"
        )
    script = Path(__file__).with_name("browser.py")
    done = subprocess.run(
        [python, script, page], input=json.dumps(steps), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


TEXT = {"run": "document.getElementById('details').textContent"}


def test_a_browser_shows_the_page_of_resnet152_within_two_seconds(resnet152: Path) -> None:
    found = browse(
        resnet152,
        {"run": "document.querySelectorAll('.box').length"},
        {"click": "[aria-label^='layer1.0.conv1 ']"},
        TEXT,
        {"run": "document.querySelectorAll('.box.lit').length"},
        {"run": "at('search').value = 'layer3.7'; at('search').dispatchEvent(new Event('input')); at('matches').value"},
        {"click": "th:nth-child(5) button"},
        {"run": "[...document.querySelectorAll('tbody tr td:nth-child(5)')].map(cell => cell.textContent)"},
        {"click": "#theme"},
        {"run": "getComputedStyle(document.body).backgroundColor"},
        {"run": "[...document.querySelectorAll('#tabs button')].map(tab => tab.textContent)"},
    )
    boxes, _, text, lit, matches, _, widths, _, paper, tabs = found["results"]
    assert found["seconds"] < 2
    assert found["said"] == ["loaded"]
    assert [address.partition(":")[0] for address in found["asked"]] == ["file"]
    assert boxes == 208
    assert "Group 1 (channels): 64 → " in text
    assert "layer1.0.conv1.weight[0]" in text
    assert "resnet.py:" in text
    assert lit == 1
    assert matches.startswith("3 found")
    assert [int(width.replace(",", "")) for width in widths] == sorted(int(w.replace(",", "")) for w in widths)
    assert paper == "rgb(22, 24, 29)"
    assert "Groups (105)" in tabs


def test_a_browser_shows_hostile_names_as_they_are(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(NASTY, nn.Conv2d(3, 8, 1))
    model.add_module("last", nn.Conv2d(8, 2, 1))
    report_of(model, torch.randn(1, 3, 8, 8)).to_html(tmp_path / "report.html")
    found = browse(tmp_path / "report.html", {"click": "g.box.layer"}, TEXT, {"run": "document.images.length"})
    assert found["said"] == ["loaded"]
    assert found["results"][1].startswith(NASTY)
    assert found["results"][2] == 0
