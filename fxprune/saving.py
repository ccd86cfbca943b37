"""Keep a slim network: a plan as JSON and weights as safetensors, in one folder. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import fx, nn

from fxprune.cloning import clone
from fxprune.coupling import couple
from fxprune.decomposing import candidates, decompose
from fxprune.errors import ArtifactError, PlanError
from fxprune.plans import Plan
from fxprune.reporting import Compiled, compiled, make_report
from fxprune.rewriting import rewrite
from fxprune.selecting import select_tasks
from fxprune.slimming import RECORD
from fxprune.traced import Traced
from fxprune.tracing import trace
from fxprune.verifying import verify as verify_slim

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dims of a weight -> the order of its elements in which channels come last."""
CASTS = {torch.float16: "half()", torch.bfloat16: "bfloat16()", torch.float32: "float()", torch.float64: "double()"}


def describe_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Describe example inputs as JSON-able data, or return None when they are more than tensors and plain values."""
    try:
        described = {"args": [_describe(a) for a in args], "kwargs": {k: _describe(v) for k, v in kwargs.items()}}
    except TypeError:
        return None
    return described


def _describe(value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (list, tuple)):
        return {"sequence": [_describe(v) for v in value]}
    raise TypeError(type(value).__name__)


def example(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an example input: noise, the same in every run; zeros where the dtype is integer or bool."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(tuple(shape), dtype=dtype)
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(dtype)


def _example(description: dict[str, Any]) -> Any:
    if "shape" in description:
        return example(description["shape"], getattr(torch, description["dtype"]))
    if "sequence" in description:
        return tuple(_example(v) for v in description["sequence"])
    return description["value"]


def examples(inputs: Any, where: str = "") -> Any:
    """Make example inputs from their description: a tuple of positional ones or a dict of keyword ones.

    Args:
        inputs: from `describe_inputs`.
        where: what an error begins with.

    Raises:
        ArtifactError: there is no description, or it is damaged.
    """
    if inputs is None:
        raise ArtifactError(
            "the example inputs of this network could not be saved. Pass `example_inputs=` as to `compile`."
        )
    try:
        args = tuple(_example(a) for a in inputs["args"])
        return args or {k: _example(v) for k, v in inputs["kwargs"].items()}
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"{where}the description of the example inputs is damaged ({type(error).__name__}: {error}). Pass "
            "`example_inputs=` as to `compile`."
        ) from error


def save(slim: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a slim network into a folder: `plan.json` and `weights.safetensors`.

    Args:
        slim: from `compile` or `load`, trained further or not.
        path: the folder; made if it does not exist.

    Raises:
        FxPruneError: the module did not come from fxprune.
        ArtifactError: the path is a file.
    """
    record = compiled(slim)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file. Pass the path of a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "plan": json.loads(record.report.plan.to_json()), "inputs": record.inputs, "freeze": dict(record.freeze),
        "tasks": record.tasks, "training": record.training,
    }  # fmt: skip
    data |= {"decomposed": list(record.decomposed)} if record.decomposed else {}
    last = _channels_last(slim)
    data |= {"channels_last": last} if last else {}
    save_model(slim, str(folder / WEIGHTS))
    (folder / PLAN).write_text(json.dumps(data))


@torch.inference_mode(False)
def load(path: str | os.PathLike[str], model: nn.Module, *, example_inputs: Any = None) -> fx.GraphModule:
    """Load a slim network: cut a fresh model of the class the same way and fill it with the saved weights.

    What was saved of some tasks (see `select_tasks`) is loaded as the network of these. Where forward takes another
    path in train() than in eval(), it is the one that was compiled; the mode is that of `model`.

    Args:
        path: the folder that `save` wrote.
        model: a model of the class that was compiled, with any weights. It is not touched.
        example_inputs: only needed where those of `compile` could not be saved (the error says so).

    Raises:
        ArtifactError: a file is missing or damaged, or the plan does not fit the model.
    """
    folder = Path(path)
    path = folder / PLAN
    data = _read_plan(path)
    slim = _cut(data, path, model, example_inputs=example_inputs, notes=("loaded from a file",))
    weights = folder / WEIGHTS
    try:
        _check_dtypes(slim, weights)
        load_model(slim, str(weights))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ArtifactError(f"{weights} does not fit or is damaged: {error}. Save the network again.") from error
    _put_channels_last(slim, data.get("channels_last", []), path)
    return slim


def _channels_last(slim: nn.Module) -> list[str]:
    """Return the parameters and buffers whose channels come last in memory; of 1x1 kernels, strides alone tell."""

    def comes_last(t: torch.Tensor) -> bool:
        plain = torch.empty(t.shape, device="meta")
        return plain.stride() != t.stride() == plain.to(memory_format=FORMATS[t.ndim]).stride()

    return [name for name, t in slim.state_dict().items() if t.ndim in FORMATS and comes_last(t)]


def _put_channels_last(slim: nn.Module, names: Any, path: Path) -> None:
    """Bring the parameters and buffers that the file names into the order they were saved from; speed depends on it."""
    state = slim.state_dict(keep_vars=True)
    for name in names if isinstance(names, list) else [names]:
        t = state.get(name) if isinstance(name, str) else None
        if t is None or t.ndim not in FORMATS:
            raise ArtifactError(
                f"{path}: 'channels_last' names {name!r:.60}, which is no weight of a convolution here. Save the "
                "network again."
            )
        t.data = torch.empty_like(t, memory_format=FORMATS[t.ndim]).copy_(t.data)


def cut(
    path: Path, model: nn.Module, *, example_inputs: Any = None, verify: bool = False, notes: tuple[str, ...] = ()
) -> fx.GraphModule:
    """Cut a model, with the weights it has, by the plan in a file.

    Args:
        path: the `plan.json` that `save` wrote, or the JSON of a plan alone.
        model: a model of the class that was compiled. It is not touched.
        example_inputs: only needed where the file does not describe them.
        verify: compare the slim network with the masked original.
        notes: for the report.

    Raises:
        ArtifactError: the file is missing or damaged, or the plan does not fit the model.
        VerificationError: the slim network differs from the masked original.
    """
    return _cut(_read_plan(path), path, model, example_inputs=example_inputs, verify=verify, notes=notes)


def _cut(
    data: dict[str, Any],
    path: Path,
    model: nn.Module,
    *,
    example_inputs: Any,
    verify: bool = False,
    notes: tuple[str, ...],
) -> fx.GraphModule:
    """Cut a model by what was read from a file, as `cut` says."""
    plan = Plan.from_json(json.dumps(data["plan"]))
    if example_inputs is None:
        example_inputs = examples(data["inputs"], f"{path}: ")
    training = data.get("training", model.training)
    if not isinstance(training, bool):
        raise ArtifactError(
            f"{path}: 'training': expected true or false, found {training!r:.60}. Save the network again."
        )
    traced = trace(model if model.training == training else clone(model).train(training), example_inputs)
    _check_nodes(traced, data["freeze"], path)
    names = tuple(data.get("decomposed", ()))
    if not set(names) <= set(candidates(traced)):
        raise ArtifactError(
            f"{path} decomposes convolutions that {type(model).__name__} does not have: "
            f"{sorted(set(names) - set(candidates(traced)))}. Use the model class that was compiled."
        )
    inputs = data["inputs"] or describe_inputs(traced.args, traced.kwargs)
    traced = decompose(traced, names)
    coupling = couple(traced, freeze=data["freeze"])
    slim = rewrite(coupling, plan)
    verification = verify_slim(coupling, plan, slim) if verify else None
    report = make_report(coupling, plan, verification, notes)
    slim.meta[RECORD] = Compiled(report, inputs, data["freeze"], names, training=training)
    if model.training != training:
        slim.train(model.training)
    return slim if data.get("tasks") is None else _of_tasks(slim, data["tasks"], path)


def _of_tasks(slim: fx.GraphModule, tasks: Any, path: Path) -> fx.GraphModule:
    """Select the tasks that a file names."""
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise ArtifactError(f"{path}: 'tasks': expected names of tasks, found {tasks!r:.60}. Save the network again.")
    try:
        return select_tasks(slim, tasks)
    except PlanError as error:
        raise ArtifactError(f"{path} is of some tasks: {error} Use the model class that was compiled.") from error


def _check_nodes(traced: Traced, freeze: Any, path: Path) -> None:
    if not isinstance(freeze, dict) or not all(isinstance(reason, str) for reason in freeze.values()):
        raise ArtifactError(f"{path}: 'freeze': expected node -> reason, found {freeze!r:.60}. Save the network again.")
    missing = sorted(freeze.keys() - {n.name for n in traced.graph.nodes})
    if missing:
        raise ArtifactError(
            f"{path} freezes node {missing[0]!r}, and the graph of {type(traced.model).__name__} has no such node. Use "
            "the model class that was compiled."
        )


def _check_dtypes(slim: nn.Module, path: Path) -> None:
    """Check that the weights of a file have the dtypes of the network, of which nothing is converted silently."""
    state = slim.state_dict()
    with safe_open(str(path), framework="pt") as file:
        for name in sorted(state.keys() & set(file.keys())):  # `load_model` says which are missing or too many
            expected = state[name].dtype
            found = file.get_tensor(name).dtype
            if found != expected:
                call = CASTS.get(found, f"to({found})")
                raise ArtifactError(
                    f"{path}: {name!r}: expected {expected} as in the model, found {found}. Pass `model.{call}`, with "
                    "`example_inputs=` of that dtype."
                )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is damaged: it is not text ({error}). Save the network again.") from error
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}. Pass the folder that `fxprune.save` wrote."
        ) from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{path} breaks off or is damaged ({error}). Save the network again.") from error
    if isinstance(data, dict) and "schema" in data:
        data = {"plan": data, "inputs": None, "freeze": {}}
    if not isinstance(data, dict) or not {"plan", "inputs", "freeze"} <= data.keys():
        raise ArtifactError(f"{path} is not a saved plan. Pass the folder that `fxprune.save` wrote.")
    return data
