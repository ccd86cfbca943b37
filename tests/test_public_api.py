"""The public names: exactly these, all documented, and cheap to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune import methods

NAMES = {
    "compile", "trace", "couple", "plan", "rewrite", "verify", "save", "load", "report", "transfer", "methods",
    "calibrate", "compensate", "Calibration", "sweep", "Sweep", "select_tasks", "merge",
    "combination_costs", "CombinationCosts", "LatencyModel", "MeasuredLatency", "measure_latency",
    "Traced", "Coupling", "Plan", "Budget", "Constraints", "Task", "Verification", "Report",
    "inspect", "Inspection", "sensitivity", "Sensitivity",
    "draw_groups", "draw_group", "draw_plan", "draw_sensitivity", "draw_sweep",
    "FxPruneError", "TraceError", "CouplingError", "PlanError", "RewriteError", "VerificationError", "ArtifactError",
}  # fmt: skip
METHODS = {
    "BatchNormScale", "CATRO", "Choice", "FilterBackward", "FilterOMP", "FromTorchPruning", "HBGS", "HBGTS", "Joint",
    "MTZ", "Magnitude", "Method", "PAGCP", "PAM", "PathMethod", "Problem", "Random", "SearchMethod", "Separate",
    "Shared", "Taylor",
}  # fmt: skip
KEYWORD_ONLY = {
    "compile": ["method", "calibration", "tasks", "constraints", "on_conflict", "verify", "unknown", "progress"],
    "couple": ["unknown", "freeze"],
    "plan": ["method", "calibration", "tasks", "constraints", "on_conflict"],
    "calibrate": ["max_bytes", "positions", "by_class", "progress"],
    "compensate": ["damping", "sequential"],
    "merge": ["method", "example_inputs", "tasks"],
    "combination_costs": ["combinations", "latency"],
    "sweep": ["method", "calibration", "tasks", "constraints"],
    "sensitivity": ["method", "calibration", "tasks", "constraints", "shares", "samples"],
    "draw_groups": ["collapse"],
    "draw_group": ["collapse"],
    "draw_plan": ["most"],
    "draw_sensitivity": ["most"],
    "draw_sweep": ["resources"],
    "load": ["example_inputs"],
    "measure_latency": ["rounds"],
    "transfer": ["model"],
}


STEPS = {
    "couple": lambda other: fxprune.couple(other),
    "plan": lambda other: fxprune.plan(other, fxprune.Budget(macs=0.5)),
    "sweep": lambda other: fxprune.sweep(other, [fxprune.Budget(macs=0.5)]),
    "sensitivity": lambda other: fxprune.sensitivity(other),
    "calibrate": lambda other: fxprune.calibrate(other, [torch.ones(2, 3)]),
    "inspect": lambda other: fxprune.inspect(other),
    "rewrite": lambda other: fxprune.rewrite(other, other),
    "verify": lambda other: fxprune.verify(other, other, other),
    "compensate": lambda other: fxprune.compensate(other, other, other, other),
    "draw_groups": lambda other: fxprune.draw_groups(other),
    "draw_group": lambda other: fxprune.draw_group(other, "weight"),
    "draw_plan": lambda other: fxprune.draw_plan(other),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_given_the_model_says_what_it_needs(name: str) -> None:
    with pytest.raises(fxprune.FxPruneError, match=r"this is a Linear, where a .* is needed\. Pass what `fxprune\."):
        STEPS[name](torch.nn.Linear(3, 2))


def test_the_names_are_exactly_these() -> None:
    assert len(fxprune.__all__) == len(NAMES)
    assert set(fxprune.__all__) == NAMES
    assert set(methods.__all__) == METHODS


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_documented(name: str) -> None:
    thing = getattr(fxprune, name)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        assert "__init__(" not in (thing.__doc__ or "")
        assert not (thing.__doc__ or "").startswith(f"{name}(")  # what a dataclass writes by itself
        for member, value in vars(thing).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(value), f"{name}.{member}"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(methods, name))


@pytest.mark.parametrize("name", KEYWORD_ONLY)
def test_settings_are_keyword_only(name: str) -> None:
    parameters = inspect.signature(getattr(fxprune, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == KEYWORD_ONLY[name]


def test_every_error_is_one_of_ours() -> None:
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(fxprune, name), fxprune.FxPruneError)
    assert issubclass(fxprune.PlanError, ValueError)


def test_importing_costs_little_beyond_torch() -> None:
    program = """
import sys, time
start = time.process_time()
import torch, networkx, numpy
before, half = set(sys.modules), time.process_time()
import fxprune
print((time.process_time() - half) / (half - start))
print(*sorted(name for name in sys.modules if "." not in name and name not in before))
heavy = ("torchvision", "sklearn", "matplotlib", "scipy", "pandas", "timm", "torch_pruning")
print(*(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    share, _, heavy = done.stdout.split("\n")[:3]
    assert heavy == ""
    assert float(share) < 0.6  # of what torch itself takes; most of it is parts of torch


def test_types_are_shipped() -> None:
    assert (Path(fxprune.__file__).parent / "py.typed").exists()
    assert fxprune.__version__.count(".") == 2
