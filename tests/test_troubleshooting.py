"""The page on errors: what it quotes is said by the code, and the errors that users meet first are on it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pages import PAGES, ROOT
from small import Chain, Multitask
from torch import Tensor, nn

import fxprune
from fxprune import Budget, Constraints, FxPruneError, Task, methods
from fxprune.__main__ import main

QUOTED = re.findall(r"\*\*`(.+?)`\*\*", PAGES["docs/troubleshooting.md"].read_text(encoding="utf-8"), re.DOTALL)
QUOTED = [" ".join(quoted.split()) for quoted in QUOTED]
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
HALF = Budget(macs=0.5)
BATCHES = [(X, torch.tensor([1, 2])) for _ in range(3)]


def pattern(quoted: str) -> re.Pattern[str]:
    """Return what a quotation matches: `..` is anything, elsewhere it is said word by word."""
    return re.compile(".*".join(map(re.escape, quoted.split(".."))), re.DOTALL)


def texts(node: ast.AST) -> Iterator[str]:
    """Yield the strings in code, docstrings apart; `..` is for what is put into them, and what is added up is one."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield "".join(text for side in (node.left, node.right) for text in texts(side))
    if isinstance(node, ast.JoinedStr):
        yield "".join(v.value if isinstance(v, ast.Constant) else ".." for v in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child)


@cache
def messages() -> list[str]:
    files = sorted((ROOT / "fxprune").rglob("*.py"))
    return [text for path in files for text in texts(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_page_quotes_what_the_code_says(quoted: str) -> None:
    assert any(pattern(quoted).search(text) for text in messages())


def test_quotations_are_found_once_each_and_wrong_ones_are_seen() -> None:
    assert len(QUOTED) > 80
    assert len(set(QUOTED)) == len(QUOTED)
    assert "the budget cannot be met." in QUOTED
    assert not any(pattern("the budget can not be met").search(text) for text in messages())


def classify(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def compiled(budget: Any = HALF, model: Any = None, inputs: Any = X, **more: Any) -> Any:
    return fxprune.compile(model or Chain().eval(), inputs, budget, progress=False, **more)


class Asks(nn.Module):
    """Asks for values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Noisy(nn.Module):
    """Draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + torch.randn(x.shape[0], 1, 8, 8))


def too_strict() -> Any:
    """Ask for a tenth of the macs, and for outputs that are all but those of the dense network."""
    model = Chain().eval()
    batches = [(X, model(X).detach()) for _ in range(3)]
    task = Task(lambda outputs, batch: 0.001 + F.mse_loss(outputs, batch[1]), tolerance=0.01)
    return compiled(Budget(macs=0.1), model, calibration=batches, tasks={"same": task})


MISTAKES: dict[str, Callable[[], Any]] = {
    "values": lambda: compiled(model=Asks()),
    "shape of the inputs": lambda: compiled(inputs=torch.randn(2, 4, 8, 8)),
    "no tensor": lambda: compiled(inputs=()),
    "two inputs": lambda: compiled(inputs=(X, X)),
    "no module": lambda: compiled(model=lambda x: x),
    "no graph": lambda: fxprune.select_tasks(Multitask(), ["seg"]),
    "name of a parameter": lambda: fxprune.couple(fxprune.trace(Chain(), X)).why_frozen("conv9.weight"),
    "a number for a budget": lambda: compiled(0.5),
    "out of reach": lambda: compiled(Budget(macs=1e-6)),
    "no budget": lambda: Budget(),
    "negative": lambda: Budget(macs=-1),
    "latency without a model": lambda: Budget(latency=0.5),
    "pattern": lambda: compiled(constraints=Constraints(keep_outputs=["layer9"])),
    "string": lambda: Constraints(keep_outputs="conv1"),
    "a dict of constraints": lambda: compiled(constraints={"min_width": 4}),
    "tie": lambda: compiled(constraints=Constraints(tie=[("conv1", "conv2")])),
    "class of a method": lambda: compiled(method=methods.Magnitude),
    "Taylor": lambda: compiled(method=methods.Taylor()),
    "PAGCP without data": lambda: compiled(method=methods.PAGCP()),
    "PAGCP without losses": lambda: compiled(method=methods.PAGCP(), calibration=BATCHES),
    "CATRO": lambda: compiled(method=methods.CATRO()),
    "list of tasks": lambda: compiled(calibration=BATCHES, tasks=[Task(classify)]),
    "loss as a task": lambda: compiled(calibration=BATCHES, tasks={"classes": classify}),
    "empty": lambda: compiled(calibration=[]),
    "number of batches": lambda: compiled(calibration=3),
    "one batch": lambda: compiled(calibration=BATCHES[:1], tasks={"a": Task(classify, tolerance=0.1)}),
    "loss of each sample": lambda: compiled(
        calibration=BATCHES, tasks={"a": Task(lambda outputs, batch: outputs.mean(1))}
    ),
    "detached loss": lambda: compiled(
        calibration=BATCHES, tasks={"a": Task(lambda outputs, batch: outputs.mean().detach())}
    ),
    "tolerance": too_strict,
    "class that there is not": lambda: compiled(
        calibration=BATCHES, tasks={"a": Task(classify, classes=[1, 30])}
    ),
    "other classes": lambda: compiled(calibration=BATCHES, tasks={"a": Task(classify, classes=[7, 8])}),
    "unsorted classes": lambda: Task(classify, classes=[5, 2]),
    "task that there is not": lambda: fxprune.select_tasks(compiled(model=Multitask().eval()), ["edges"]),
    "one task": lambda: fxprune.select_tasks(compiled(), ["output"]),
    "random numbers": lambda: compiled(model=Noisy()),
    "no folder": lambda: fxprune.load("not_there", Chain()),
    "no record": lambda: fxprune.report(Chain()),
    "two optimizers": lambda: fxprune.transfer(torch.optim.Adam([*Chain().parameters()][:3]), compiled()),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_frequent_mistakes_are_on_the_page(mistake: str) -> None:
    with pytest.raises(FxPruneError) as raised:
        MISTAKES[mistake]()
    assert any(pattern(quoted).search(str(raised.value)) for quoted in QUOTED), raised.value


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "resnet18", "--input", "1,3,8,8"],
        ["inspect", "no_such_module:net", "--input", "1,3,8,8"],
        ["inspect", "torchvision.models:no_such_net", "--input", "1,3,8,8"],
        ["compile", "torchvision.models:resnet18", "--input", "1,3,8,8", "--out", "slim"],
        ["report", "not_there", "torchvision.models:resnet18"],
    ],
)
def test_mistakes_on_the_command_line_are_on_the_page(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert any(pattern(quoted).search(told) for quoted in QUOTED), told
