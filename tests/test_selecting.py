"""The network of some tasks: the same outputs to the bit, and nothing left that they do not need."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from plans import random_plan
from small import Heads, Multitask, settled, slim_multitask
from strategies import Network, build, example_inputs, networks
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxprune
from fxprune import ArtifactError, Budget, PlanError, TraceError
from fxprune.outputs import outputs_of, parts_of, returned

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def named(value: Any) -> dict[str, Tensor]:
    """Outputs by name."""
    if isinstance(value, Tensor):
        return {"": value}
    found = {}
    for key, part in (parts_of(value) or {}).items():
        found |= {f"{key}.{name}".rstrip("."): t for name, t in named(part).items()}
    return found


def run(module: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    return named(module(*(x.clone() for x in inputs)))


def with_gradients(module: nn.Module, inputs: Iterable[Tensor], tasks: Iterable[str]) -> set[str]:
    """Names of the parameters that some outputs have a gradient for."""
    module.zero_grad()
    outputs = run(module, inputs)
    losses = [outputs[task].square().mean() for task in tasks if outputs[task].requires_grad]
    if losses:
        torch.stack(losses).sum().backward()
    return {name for name, p in module.named_parameters() if p.grad is not None}


def check_combination(model: nn.Module, whole: fx.GraphModule, inputs: tuple[Tensor, ...], tasks: tuple) -> None:
    """Compare a selection with the whole, bit by bit; what is left of it must have a gradient, in the model too."""
    some = fxprune.select_tasks(whole, tasks)
    some.graph.lint()
    with torch.no_grad():
        found, expected = run(some, inputs), run(whole, inputs)
    assert found.keys() == set(tasks)
    for task in tasks:
        assert torch.equal(found[task].nan_to_num(), expected[task].nan_to_num())
    left = {name: p.shape for name, p in some.named_parameters()}
    assert left.items() <= {name: p.shape for name, p in whole.named_parameters()}.items()
    assert with_gradients(some, inputs, tasks) == set(left) == with_gradients(model, inputs, tasks)


def several(network: Network) -> bool:
    return len(network.outputs) > 1


@given(network=networks().filter(several))
@settings(max_examples=10)
def test_selections_of_random_networks_are_bit_identical_and_minimal(network: Network) -> None:
    model, inputs = build(network), example_inputs(network)
    traced = fxprune.trace(model, inputs)
    whole = traced.module
    names = [".".join(path) for path in outputs_of(returned(traced.graph))]
    for count in range(1, len(names) + 1):
        for tasks in itertools.islice(itertools.combinations(names, count), 4):
            check_combination(model, whole, inputs, tasks)


@given(network=networks().filter(several))
@settings(max_examples=8)
def test_selections_of_random_slim_networks_are_bit_identical(network: Network) -> None:
    model, inputs = build(network), example_inputs(network)
    coupling = fxprune.couple(fxprune.trace(model, inputs))
    try:
        slim = fxprune.rewrite(coupling, random_plan(coupling, 0))
    except fxprune.RewriteError:
        return
    names = [".".join(path) for path in outputs_of(returned(slim.graph))]
    for name in names:
        some = fxprune.select_tasks(slim, [name])
        with torch.no_grad():
            assert torch.equal(run(some, inputs)[name].nan_to_num(), run(slim, inputs)[name].nan_to_num())
        assert dict(some.named_parameters()).keys() == with_gradients(slim, inputs, [name])


class Pair(NamedTuple):
    """A named tuple of outputs."""

    seg: Tensor
    depth: Tensor


@dataclass
class Nested:
    """A dataclass that holds another one and a list."""

    heads: Heads
    extra: list[Tensor]


FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], list[str]]] = {
    "dict": (lambda a, b, c: {"a": a, "b": b, "c": c}, ["a", "b", "c"]),
    "numbered": (lambda a, b, c: {1: a, 2: b, 3: c}, ["1", "2", "3"]),
    "tuple": (lambda a, b, c: (a, b, c), ["0", "1", "2"]),
    "list": (lambda a, b, c: [a, b, c], ["0", "1", "2"]),
    "named tuple": (lambda a, b, c: (Pair(a, b), c), ["0.0", "0.1", "1"]),
    "dataclass": (lambda a, b, c: Nested(Heads(a, b), [c]), ["heads.labels", "heads.depth", "extra.0"]),
    "nested": (lambda a, b, c: {"out": (a, {"x": b}), "scale": 3, "aux": [None, c]}, ["out.0", "out.1.x", "aux.1"]),
}


class Formed(nn.Module):
    """Three heads, in a container of any form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.trunk = nn.Linear(4, 4)
        self.one, self.two, self.three = (nn.Linear(4, n) for n in (1, 2, 3))

    def forward(self, x: Tensor, unused: Tensor | None = None) -> Any:
        x = self.trunk(x).relu()
        return FORMS[self.form][0](self.one(x), self.two(x), self.three(x))


@pytest.mark.parametrize("form", FORMS)
def test_containers_keep_their_form_and_outputs_their_names(form: str) -> None:
    model, x = Formed(form), torch.randn(2, 4)
    traced = fxprune.trace(model, x)
    expected, names = named(model(x)), FORMS[form][1]
    assert list(expected) == names
    for count in (1, 2, 3):
        for tasks in itertools.combinations(names, count):
            some = fxprune.select_tasks(traced, tasks)
            value = some(x)
            assert type(value) is type(model(x))
            found = named(value)
            assert list(found) == list(tasks)
            assert all(torch.equal(found[task], expected[task]) for task in tasks)
            left = {name.partition(".")[0] for name, _ in some.named_parameters()}
            heads = ("one", "two", "three")
            assert left == {"trunk", *(heads[names.index(task)] for task in tasks)}
            again = fxprune.select_tasks(some, tasks[:1]) if count > 1 else some
            assert list(named(again(x))) == [tasks[0]]


def test_containers_are_selected_as_a_whole_and_positions_may_be_numbers() -> None:
    x = torch.randn(2, 4)
    nested = fxprune.trace(Formed("nested"), x)
    assert fxprune.select_tasks(nested, ["out"])(x).keys() == {"out"}
    assert list(named(fxprune.select_tasks(nested, ["out", "aux.1"])(x))) == ["out.0", "out.1.x", "aux.1"]
    assert fxprune.select_tasks(fxprune.trace(Formed("tuple"), x), [1])(x)[::2] == (None, None)
    part = fxprune.select_tasks(fxprune.trace(Formed("dataclass"), x), ["heads.depth"])(x)
    assert part.heads.labels is None
    assert part.extra is None


def test_the_signature_stays_and_so_do_inputs_that_become_unused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
            return {"a": self.a(x) * scale, "b": self.b(y)}

    x, y = torch.randn(2, 4), torch.randn(2, 3)
    whole = fxprune.trace(Two(), (x, y)).module
    some = fxprune.select_tasks(whole, ["b"])
    assert inspect.signature(some.forward).parameters == inspect.signature(whole.forward).parameters
    assert torch.equal(some(x, y=y)["b"], whole(x, y)["b"])
    assert [name for name, _ in some.named_parameters()] == ["b.weight", "b.bias"]
    with pytest.raises(ValueError, match="argument 'scale' was fixed"):
        some(x, y, scale=3.0)


@pytest.mark.parametrize("form", ["dict", "nested"])
def test_exported_networks_are_selected_from(form: str) -> None:
    model, x = Formed(form).eval(), torch.randn(2, 4)
    exported = torch.export.export(model, (x,)).module()
    assert isinstance(exported, fx.GraphModule)
    expected = named(model(x))
    for task in FORMS[form][1]:
        some = fxprune.select_tasks(exported, [task])
        found = named(some(x))
        assert list(found) == [task]
        assert torch.equal(found[task], expected[task])
        assert sum(p.numel() for p in some.parameters()) < sum(p.numel() for p in model.parameters())


# in-place ops


class InPlace(nn.Module):
    """Two heads that share a trunk, of which the second writes in some way to what the first reads."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any], after: bool = True) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)
        self.write, self.after = write, after

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        t = self.trunk(x)
        first = None if self.after else self.a(t)
        made = self.b(x)
        b = self.write(t, made)
        return {"a": self.a(t) if self.after else first, "b": made.sum(1) if b is None else b}


def set_item(t: Tensor, made: Tensor) -> None:
    t[:, 1] = made[:, 0]


WRITES = {
    "method": lambda t, made: t.relu_(),
    "function": lambda t, made: F.relu(t, True),
    "keyword": lambda t, made: F.relu(t, inplace=True),
    "of a view": lambda t, made: t.view(-1)[1:5].add_(1),
    "of a transpose": lambda t, made: t.T.mul_(made.T),
    "of a diagonal": lambda t, made: t.diagonal().zero_(),
    "of a dropout in eval mode": lambda t, made: F.dropout(t, training=False).mul_(2),
    "of a chunk": lambda t, made: t.chunk(2, 1)[1].mul_(2),
    "item": set_item,
    "out": lambda t, made: torch.mul(made, 2, out=t),
    "result used": lambda t, made: t.add_(made) + 1,
}


@pytest.mark.parametrize("way", WRITES)
def test_writes_to_what_a_task_reads_later_stay(way: str) -> None:
    model, x = InPlace(WRITES[way]).eval(), torch.randn(3, 4)
    with torch.no_grad():
        whole = fxprune.trace(model, x).module
        assert not torch.equal(model.a(model.trunk(x)), model(x)["a"])
        some = fxprune.select_tasks(whole, ["a"])
        assert torch.equal(some(x)["a"], model(x)["a"])
    assert ("b.weight" in dict(some.named_parameters())) == (way in ("of a transpose", "item", "out", "result used"))


@pytest.mark.parametrize("way", WRITES)
def test_writes_to_what_no_task_reads_later_go(way: str) -> None:
    model, x = InPlace(WRITES[way], after=False).eval(), torch.randn(3, 4)
    with torch.no_grad():
        some = fxprune.select_tasks(fxprune.trace(model, x), ["a"])
        assert torch.equal(some(x)["a"], model(x)["a"])
    assert {n.op for n in some.graph.nodes} == {"placeholder", "call_module", "output"}
    assert {name.partition(".")[0] for name, _ in some.named_parameters()} == {"trunk", "a"}


class Remembering(nn.Module):
    """The second head writes to a buffer, after the first has read it, or of its own."""

    memory: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("memory", torch.ones(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.a(x) * self.memory
        b = self.b(x)
        self.memory.mul_(0.5).add_(b.mean(0))
        self.count.add_(1)
        return {"a": a, "b": b, "c": b * self.count}


def test_writes_to_buffers_that_a_task_reads_stay_for_its_next_call() -> None:
    x = torch.randn(3, 4)
    whole = fx.symbolic_trace(Remembering())
    some, other = fxprune.select_tasks(whole, ["a"]), fxprune.select_tasks(whole, ["b"])
    assert dict(some.named_buffers()).keys() == {"memory"}
    assert not dict(other.named_buffers())
    with torch.no_grad():
        for _ in range(3):
            expected = whole(x)
            assert torch.equal(some(x)["a"], expected["a"])
            assert torch.equal(other(x)["b"], expected["b"])
    assert torch.equal(some.memory, whole.memory)


def test_checks_stay_where_what_they_look_at_does() -> None:
    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            torch._assert(x.shape[0] > 1, "one row")
            b = self.b(x)
            torch._assert(b.shape[0] != 7, "seven rows")
            return {"a": self.a(self.trunk(x)), "b": b}

    whole = fx.symbolic_trace(Checked())
    some = fxprune.select_tasks(whole, ["a"])
    with pytest.raises(AssertionError, match="one row"):
        some(torch.randn(1, 4))
    assert some(torch.randn(7, 4))["a"].shape == (7, 2)
    with pytest.raises(AssertionError, match="seven rows"):
        fxprune.select_tasks(whole, ["b"])(torch.randn(7, 4))


# what a selection is


def test_a_selection_trains_and_leaves_the_whole_alone() -> None:
    whole = slim_multitask(X).train()
    before = copy.deepcopy(whole.state_dict())
    some = fxprune.select_tasks(whole, ["depth"])
    assert some.training
    assert all(m.training for m in some.modules())
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (some(X)["depth"] - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert some.get_buffer("trunk.1.num_batches_tracked") == 5
    assert all(torch.equal(before[name], t) for name, t in whole.state_dict().items())


def test_statistics_of_batch_norms_go_on_as_in_the_whole() -> None:
    whole = slim_multitask(X).train()
    some = fxprune.select_tasks(whole, ["present"])
    for _ in range(2):
        assert torch.equal(whole(X)["present"], some(X)["present"])
    mine = some.state_dict()
    assert mine.keys() < whole.state_dict().keys()
    assert any(name.endswith("running_mean") for name in mine)
    assert all(torch.equal(t, mine[name]) for name, t in whole.state_dict().items() if name in mine)


def test_a_selection_draws_random_numbers_only_for_what_is_left() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            b = self.drop(self.b(x))
            return self.drop(self.a(x)), b

    model, x = Dropping(), torch.randn(8, 4)
    some = fxprune.select_tasks(fxprune.trace(model, x), [0])
    torch.manual_seed(3)
    found = some(x)[0]
    torch.manual_seed(3)
    assert torch.equal(found, model.drop(model.a(x)))
    assert torch.equal(some.eval()(x)[0], model.eval()(x)[0])


def test_shared_selections_hold_the_tensors_of_the_whole() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.trunk(x)
            return {"a": self.rnn(x)[0], "b": self.head(x)}

    whole = fxprune.trace(Recurrent(), torch.randn(2, 3, 4)).module
    for tasks in (["a"], ["b"]):
        some = fxprune.select_tasks(whole, tasks, share=True)
        mine = dict(whole.named_parameters())
        assert all(p is mine[name] for name, p in some.named_parameters())
        apart = fxprune.select_tasks(whole, tasks)
        pointers = {p.data_ptr() for p in whole.parameters()}
        assert not any(p.data_ptr() in pointers for p in apart.parameters())


def test_tied_weights_stay_tied_and_frozen_ones_frozen() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))
            self.second.weight = self.third.weight = self.first.weight
            self.trunk = nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.trunk(x)
            return {"a": self.first(x), "b": self.third(self.second(x))}

    model, x = Tied(), torch.randn(2, 4)
    some = fxprune.select_tasks(fxprune.trace(model, x), ["b"])
    assert dict(some.named_modules()).keys() == {"", "trunk", "second", "third"}
    assert some.get_parameter("second.weight") is some.get_parameter("third.weight")
    assert not some.get_parameter("trunk.weight").requires_grad
    assert torch.equal(some(x)["b"], model(x)["b"])


def test_selections_copy_pickle_export_and_compile_again() -> None:
    some = fxprune.select_tasks(slim_multitask(X), ["seg", "present"])
    expected = some(X)
    pruned = fxprune.compile(some, X, Budget(macs=0.7), progress=False)
    assert pruned(X).keys() == expected.keys()
    exported = torch.export.export(some.eval(), (X,)).module()
    for twin in (copy.deepcopy(some), pickle.loads(pickle.dumps(some)), exported):
        found = twin(X)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[task], expected[task], atol=1e-6) for task in expected)


# the record


def test_selections_are_saved_and_loaded(tmp_path: Path) -> None:
    whole = slim_multitask(X)
    some = fxprune.select_tasks(fxprune.select_tasks(whole, ["seg", "depth"]), ["depth"])
    notes = fxprune.report(some).notes
    assert [note for note in notes if "of the tasks depth;" in note] == list(notes)
    assert fxprune.report(whole).notes == ()
    fxprune.save(some, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["tasks"] == ["depth"]
    loaded = fxprune.load(tmp_path, Multitask(8)).eval()
    assert loaded.state_dict().keys() == some.state_dict().keys()
    assert torch.equal(loaded(X)["depth"], whole(X)["depth"])
    assert "of the tasks depth;" in str(fxprune.report(loaded))
    fxprune.save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "plan.json").read_text())["tasks"] == ["depth"]


def test_what_is_saved_without_tasks_is_the_whole(tmp_path: Path) -> None:
    whole = slim_multitask(X)
    fxprune.save(whole, tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data.pop("tasks") is None
    (tmp_path / "plan.json").write_text(json.dumps(data))  # as older versions wrote it
    assert fxprune.load(tmp_path, Multitask(8))(X).keys() == whole(X).keys()


@pytest.mark.parametrize(("tasks", "message"), [(["ghost"], "of some tasks: .*no task 'ghost'"), (3, "'tasks': exp")])
def test_damaged_tasks_are_refused(tmp_path: Path, tasks: Any, message: str) -> None:
    fxprune.save(slim_multitask(X), tmp_path)
    data = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(data | {"tasks": tasks}))
    with pytest.raises(ArtifactError, match=message):
        fxprune.load(tmp_path, Multitask(8))


def test_an_optimizer_is_transferred_to_a_selection() -> None:
    model = settled(Multitask(8))
    optimizer = torch.optim.Adam(model.parameters())
    sum(t.square().mean() for t in model(X).values()).backward()
    optimizer.step()
    some = fxprune.select_tasks(fxprune.compile(model, X, Budget(macs=0.6), progress=False), ["seg"])
    found = fxprune.transfer(optimizer, some, model=model)
    assert [id(p) for group in found.param_groups for p in group["params"]] == [id(p) for p in some.parameters()]
    assert all(found.state[p]["exp_avg"].shape == p.shape for p in some.parameters())


# errors


def test_wrong_requests_say_what_is_wrong() -> None:
    x = torch.randn(2, 4)
    traced = fxprune.trace(Formed("nested"), x)
    with pytest.raises(PlanError, match=r"no task 'depth'\. Its outputs are 'out\.0', 'out\.1\.x', 'aux\.1'"):
        fxprune.select_tasks(traced, ["depth"])
    with pytest.raises(PlanError, match=r"the tasks are 'out'. Pass a list of names: `\['out'\]`"):
        fxprune.select_tasks(traced, "out")
    with pytest.raises(PlanError, match="no task was asked for"):
        fxprune.select_tasks(traced, [])
    with pytest.raises(PlanError, match="one output only"):
        fxprune.select_tasks(fxprune.trace(nn.Linear(4, 2), x), ["0"])
    with pytest.raises(TraceError, match="this Formed is no graph"):
        fxprune.select_tasks(Formed("dict"), ["a"])
