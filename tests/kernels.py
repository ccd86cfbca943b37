"""Run the notebooks, each in a fresh kernel on one thread: `python tests/kernels.py` writes their outputs anew.

`python tests/kernels.py notebooks/05_methods.ipynb` does one of them.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

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
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=300, record_timing=False, resources=resources).execute(env=environment)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


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
