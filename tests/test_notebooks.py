"""The notebooks: each runs in a fresh kernel, and what is committed is small, whole and of the same code."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from kernels import METADATA, NOTEBOOKS, executed, outputs
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NAMES = [path.stem for path in NOTEBOOKS]
MOST_BYTES = 300_000


def text_of(output: NotebookNode) -> str:
    """Return what an output says in words; "" for a picture."""
    return output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")


def wording(notebook: NotebookNode) -> list[list[str]]:
    """Return what each code cell says, without numbers, rules of tables and white space."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            said = " ".join(text_of(output) for output in cell.outputs)
            found.append(re.sub(r"[-+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?|-{2,}", "", said).split())
    return found


def test_there_are_five() -> None:
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs_and_says_what_is_committed(path: Path) -> None:
    """Cells assert what matters; the wording tells that the committed outputs are of the committed code."""
    fresh, committed = executed(path), nbformat.read(path, as_version=4)
    assert not [output.text for output in outputs(fresh) if output.get("name") == "stderr"]
    assert wording(fresh) == wording(committed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_committed_is_small_and_whole(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert any("assert " in cell.source for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_committed_has_no_paths_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    said = "\n".join(
        [cell.source for cell in notebook.cells]
        + [str({kind: v for kind, v in o.get("data", {}).items() if kind != "image/png"}) for o in outputs(notebook)]
        + [text_of(output) for output in outputs(notebook)]
    )
    assert not re.findall(r"(?<![\w./<])/(?:home|root|tmp|usr|opt|var|work|Users|mnt)\b[^\s]*|\b[A-Z]:\\\\?\w", said)


def test_pages_lead_to_the_notebooks() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"notebooks/(\w+)\.ipynb\)", readme) == NAMES
    assert f"notebooks/{NAMES[0]}.ipynb" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
