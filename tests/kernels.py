"""Run the notebooks, each in a fresh kernel on one thread: `python tests/kernels.py` writes their outputs anew.

`python tests/kernels.py notebooks/05_methods.ipynb` does one of them.
"""

from __future__ import annotations

import base64
import io
import os
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> NotebookNode:
    """Return a notebook with the outputs of a run in an empty folder.

    Raises:
        CellExecutionError: a cell raised; the message holds the cell and the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}})
        client.record_timing, client.coalesce_streams = False, True
        client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    """Return what all code cells gave."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def smaller(picture: str) -> str:
    """Return a PNG in base64 with 256 colours: figures look the same, at a third of the size."""
    target = io.BytesIO()
    colored = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    colored.quantize(256, dither=Image.Dither.NONE).save(target, "PNG", optimize=True)
    return base64.b64encode(target.getvalue()).decode()


def main() -> None:
    """Execute the notebooks that are named, or all, and write them."""
    for path in [Path(name) for name in sys.argv[1:]] or NOTEBOOKS:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        nbformat.write(executed(path), path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{path.name}: {seconds:.0f} s of CPU time, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
