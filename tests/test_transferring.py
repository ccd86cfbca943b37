"""Carrying an optimizer over: the momenta are cut like the parameters, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import Chain, Residual, settled
from torch import nn

import fxprune
from fxprune.reporting import report

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 5, (8,), generator=torch.Generator().manual_seed(1))
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3, betas=(0.8, 0.95)),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = F.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(make: Callable[[Any], torch.optim.Optimizer], params: Callable[[nn.Module], Any]) -> tuple[Any, Any, Any]:
    model = settled(Residual())
    optimizer = make(params(model))
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer, fxprune.compile(model, X, fxprune.Budget(macs=0.5), progress=False)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_cut_as_the_parameters_are(name: str) -> None:
    model, optimizer, slim = trained(OPTIMIZERS[name], lambda m: m.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    moved = fxprune.transfer(optimizer, slim)
    plan = report(slim).plan
    assert type(moved) is type(optimizer)
    assert len(moved.state) == len(list(slim.parameters()))
    for (key, dense), thin in zip(model.named_parameters(), slim.parameters(), strict=True):
        assert optimizer.state[dense].keys() == moved.state[thin].keys()
        for entry, value in optimizer.state[dense].items():
            found = moved.state[thin][entry]
            if isinstance(value, torch.Tensor) and value.shape == dense.shape:
                assert torch.equal(found, plan.cut(key, value))
                assert found.shape == thin.shape
            else:
                assert found == value
    rows, columns = plan.kept["a1.weight", 0].tolist(), plan.kept["a1.weight", 1].tolist()
    entry = next(k for k, v in optimizer.state[model.a1.weight].items() if v.shape == model.a1.weight.shape)
    assert torch.equal(moved.state[slim.a1.weight][entry], optimizer.state[model.a1.weight][entry][rows][:, columns])
    untouched = optimizer.state_dict()
    assert untouched["param_groups"] == before["param_groups"]
    assert all(torch.equal(untouched["state"][0][k], before["state"][0][k]) for k in before["state"][0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name: str) -> None:
    _, optimizer, slim = trained(OPTIMIZERS[name], lambda m: m.parameters())
    moved = fxprune.transfer(optimizer, slim)
    losses = [step(slim, moved) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_next_step_uses_the_momenta() -> None:
    _, optimizer, slim = trained(OPTIMIZERS["sgd"], lambda m: m.parameters())
    moved, fresh = copy.deepcopy(slim), copy.deepcopy(slim)
    carried = fxprune.transfer(optimizer, moved)
    start, momentum = moved.a1.weight.detach().clone(), carried.state[moved.a1.weight]["momentum_buffer"].clone()
    step(moved, carried)
    step(fresh, torch.optim.SGD(fresh.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3))
    # one step of SGD: w -= lr * (0.9 * momentum + gradient); without momentum the first part is missing
    torch.testing.assert_close(fresh.a1.weight - moved.a1.weight, 0.01 * 0.9 * momentum, rtol=1e-3, atol=1e-7)
    assert not torch.equal(start, moved.a1.weight)


def test_parameter_groups_and_their_settings_come_along() -> None:
    def groups(model: Any) -> list[dict[str, Any]]:
        head = list(model.head.parameters())
        rest = [p for p in model.parameters() if not any(p is h for h in head)]
        return [{"params": head, "lr": 0.5}, {"params": rest, "weight_decay": 0.25}]

    model, optimizer, slim = trained(OPTIMIZERS["sgd"], groups)
    moved = fxprune.transfer(optimizer, slim, model=model)
    assert [len(g["params"]) for g in moved.param_groups] == [len(g["params"]) for g in optimizer.param_groups]
    assert moved.param_groups[0]["params"][0] is slim.head.weight
    for ours, theirs in zip(moved.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


def test_an_order_that_cannot_be_told_is_refused() -> None:
    model, _, slim = trained(OPTIMIZERS["sgd"], lambda m: m.parameters())
    backwards = OPTIMIZERS["sgd"](list(model.parameters())[::-1])
    with pytest.raises(fxprune.ArtifactError, match=r"'\w+\.\w+': expected .* found .* Pass `model=` too"):
        fxprune.transfer(backwards, slim)
    some = OPTIMIZERS["sgd"](list(model.parameters())[2:])
    with pytest.raises(fxprune.ArtifactError, match=r"the optimizer has 10 parameters, the slim network 12.*`model=`"):
        fxprune.transfer(some, slim)
    assert len(fxprune.transfer(some, slim, model=model).param_groups[0]["params"]) == 10


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, _, slim = trained(OPTIMIZERS["sgd"], lambda m: m.parameters())
    with pytest.raises(fxprune.ArtifactError, match="are not in `model`"):
        fxprune.transfer(OPTIMIZERS["sgd"](Chain().parameters()), slim, model=model)


def test_a_module_from_elsewhere_is_refused() -> None:
    model = Chain()
    with pytest.raises(fxprune.FxPruneError, match="carries no record"):
        fxprune.transfer(OPTIMIZERS["sgd"](model.parameters()), model)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda params: torch.optim.Adafactor(params, lr=1e-3), r"Adafactor keeps '\w+' of '\w+\.\w+' as a tensor"),
        (lambda params: torch.optim.LBFGS(params, max_iter=2), r"LBFGS keeps '\w+' of 'stem\.weight' as a "),
    ],
)
def test_state_that_is_not_shaped_like_a_parameter_is_refused(make: Any, words: str) -> None:
    model = settled(Residual())
    optimizer = make(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    slim = fxprune.compile(model, X, fxprune.Budget(macs=0.5), progress=False)
    with pytest.raises(fxprune.ArtifactError, match=words + r".*expected the parameter's shape.*slim\.parameters\(\)"):
        fxprune.transfer(optimizer, slim)
