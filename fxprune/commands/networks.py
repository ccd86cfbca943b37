"""What commands are given, as names and files: networks, data, example inputs, weights."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fxprune.errors import ArtifactError, FxPruneError
from fxprune.saving import example
from fxprune.tasks import Task

SHOWN = 3
"""Names in an error message."""


def load_network(name: str) -> nn.Module:
    """Return the network that `MODULE:FACTORY` names; modules of the current directory can be imported.

    Raises:
        FxPruneError: there is no such module or factory, it fails, or it gives something else than a network.
    """
    network = _made(name, "the network", nn.Module, "torchvision.models:resnet18")
    if not isinstance(network, nn.Module):
        hint = "Name a function that returns the network."
        raise FxPruneError(f"{name} gives {type(network).__name__!r}, not a torch.nn.Module. {hint}")
    return network


def load_batches(name: str) -> list[Any]:
    """Return the batches that `MODULE:FACTORY` names.

    Raises:
        FxPruneError: as of `load_network`, or it gives no batches.
    """
    found = _made(name, "the batches", (list, tuple), "my_package.data:batches")
    batches = list(found) if isinstance(found, Iterable) else []
    if not batches or isinstance(found, (torch.Tensor, str, Mapping)):
        hint = "Name a function that returns batches `(inputs, targets)`, in a list or a DataLoader."
        raise FxPruneError(f"{name} gives {type(found).__name__!r} with no batches in it. {hint}")
    return batches


def load_tasks(name: str) -> Mapping[str, Task]:
    """Return the tasks that `MODULE:FACTORY` names.

    Raises:
        FxPruneError: as of `load_network`, or it gives no tasks.
    """
    tasks = _made(name, "the tasks", Mapping, "my_package.data:tasks")
    if not isinstance(tasks, Mapping) or not all(isinstance(task, Task) for task in tasks.values()):
        hint = "Name a function that returns a dict of name -> `fxprune.Task(loss)`."
        raise FxPruneError(f"{name} gives {type(tasks).__name__!r}, not tasks by their names. {hint}")
    return tasks


def _made(name: str, what: str, ready: type | tuple[type, ...], sample: str) -> Any:
    """Return what a name stands for if it is `ready`, else what it returns when called without arguments."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise FxPruneError(f"{name!r} is not MODULE:FACTORY. Write, for example, `{sample}`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        hint = "Install it, or run from the folder that holds it."
        raise FxPruneError(f"cannot import {module_name!r} ({type(error).__name__}: {error}). {hint}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            message = f"{module_name!r} has no {path!r}. Name a function, class or object that it defines."
            raise FxPruneError(message)
        found = getattr(found, part)
    try:
        return found if isinstance(found, ready) else found()
    except Exception as error:  # whatever the user's factory raises
        hint = f"Name a function that takes no arguments and returns {what}."
        raise FxPruneError(f"{name} cannot be called ({type(error).__name__}: {error}). {hint}") from error


def parse_input(text: str) -> torch.Tensor:
    """Return an example input of the shape and dtype that `SHAPE[:DTYPE]` says: noise, or zeros of whole numbers.

    Raises:
        FxPruneError: not comma-separated positive whole numbers, or no dtype of torch.
    """
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise FxPruneError(f"--input {text}: torch has no dtype {name!r}. Write, for example, `--input 2,16:int64`.")
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in shape.split(",")]
    if min(sizes) < 1:
        rule = "a shape is positive whole numbers with commas between"
        raise FxPruneError(f"--input {text}: {rule}. Write, for example, `--input 1,3,224,224`.")
    return example(sizes, dtype)


def fill(network: nn.Module, path: Path) -> None:
    """Load the weights in a file into a network.

    Args:
        network: gets the weights.
        path: `.safetensors`, or what `torch.save(model.state_dict(), path)` wrote; read without running any code.

    Raises:
        ArtifactError: the file cannot be read, or is of another network: which parameter, expected and found.
    """
    state = _read(path)
    expected = network.state_dict()
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has", state.keys() - expected.keys())):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN]) + (", .." if len(names) > SHOWN else "")
            which = "that the network has" if problem == "lacks" else "that the network does not have"
            raise ArtifactError(
                f"{path} {problem} {len(names)} tensors {which}: {shown}. Pass the weights of this network, as "
                "`torch.save(model.state_dict(), path)` writes them."
            )
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ArtifactError(
                f"{path}: {name!r}: expected shape {tuple(expected[name].shape)}, found {tuple(value.shape)}. Pass the "
                "weights of the dense network."
            )
    network.load_state_dict(state)


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a file by their names."""
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}. Pass a file with the weights of the network."
        ) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ArtifactError(
            f"{path} holds no weights that can be read without running code ({type(error).__name__}). Pass a "
            "`.safetensors` file, or what `torch.save(model.state_dict(), path)` wrote."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = f"a dict of {', '.join(map(repr, list(state)[:SHOWN]))}" if isinstance(state, dict) else type(state)
        raise ArtifactError(f"{path} holds {found}, not weights by their names. Save `model.state_dict()` alone.")
    return state
