import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fxprune import couple, trace
from fxprune.__main__ import load_network, main, parse_input
from fxprune.inspecting import inspect

NETWORKS = """
import torch
from torch import nn

def small():
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten(), nn.Linear(96, 4))

class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 3)

    def forward(self, tokens, x):
        return self.head(self.table(tokens) * x)

ready = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
number = 3

def fails():
    raise OSError("no weights here")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with a module of networks."""
    (tmp_path / "some_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("some_networks", None)


def refusal(capsys, *argv):
    """Return the one line on stderr of a command that ends with exit code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def small_coupling():
    return couple(trace(load_network("some_networks:small"), torch.zeros(1, 3, 8, 8)))


def test_inspect_prints_costs_groups_and_what_stays(folder, capsys):
    assert main(["inspect", "some_networks:small", "--input", "1,3,8,8"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Sequential, traced by symbolic_trace" in out
    assert "What can be pruned: 12 channels in 2 groups." in out
    assert "is an output of the network" in out
    assert f"{8 * 27 * 36 + 6 * 72 * 16 + 96 * 4:,}" in out


def test_json_carries_the_numbers_of_the_coupling(folder, capsys):
    assert main(["inspect", "some_networks:small", "--input", "1,3,8,8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    coupling = small_coupling()
    dense = coupling.costs(np.ones(coupling.num_channels, dtype=bool))
    assert found["costs"] == dense.to_dict()
    assert [(g["name"], g["kind"], g["width"]) for g in found["groups"]] == [
        (g.name, g.kind, g.width) for g in coupling.groups()
    ]
    assert found["network"] == "Sequential"
    frozen = sum(row["channels"] for row in found["frozen"])
    assert frozen == int((coupling.is_frozen & coupling.has_site).sum())
    least = inspect(coupling).least
    assert found["least"] == least.to_dict()
    assert 0 < least.macs < dense.macs


def test_the_saving_at_half_is_that_of_the_halved_network(folder, capsys):
    assert main(["inspect", "some_networks:small", "--input", "1,3,8,8", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["groups"][0]
    dense, half = 8 * 27 * 36 + 6 * 72 * 16 + 96 * 4, 4 * 27 * 36 + 6 * 36 * 16 + 96 * 4
    assert first["macs"] == pytest.approx(1 - half / dense)
    assert (first["width"], first["least"]) == (8, 1)


def test_a_network_that_cannot_shrink_says_so():
    found = str(inspect(couple(trace(nn.Linear(4, 2), torch.zeros(1, 4)))))
    assert "Nothing can be pruned." in found
    assert "is an output of the network" in found


def test_classes_ready_networks_and_dtypes_are_accepted(folder, capsys):
    assert main(["inspect", "some_networks:TwoInputs", "--input", "2,7:int64", "--input", "2,7,6"]) == 0
    assert main(["inspect", "some_networks:ready", "--input", "1,4"]) == 0
    out = capsys.readouterr().out
    assert "TwoInputs, traced by symbolic_trace" in out
    assert "Nothing can be pruned." in out
    assert "What can be pruned: 4 channels in 1 group." in out


def test_the_picture_is_written(folder, capsys):
    assert main(["inspect", "some_networks:small", "--input", "1,3,8,8", "--picture", "groups.svg"]) == 0
    assert "<svg" in Path("groups.svg").read_text()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("some_networks", "is not MODULE:FACTORY. Write, for example, `torchvision.models:resnet18`"),
        ("no_such_module:net", "cannot import 'no_such_module' (ModuleNotFoundError"),
        ("some_networks:absent", "'some_networks' has no 'absent'"),
        ("some_networks:fails", "some_networks:fails cannot be called (OSError: no weights here)"),
        ("torch.nn:Linear", "Name a function that takes no arguments and returns the network"),
        ("math:pi", "math:pi cannot be called (TypeError"),
        ("collections:OrderedDict", "gives 'OrderedDict', not a torch.nn.Module"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(folder, capsys, network, message):
    assert message in refusal(capsys, "inspect", network, "--input", "1,3,8,8")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (["one"], "--input one: a shape is positive whole numbers"),
        (["1,-3"], "--input 1,-3: a shape is positive whole numbers"),
        (["1,3,0,8"], "a shape is positive whole numbers"),
        (["1,3,8,8:float33"], "torch has no dtype 'float33'"),
        (["1,3,8,8", "1"], "too many positional arguments"),
        (["1,5,8,8"], ""),
        (["3,8"], ""),
    ],
)
def test_bad_inputs_are_refused_in_one_line(folder, capsys, shapes, message):
    inputs = [word for shape in shapes for word in ("--input", shape)]
    assert message in refusal(capsys, "inspect", "some_networks:small", *inputs)


def test_shapes_and_dtypes_are_read():
    assert parse_input("2,16:int64").dtype == torch.int64
    assert parse_input("1, 3,4").shape == (1, 3, 4)


def test_the_demo_gets_its_options(monkeypatch):
    calls = []
    demo = types.ModuleType("fxprune.examples.demo")
    monkeypatch.setattr(demo, "run", lambda **options: calls.append(options), raising=False)
    monkeypatch.setitem(sys.modules, "fxprune.examples.demo", demo)
    assert main(["demo", "--seed", "3", "--budget", "0.4", "--out", "there", "--quick"]) == 0
    assert main(["demo"]) == 0
    assert calls[0] == {"seed": 3, "budget": 0.4, "out": Path("there"), "quick": True}
    assert calls[1] == {"seed": 0, "budget": 0.5, "out": Path("fxprune_demo"), "quick": False}


def test_the_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fxprune.examples.demo", raising=False)

    def absent(name):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    monkeypatch.setattr("importlib.import_module", absent)
    assert 'needs sklearn, which is not installed. Run `pip install "fxprune[examples]"`' in refusal(capsys, "demo")


def test_help_has_examples(capsys):
    for argv in (["--help"], ["inspect", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        assert "python -m fxprune inspect torchvision.models:resnet18 --input 1,3,224,224" in capsys.readouterr().out


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
