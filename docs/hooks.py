"""What the settings of MkDocs cannot say: the pages are in the folder of the settings, and benchmarks are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Read pages from this folder, and add every report in `benchmarks/` to the navigation."""
    here = Path(config.config_file_path).resolve().parent
    config.docs_dir = str(here)
    reports = sorted(path.relative_to(here).as_posix() for path in (here / "benchmarks").glob("*.md"))
    if reports:
        config.nav.append({"Benchmarks": reports})
    return config
