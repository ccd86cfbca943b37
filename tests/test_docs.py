"""The documentation: its code runs, its reference is complete, its links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import COMMANDS, ELSEWHERE, PAGES, ROOT, Runner, blocks_of, commands_of, own_tables

import fxprune
from fxprune import methods

RUN = {
    "README.md": (5, 7),
    "docs/command_line.md": (1, 5),
    "docs/comparison.md": (3, 0),
    "docs/guides/classes.md": (4, 0),
    "docs/guides/cnn.md": (5, 0),
    "docs/guides/detection.md": (5, 0),
    "docs/guides/several_tasks.md": (6, 0),
    "docs/guides/shipping.md": (7, 0),
    "docs/guides/transformers.md": (4, 0),
    "docs/how_it_works.md": (8, 0),
    "docs/index.md": (1, 0),
    "docs/methods.md": (10, 2),
    "docs/pictures.md": (1, 0),
    "docs/troubleshooting.md": (2, 1),
    "docs/writing_rules.md": (8, 0),
}
"""Page -> blocks of Python, commands. A page with code that is not here fails."""
STAGES = ("right after pruning", "after BN refresh", "after fine-tuning")
LANGUAGES = {"python", "console", "text"}
WITH_CODE = [page for page in PAGES if any(b.language in ("python", "console") for b in blocks_of(page))]


def test_no_page_and_no_block_is_missed() -> None:
    found = {}
    for page in PAGES:
        blocks = blocks_of(page)
        assert {b.language for b in blocks} <= LANGUAGES, page
        lines = sum(len(commands_of(b)) for b in blocks if b.language == "console")
        found[page] = (sum(b.language == "python" for b in blocks), lines)
    assert {page: counts for page, counts in found.items() if any(counts)} == RUN


@pytest.mark.parametrize("page", PAGES)
def test_code_is_fenced(page: str) -> None:
    """Code that is merely indented would not be collected."""
    fences = {n for b in blocks_of(page) for n in range(b.line, b.line + b.text.count("\n"))}
    in_list, blank = False, True
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), 1):
        indented = line.startswith("    ")
        if number not in fences:
            assert not (indented and blank and not in_list), f"{page}:{number} is indented code: fence it"
        if line and not indented:
            in_list = re.match(r" *([*-]|\d+\.) ", line) is not None or (in_list and line.startswith(" "))
        blank = not line.strip()


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = Runner(page)
    with own_tables():
        for block in blocks_of(page):
            runner.run(block)
    runner.finish()


def test_what_runs_elsewhere_is_on_some_page() -> None:
    shown = {line for page in PAGES for b in blocks_of(page) if b.language == "console" for line in commands_of(b)}
    assert set(ELSEWHERE) <= shown
    assert all(any(line.startswith(start) for line in shown) for start in COMMANDS)


def test_the_reference_names_everything_public_once() -> None:
    named = re.findall(r"^::: (\S+)$", PAGES["docs/api.md"].read_text(encoding="utf-8"), re.MULTILINE)
    public = [f"fxprune.{name}" for name in fxprune.__all__ if name != "methods"]
    public += [f"fxprune.methods.{name}" for name in methods.__all__]
    assert sorted(named) == sorted(public)


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page: headings, as GitHub and MkDocs make them of plain ones, and names of the API."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return anchors | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (PAGES[page].parent / name).resolve() if name else PAGES[page]
        assert path.is_file(), f"{page}: {target}"
        assert not anchor or anchor in _anchors(path), f"{page}: {target}"


def test_names_of_files_on_pages_exist() -> None:
    """`fxprune/x.py` and `tests/x.py`, wherever they are written."""
    for page, path in PAGES.items():
        for name in re.findall(r"`((?:fxprune|tests|docs)/[\w/.]+\.\w+)", path.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_modules_that_pages_refer_to_exist() -> None:
    """`fxprune.x.y`, wherever it is written in back-ticks."""
    for page, path in PAGES.items():
        for name in re.findall(r"`(fxprune\.[\w.]+)", path.read_text(encoding="utf-8")):
            assert _exists(name.rstrip(".")), f"{page}: {name}"


def _exists(name: str) -> bool:
    found: object = fxprune
    for i, part in enumerate(name.split(".")[1:], 2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(name.split(".")[:i]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def test_numbers_of_benchmarks_are_those_of_their_tables() -> None:
    zoo = next(line for line in _text("docs/benchmarks/zoo.md").splitlines() if line.startswith("| all "))
    networks, half, _, exact, *_, tp_exact, differs, unchanged, runs, raises, long, killed = map(
        int, zoo.split("|")[2:-1]
    )
    comparison, readme = (" ".join(_text(page).split()) for page in ("docs/comparison.md", "README.md"))
    assert networks == half == exact
    assert killed == 0
    assert f"Of the [{networks} networks]" in comparison
    assert f"fxprune cuts all {networks}, each equal" in comparison
    shares = [row["torch_pruning"]["share"] for row in _zoo() if row["torch_pruning"]["outcome"] == "exact"]
    assert len(shares) == tp_exact
    more, most = sum(share > 0.55 for share in shares), max(shares)
    assert (
        f"original with {tp_exact} (of which {more} keep more than 55 % of the macs, up to {100 * most:.0f} %)"
        in comparison
    )
    assert f"; {differs} differs, {unchanged} come back unchanged, {raises} raise, and {long} took longer" in comparison
    assert f"{runs} more run, but the benchmark cannot compare them" in comparison
    assert (
        f"(all {networks} at half of their macs, equal to the masked original; with Torch-Pruning {tp_exact}" in readme
    )
    assert f"and {runs} could not be compared" in readme
    quality = _text("docs/benchmarks/quality.md")
    counts = [re.search(rf"^\| {stage} +\|(.+)\|$", quality, re.MULTILINE) for stage in STAGES]
    cut, refreshed, tuned = ([int(number) for number in row[1].split("|")] for row in counts if row)
    assert f"which correct no weights: {cut[0]} wins of {sum(cut)} right after pruning" in readme
    assert f"right after pruning, {refreshed[0]} of {sum(refreshed)} once batch norms are measured again" in readme
    assert tuned[2] == 0
    assert f"measured again, {tuned[0]} wins and {tuned[1]} even after fine-tuning" in readme
    table = _text("docs/benchmarks/speed.md").partition("## Same job, side by side")[2].partition("## ")[0]
    ratios = re.findall(r"\| (\d\.\d+) +\|$", table, re.MULTILINE)
    assert len(ratios) == 4
    assert f"takes {min(ratios)} to {max(ratios)} times as long" in comparison


def _zoo() -> list[dict[str, Any]]:
    """Return the last row of each network."""
    lines = (ROOT / "docs/benchmarks/zoo.jsonl").read_text(encoding="utf-8").splitlines()
    return list({(row["family"], row["name"]): row for row in map(json.loads, lines)}.values())


def _text(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def test_the_page_of_modules_has_every_one_once() -> None:
    package = Path(fxprune.__file__).parent
    there = {path.stem for path in package.glob("[!_]*.py")}
    there |= {path.parent.name for path in package.glob("*/__init__.py")} | {"templates"}
    named = re.findall(r"`([a-z_]+)/?`", _text("docs/modules.md"))
    assert sorted(named) == sorted(there)
