"""The theorem on random networks: the slim network computes what the masked original does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import OPS
from plans import cut, random_keep
from random_checks import TOLERANCE, assert_close, compare_on, compiled, tensors, trains_like, unreported
from strategies import Network, build, example_inputs, networks, random_network

import fxprune
from fxprune.planning import plan_of

ROUNDED = {"multihead", "multihead_cross", "encoder_layer", "decoder_layer"}  # torch takes a fast path of its own here
BLOCKS = [range(first, first + 50) for first in range(0, 200, 50)]


def check_theorem(network: Network, seed: int) -> None:
    """Cut a network by a random plan; compare on the example inputs and on inputs of another batch size."""
    model = build(network)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    coupling, plan, slim = cut(model, example_inputs(network), seed)
    assert coupling.traced.frontend == "symbolic_trace"
    assert fxprune.verify(coupling, plan, slim).worst <= TOLERANCE
    assert plan.costs.after.params == sum(p.numel() for p in slim.parameters()) <= plan.costs.before.params
    assert not unreported(coupling)
    compare_on(network, model, plan, slim, batch=3)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@given(network=networks(), seed=st.integers(0, 1000))
@settings(max_examples=80)
def test_drawn_networks_satisfy_the_theorem(network: Network, seed: int) -> None:
    check_theorem(network, seed)


@pytest.mark.parametrize("seeds", BLOCKS, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_seeded_networks_satisfy_the_theorem(seeds: range) -> None:
    failed = {}
    for seed in seeds:
        try:
            check_theorem(random_network(seed), seed)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    assert not failed, "replay with `python tests/strategies.py SEED`:\n" + "\n".join(
        f"{k}: {v}" for k, v in failed.items()
    )


@pytest.mark.parametrize("seed", range(400, 408))
def test_networks_meet_random_budgets_and_train(seed: int) -> None:
    network = random_network(seed)
    model, inputs = build(network), example_inputs(network)
    assert compiled(model, inputs, seed) in ("met", "out of reach")
    _, _, slim = cut(model, inputs, seed)
    trains_like(model, slim, inputs)


def test_every_kind_of_op_is_drawn() -> None:
    drawn = {step.op for seed in range(1500) for step in random_network(seed).steps}
    assert drawn == {*OPS, "again"}


@pytest.mark.parametrize("seeds", [range(200, 230)], ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_most_random_plans_remove_something(seeds: range) -> None:
    smaller = 0
    for seed in seeds:
        network = random_network(seed)
        coupling = fxprune.couple(fxprune.trace(build(network), example_inputs(network)))
        smaller += not random_keep(coupling, seed).all()
    assert smaller >= len(seeds) * 0.8


@given(network=networks())
@example(network=random_network(3))
@settings(max_examples=30)
def test_keeping_all_is_the_identity(network: Network) -> None:
    rounded = not ROUNDED.isdisjoint(step.op for step in network.steps)
    dtype = torch.float64 if rounded else torch.float32
    model, inputs = build(network, dtype=dtype), example_inputs(network, dtype=dtype)
    _, plan, slim = cut(model, inputs, None)
    ours, theirs = slim.state_dict(), model.state_dict()
    assert ours.keys() <= theirs.keys()
    assert dict(slim.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert plan.costs.before == plan.costs.after
    with torch.no_grad():
        found, expected = tensors(slim(*copy.deepcopy(inputs))), tensors(model(*copy.deepcopy(inputs)))
    if rounded:
        assert_close(found, expected)
        return
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "seeds", [range(300, 320), range(320, 340)], ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}"
)
def test_pruning_twice_is_pruning_once_with_the_composed_plan(seeds: range) -> None:
    twice = 0
    for seed in seeds:
        network = random_network(seed)
        model, inputs = build(network), example_inputs(network)
        coupling, first, slim = cut(model, inputs, seed)
        again, second, slimmer = cut(slim, inputs, seed + 1)
        fxprune.verify(again, second, slimmer)
        composed = compose(coupling, first, second)
        if coupling.violation(composed) is not None:
            continue  # the slim network has fewer rows left to balance, so it may allow more than the dense one
        once = fxprune.rewrite(coupling, plan_of(coupling, composed))
        ours, theirs = slimmer.state_dict(), once.state_dict()
        left_out = theirs.keys() - ours.keys()  # tables of positions that became literals in the first cut
        assert not any(theirs[name].is_floating_point() for name in left_out)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), seed
        with torch.no_grad():
            assert_close(slimmer(*copy.deepcopy(inputs)), once(*copy.deepcopy(inputs)))
        twice += first.costs.after.params > second.costs.after.params
    assert twice >= len(seeds) / 4


def compose(coupling: fxprune.Coupling, first: fxprune.Plan, second: fxprune.Plan) -> np.ndarray:
    """Return the channels of the dense network that two plans, one after the other, keep."""
    keep = np.ones(coupling.num_channels + 1, dtype=bool)
    labelled = coupling.tensors
    for name, (shape, labels) in labelled.items():
        position = np.arange(np.prod(shape)).reshape(shape)
        left = _apply(second, name, _apply(first, name, position))
        for dim, ids in enumerate(labels):
            if ids is None:
                continue
            stays = np.isin(position, left)
            others = tuple(d for d in range(len(shape)) if ids.shape[d] == 1)
            if ids.size != shape[dim]:  # a row of its own: what counts is whether anything of it stays
                keep[ids[~stays.any(axis=others, keepdims=True) & _row_stays(stays, ids, dim)]] = False
            else:
                keep[ids[~stays.any(axis=others, keepdims=True)]] = False
    keep[-1] = True
    return coupling.settle(keep[:-1])


def _apply(plan: fxprune.Plan, name: str, position: np.ndarray) -> np.ndarray:
    return plan.cut(name, torch.from_numpy(position)).numpy()


def _row_stays(stays: np.ndarray, ids: np.ndarray, dim: int) -> np.ndarray:
    """Say, at each of the labels, whether anything of its row stays."""
    others = tuple(d for d in range(stays.ndim) if ids.shape[d] == 1)
    return np.broadcast_to(stays.any(axis=(*others, dim), keepdims=True), ids.shape)
