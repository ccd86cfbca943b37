"""The pages of the documentation: their blocks of code, and what it takes to run them.

What a block is, its first line says, and no block is without one:

* ``python``: it runs, after the blocks before it on the page and in one namespace with them.
* ``python title="fxprune/coupling.py"``: it is a part of this file.
* ``python title="slim.py"``: a file of this name, which a command of the page runs.
* ``console``: lines that begin with `$` run; see `COMMANDS` and `ELSEWHERE`.
* ``text title="output"``: the block before it prints this; `..` stands for what is another elsewhere.
* ``text``: what is no code.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fxprune.__main__ import main
from fxprune.literals import FIXERS
from fxprune.resizing import RESIZERS
from fxprune.rules import RULES

ROOT = Path(__file__).parents[1]
PAGES = {p.relative_to(ROOT).as_posix(): p for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    Attributes:
        line: number of its first line within the fence, from 1.
        language: the first word after the fence.
        title: what it is called; "" for nothing.
        text: what is in it, without indentation.
    """

    line: int
    language: str
    title: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, in order."""
    found: list[Block] = []
    inside: tuple[int, str, str, int] | None = None  # indent, fence, what follows it, line
    lines: list[str] = []
    for number, line in enumerate(PAGES[page].read_text(encoding="utf-8").splitlines(), 1):
        match = FENCE.match(line)
        if inside is None and match:
            inside, lines = (len(match[1]), match[2], match[3], number + 1), []
        elif inside is not None and match and match[2] == inside[1] and not match[3].strip():
            language, _, more = inside[2].strip().partition(" ")
            title = re.fullmatch(r'title="(.+)"', more)
            assert title or not more, f"{page}:{number}: {more!r} is not understood"
            found.append(Block(inside[3], language, title[1] if title else "", "".join(f"{n}\n" for n in lines)))
            inside = None
        elif inside is not None:
            assert not line[: inside[0]].strip(), f"{page}:{number} is less indented than its fence"
            lines.append(line[inside[0] :])
    assert inside is None, f"{page}:{inside and inside[3]}: a fence is not closed"
    return found


def commands_of(block: Block) -> list[str]:
    """Return the commands of a block: one a line, or several joined by `&&`; a backslash continues a line."""
    assert all(line.startswith(("$ ", "    ")) for line in block.text.splitlines()), block.text
    lines = re.sub(r" *\\\n +", " ", block.text).splitlines()
    return [command for line in lines for command in line[2:].split(" && ")]


def fxprune_runs(arguments: list[str]) -> None:
    """Run the command line of fxprune."""
    assert main(arguments) == 0


def one_rank_runs(arguments: list[str]) -> None:
    """Run a script as `torchrun --nproc-per-node 1` does: `test_sharing.py` has several ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
            patch.setenv(name, str(value))
        runpy.run_path(arguments[-1], run_name="__main__")


def script_runs(arguments: list[str]) -> None:
    """Run a script of the page."""
    runpy.run_path(arguments[0], run_name="__main__")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "python -m fxprune ": fxprune_runs,
    "python ": script_runs,
    "torchrun ": one_rank_runs,
}
"""How a command begins -> what runs it, given the words that follow."""
ELSEWHERE = {
    'pip install -e ".[examples]"': "by .ci/run, with more extras",
    'pip install -e ".[test]"': "by .ci/run, with more extras",
    'pip install -e ".[docs]"': "by .ci/run, with more extras",
    "mkdocs build --strict -f docs/mkdocs.yml": "by .ci/run",
    "pytest": "it runs this",
    "python -m fxprune demo": "by test_demo.py, with --quick",
}
"""Command -> where it runs, if not here."""


class Runner:
    """Runs the blocks of a page one after another."""

    def __init__(self, page: str) -> None:
        self.page = page
        self.printed = ""
        self._names: dict[str, object] = {"__name__": "__main__"}
        self._files: set[str] = set()

    def run(self, block: Block) -> None:
        """Run a block, or check what it shows."""
        if block.language == "text":
            self._check(block)
        elif block.language == "console":
            self.printed = self._output(lambda: [self._command(line) for line in commands_of(block)])
        elif (ROOT / block.title).is_file():
            assert _plain(block.text) in _plain((ROOT / block.title).read_text(encoding="utf-8")), block.text
        elif block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
            self._files.add(block.title)
        else:  # errors then name the page and the line in it
            code = compile("\n" * (block.line - 1) + block.text, str(PAGES[self.page]), "exec")
            self.printed = self._output(lambda: exec(code, self._names))

    def finish(self) -> None:
        """Check that nothing is left that no command has run."""
        assert not self._files, f"no command of {self.page} runs {self._files}"

    def _check(self, block: Block) -> None:
        if block.title:
            assert block.title == "output"
            pattern = "[^\n]*".join(map(re.escape, _plain(block.text).split("..")))
            assert re.search(pattern, _plain(self.printed)), f"{self.page}:{block.line}: printed is\n{self.printed}"
        else:
            with pytest.raises(SyntaxError):  # so that no code hides as text
                compile(block.text, self.page, "exec")

    def _command(self, line: str) -> None:
        if line in ELSEWHERE:
            return
        start = next((start for start in COMMANDS if line.startswith(start)), None)
        assert start, f"{self.page}: nothing runs `{line}`"
        words = shlex.split(line.removeprefix(start))
        COMMANDS[start](words)
        self._files -= set(words)

    def _output(self, work: Callable[[], object]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            work()
        return out.getvalue()


def _plain(text: str) -> str:
    """Return text without indentation that all lines have in common, nor spaces at their ends."""
    return "\n".join(line.strip() for line in text.strip().splitlines())


@contextlib.contextmanager
def own_tables() -> Iterator[None]:
    """Take back what a page registers."""
    tables = [(table, dict(table)) for table in (RULES, FIXERS, RESIZERS)]
    try:
        yield
    finally:
        for table, known in tables:
            table.clear()
            table.update(known)
