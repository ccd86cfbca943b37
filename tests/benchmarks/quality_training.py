"""Training, testing and refreshing networks of the quality benchmark; trained weights are kept in a folder."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from quality_data import Batch, Splits, Table
from quality_problems import Problem
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

Scores = dict[str, float]
MADE_BY = ("quality_data.py", "quality_cifar.py", "quality_networks.py", "quality_problems.py", "quality_training.py")


def fit(network: nn.Module, table: Table, problem: Problem, *, epochs: int, learning_rate: float, seed: int) -> None:
    """Train a network in place on the sum of its losses, with AdamW and a one-cycle schedule; leave it in eval mode."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = problem.recipe.batch_size
    steps = epochs * -(-len(table) // size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    network.train()
    for epoch in range(epochs):
        for batch in table.batches(size, shuffle_seed=seed * 1_000 + epoch):
            loss = problem.loss(network(batch[0]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    optimizer.zero_grad()


@torch.no_grad()
def test(network: nn.Module, table: Table, problem: Problem) -> Scores:
    """Return every task's metric in eval mode."""
    network.eval()
    answers: list[Any] = [network(inputs) for inputs, _ in table.batches(250)]
    outputs = pytree.tree_map(lambda *parts: torch.cat(parts), *answers)
    return {task: metric(outputs, table.targets) for task, (_, metric) in problem.metrics.items()}


@torch.no_grad()
def refresh(network: nn.Module, batches: Iterable[Batch]) -> None:
    """Estimate the statistics of all batch norms anew from some batches, in place; the same for every network."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for inputs, _ in batches:
        network(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


@torch.no_grad()
def macs_of(network: nn.Module, inputs: torch.Tensor) -> int:
    """Count the multiply-accumulates of one forward pass with torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        network.eval()(inputs)
    return counter.get_total_flops() // 2


def params_of(network: nn.Module) -> int:
    """Count the elements of all parameters."""
    return sum(p.numel() for p in network.parameters())


def trained(problem: Problem, splits: Splits, seed: int, cache: Path) -> tuple[nn.Module, float]:
    """Return the trained network and the seconds that its training took; read them from a folder if they are there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = problem.build()
    path = cache / f"{problem.name}_{seed}_{_key(problem, splits)}.pt"
    if path.is_file():
        found = torch.load(path, weights_only=True)
        network.load_state_dict(found["state"])
        return network.eval(), found["seconds"]
    start = time.perf_counter()
    recipe = problem.recipe
    fit(network, splits.train, problem, epochs=recipe.epochs, learning_rate=recipe.learning_rate, seed=seed)
    seconds = time.perf_counter() - start
    cache.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save({"state": network.state_dict(), "seconds": seconds}, part)
    part.replace(path)  # whole, or not there
    return network, seconds


def _key(problem: Problem, splits: Splits) -> str:
    """Return a hash of what a training depends on: the recipe, the data, and the files that define them."""
    found = hashlib.sha256(repr(problem.recipe).encode())
    found.update(splits.train.inputs.numpy().tobytes())
    for name in MADE_BY:
        found.update(Path(__file__).with_name(name).read_bytes())
    return found.hexdigest()[:12]
