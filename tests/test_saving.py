"""Saving: a folder without pickle, a plan that fits other checkpoints, and errors that name what does not fit."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import Chain, Residual, settled
from torch import Tensor, nn

import fxprune
from fxprune import ArtifactError, Budget, Plan
from fxprune.reporting import report

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def slimmed(model: nn.Module, inputs: Any = X) -> Any:
    return fxprune.compile(model, inputs, Budget(macs=0.5), progress=False)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    slim = slimmed(settled(Residual()))
    fxprune.save(slim, tmp_path / "slim")
    return slim, tmp_path / "slim"


def test_what_was_saved_is_what_is_loaded(saved: tuple[Any, Path]) -> None:
    slim, folder = saved
    torch.manual_seed(7)
    fresh = Residual().eval()
    before = {name: t.clone() for name, t in fresh.state_dict().items()}
    loaded = fxprune.load(folder, fresh)
    assert torch.equal(loaded(X), slim(X))
    assert all(torch.equal(t, slim.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert list(loaded.state_dict()) == list(slim.state_dict())
    assert all(torch.equal(before[name], t) for name, t in fresh.state_dict().items())
    assert fxprune.report(loaded).costs == fxprune.report(slim).costs


def test_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    slim = slimmed(settled(Residual()))
    with torch.no_grad():
        for p in slim.parameters():
            p.mul_(1.5)
    fxprune.save(slim, tmp_path / "slim")
    assert torch.equal(fxprune.load(tmp_path / "slim", Residual().eval())(X), slim(X))


class TwoPaths(nn.Module):
    """Train mode has a head more, and takes no single image: its statistics are of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pooled = nn.Conv2d(3, 16, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(16))
        self.b, self.aux = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        x = x * self.pooled(x)
        return (self.b(x), self.aux(x)) if self.training else self.b(x)


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_in_the_other_mode_follows_the_path_that_was_saved(mode: bool, tmp_path: Path) -> None:
    x = torch.randn(1 + mode, 3, 8, 8)
    slim = fxprune.compile(settled(TwoPaths()).train(mode), x, Budget(macs=0.5), progress=False)
    fxprune.save(slim, tmp_path)
    loaded = fxprune.load(tmp_path, TwoPaths().train(not mode))
    assert all(m.training is not mode for m in loaded.modules())
    fxprune.save(loaded, tmp_path)
    again = fxprune.load(tmp_path, TwoPaths().train(not mode))
    for found, expected in zip(again.eval()(x), slim.eval()(x), strict=True):
        assert torch.equal(found, expected)


def test_the_order_of_channels_in_memory_comes_back(tmp_path: Path) -> None:
    slim = slimmed(settled(Residual())).to(memory_format=torch.channels_last)
    fxprune.save(slim, tmp_path / "slim")
    loaded = fxprune.load(tmp_path / "slim", Residual().eval())
    strides = {name: t.stride() for name, t in slim.state_dict().items()}
    assert any(not t.is_contiguous() for t in slim.state_dict().values())
    assert {name: t.stride() for name, t in loaded.state_dict().items()} == strides
    assert torch.equal(loaded(X), slim(X))


def test_a_loaded_network_can_be_saved_again(saved: tuple[Any, Path], tmp_path: Path) -> None:
    slim, folder = saved
    fxprune.save(fxprune.load(folder, Residual().eval()), str(tmp_path / "again"))
    assert torch.equal(fxprune.load(str(tmp_path / "again"), Residual().eval())(X), slim(X))


def test_the_folder_holds_json_and_safetensors_only(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "weights.safetensors"]
    assert json.loads((folder / "plan.json").read_text())["plan"]["schema"] == 1
    header = (folder / "weights.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert "stem.weight" in json.loads(header[8 : 8 + size])
    for path in folder.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # neither a pickle nor torch's zip of one


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.hidden = nn.Linear(12, 12)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: float = 2.0) -> Tensor:
        return self.out(F.relu(self.hidden(self.embed(tokens)))) * scale


@pytest.mark.parametrize(
    "inputs", [torch.arange(6).reshape(2, 3), {"tokens": torch.arange(6).reshape(2, 3), "scale": 3.0}]
)
def test_tied_weights_and_other_inputs_come_back(inputs: Any, tmp_path: Path) -> None:
    slim = slimmed(Tied(), inputs)
    fxprune.save(slim, tmp_path)
    loaded = fxprune.load(tmp_path, Tied())
    assert loaded.embed.weight is loaded.out.weight
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    assert torch.equal(loaded(*args, **kwargs), slim(*args, **kwargs))


def test_a_plan_survives_json() -> None:
    plan = report(slimmed(settled(Residual()))).plan
    again = Plan.from_json(plan.to_json())
    assert again.kept.keys() == plan.kept.keys()
    assert all(np.array_equal(again.kept[key], kept) for key, kept in plan.kept.items())
    assert any(kept.ndim == 2 for kept in again.kept.values())  # the grouped convolution
    assert not any(kept.flags.writeable for kept in again.kept.values())
    for name in ("sizes", "costs", "groups", "method", "budget", "fingerprint"):
        assert getattr(again, name) == getattr(plan, name)
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


def test_a_plan_cuts_another_checkpoint_of_the_class() -> None:
    plan = Plan.from_json(report(slimmed(settled(Residual()))).plan.to_json())
    torch.manual_seed(99)
    other = settled(Residual())
    coupling = fxprune.couple(fxprune.trace(other, X))
    assert coupling.fingerprint == plan.fingerprint
    slim = fxprune.rewrite(coupling, plan)
    fxprune.verify(coupling, plan, slim)
    assert torch.equal(slim.a1.weight, plan.cut("a1.weight", other.a1.weight))
    assert sum(p.numel() for p in slim.parameters()) == plan.costs.after.params


def test_a_plan_of_another_class_names_the_parameter(saved: tuple[Any, Path]) -> None:
    slim, folder = saved
    plan = report(slim).plan
    for call in (
        lambda: fxprune.rewrite(fxprune.couple(fxprune.trace(Chain(), X)), plan),
        lambda: fxprune.load(folder, Chain()),
    ):
        with pytest.raises(ArtifactError) as caught:
            call()
        assert "'stem.weight'" in str(caught.value)
        assert "no such parameter" in str(caught.value)


def test_a_plan_of_another_width_names_parameter_expected_and_found(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    with pytest.raises(ArtifactError) as caught:
        fxprune.load(folder, Residual(24))
    assert "'stem.weight': the plan expects size 16 along dim 0, found 24" in str(caught.value)


def edited(plan: Plan, change: Callable[[dict[str, Any]], None]) -> str:
    data = json.loads(plan.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(schema=99), "schema 99"),
        (lambda data: data.pop("schema"), "schema None"),
        (lambda data: data.pop("sites"), "sites"),
        (lambda data: data["costs"].pop("after"), "after"),
        (lambda data: data["groups"][0].update(colour=1), "colour"),
        (lambda data: data["groups"][0].update(before="16"), r"groups\[0\]: 'before': expected int, found '16'"),
        (lambda data: data["costs"]["after"].update(macs=None), r"costs\.after: 'macs': expected int, found None"),
        (lambda data: data.update(costs={"before": 1, "after": 2}), r"costs\.before: expected an object, found 1"),
        (lambda data: data.update(budget=[]), "'budget': expected dict"),
        (lambda data: data["sites"].append(3), "sites: expected an object, found 3"),
        (lambda data: data["sites"][0].update(dim="0"), "'dim': expected int, found '0'"),
        (lambda data: data["sites"][0].update(dim=-1), "has dim -1"),
        (lambda data: data["sites"][0].update(kept=["a", "b"]), r"'\w+\.\w+' along dim 0: expected positions"),
        (lambda data: data["sites"][0].update(kept=[0.5]), r"expected positions \(whole numbers\), found \[0\.5\]"),
        (lambda data: data["sites"][0].update(kept=3), "expected positions .* found 3"),
        (lambda data: data["sites"][0].update(kept=[1 << 80]), "expected positions"),
        (lambda data: data["sites"][0].update(kept=[[0, 1], [2]]), r"expected rows of one length, found \[1, 2\]"),
        (lambda data: data["sites"][0].update(kept=[[0, 1], 2]), "expected positions"),
    ],
)
def test_json_that_is_no_plan_is_refused(change: Callable[[dict[str, Any]], None], words: str) -> None:
    plan = report(slimmed(settled(Residual()))).plan
    with pytest.raises(ArtifactError, match=words):
        Plan.from_json(edited(plan, change))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"plan"', "\x00\x01"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"schema|breaks off or is damaged"):
        Plan.from_json(text)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(ArtifactError, match="this is a dict"):
        Plan.from_json({})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([0, 1, 99], "keeps position 99"),
        ([-1, 2, 3], "The plan is damaged"),
        ([0, 1], "channels coupled to them"),
        ([], "channels coupled to them"),
        ([[0, 1], [2, 3]], "'a2.weight' along dim 1: expected one row of positions, found several"),
    ],
)
def test_a_plan_with_other_positions_is_refused(kept: list[Any], words: str) -> None:
    model = settled(Residual())

    def change(data: dict[str, Any]) -> None:
        site = next(s for s in data["sites"] if (s["name"], s["dim"]) == ("a2.weight", 1))
        site["kept"] = kept

    plan = Plan.from_json(edited(report(slimmed(model)).plan, change))
    with pytest.raises(ArtifactError, match=words) as caught:
        fxprune.rewrite(fxprune.couple(fxprune.trace(model, X)), plan)
    assert ".weight'" in str(caught.value)


def test_a_plan_with_one_row_for_a_grouped_convolution_is_refused() -> None:
    model = settled(Residual())

    def change(data: dict[str, Any]) -> None:
        next(s for s in data["sites"] if (s["name"], s["dim"]) == ("b2.weight", 1))["kept"] = [0, 1]

    plan = Plan.from_json(edited(report(slimmed(model)).plan, change))
    with pytest.raises(ArtifactError, match=r"'b2\.weight' along dim 1: expected rows of positions, found one row"):
        fxprune.rewrite(fxprune.couple(fxprune.trace(model, X)), plan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": {}}, r"plan\.json: the description of the example inputs is damaged.*args.*`example_inputs=`"),
        ({"inputs": {"args": [{"shape": [2, 3], "dtype": "float17"}], "kwargs": {}}}, "inputs is damaged.*float17"),
        ({"inputs": {"args": [{"shape": [-2, 3], "dtype": "float32"}], "kwargs": {}}}, "inputs is damaged"),
        ({"inputs": {"args": [3], "kwargs": {}}}, "inputs is damaged"),
        ({"inputs": 3}, "inputs is damaged"),
        ({"inputs": None}, "could not be saved. Pass `example_inputs=`"),
        ({"freeze": {"nowhere": "is held"}}, r"plan\.json freezes node 'nowhere'.*Residual has no such node"),
        ({"freeze": ["stem"]}, r"'freeze': expected node -> reason, found \['stem'\]"),
        ({"plan": 3}, "the plan has schema 'int'"),
        ({"channels_last": ["nowhere"]}, "'channels_last' names 'nowhere', which is no weight of a convolution"),
        ({"channels_last": 3}, "'channels_last' names 3"),
    ],
)
def test_damaged_entries_beside_the_plan_are_named(saved: tuple[Any, Path], change: dict[str, Any], words: str) -> None:
    _, folder = saved
    data = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(data | change))
    with pytest.raises(ArtifactError, match=words):
        fxprune.load(folder, Residual())


def test_weights_of_another_dtype_say_how_to_load_them(saved: tuple[Any, Path]) -> None:
    slim, folder = saved
    fxprune.save(slim.half(), folder)
    with pytest.raises(ArtifactError) as caught:
        fxprune.load(folder, Residual())
    for words in ("expected torch.float32", "found torch.float16", "Pass `model.half()`, with `example_inputs="):
        assert words in str(caught.value)
    loaded = fxprune.load(folder, Residual().half(), example_inputs=X.half())
    assert all(torch.equal(t, slim.state_dict()[name]) for name, t in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbage"])
def test_damaged_files_are_named(saved: tuple[Any, Path], name: str, damage: str) -> None:
    _, folder = saved
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff\xfe\x00garbage"}[damage]
        )
    with pytest.raises(ArtifactError) as caught:
        fxprune.load(folder, Residual())
    assert name in str(caught.value)


def test_weights_of_another_network_are_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = saved
    fxprune.save(slimmed(settled(Chain())), tmp_path / "other")
    (folder / "weights.safetensors").write_bytes((tmp_path / "other" / "weights.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=r"weights\.safetensors does not fit"):
        fxprune.load(folder, Residual())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere.*cannot be read.*fxprune\.save"):
        fxprune.load(tmp_path / "nowhere", Residual())


def test_json_without_a_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a saved plan"):
        fxprune.load(tmp_path, Residual())


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file"):
        fxprune.save(slimmed(Chain()), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_only_what_came_from_the_library_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(fxprune.FxPruneError, match=r"Chain carries no record.*fxprune\.compile"):
        fxprune.save(Chain(), tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


class Shifting(nn.Module):
    """Tensors that are no buffers: a constant of forward, and an attribute of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.b.shift = torch.arange(4.0)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * torch.tensor(2.0)) + self.b.shift


def test_copies_have_the_same_state_where_tensors_are_no_buffers() -> None:
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    slim = slimmed(settled(Shifting()), x)
    again = fxprune.compile(slim, x, Budget(macs=1.0), progress=False)
    for twin in (copy.deepcopy(slim), copy.deepcopy(copy.deepcopy(slim)), pickle.loads(pickle.dumps(slim)), again):
        assert list(twin.state_dict()) == list(slim.state_dict())
        assert torch.equal(twin(x), slim(x))
