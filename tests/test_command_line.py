import json
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from fxprune import couple, trace
from fxprune.__main__ import COMMANDS, main
from fxprune.commands.networks import load_network, parse_input
from fxprune.inspecting import inspect

NETWORKS = """
import fxprune
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

def wide():
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 6, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.Flatten(), nn.Linear(96, 4))

def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(3)]

def tasks():
    return {"label": fxprune.Task(lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]))}
"""
INPUT = ("--input", "1,3,8,8")
HALF = (*INPUT, "--macs", "0.5")


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


def test_the_demo_gets_its_options(monkeypatch, capsys):
    calls = []
    outcome = types.SimpleNamespace(to_dict=lambda: {"found": 1})

    def run(**options):
        calls.append(options)
        print("training")
        return outcome

    demo = types.ModuleType("fxprune.examples.demo")
    monkeypatch.setattr(demo, "run", run, raising=False)
    monkeypatch.setitem(sys.modules, "fxprune.examples.demo", demo)
    assert main(["demo", "--seed", "3", "--budget", "0.4", "--out", "there", "--quick"]) == 0
    assert capsys.readouterr().out == "training\n"
    assert main(["demo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"found": 1}, "training\n")
    assert calls[0] == {"seed": 3, "budget": 0.4, "out": Path("there"), "quick": True}
    assert calls[1] == {"seed": 0, "budget": 0.5, "out": Path("fxprune_demo"), "quick": False}


def test_the_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fxprune.examples.demo", raising=False)

    def absent(name):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    monkeypatch.setattr("importlib.import_module", absent)
    assert 'needs sklearn, which is not installed. Run `pip install -e ".[examples]"`' in refusal(capsys, "demo")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_exit_codes(capsys, name):
    for argv in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert f"examples:\n  python -m fxprune {argv[0] if argv[1:] else 'demo'}" in out
        assert f"  python -m fxprune {name} " in out
        assert "exit codes: 0 done; 2 " in out


def test_the_examples_are_understood(monkeypatch):
    for name, command in COMMANDS.items():
        calls = []
        monkeypatch.setattr(command, "run", calls.append)
        lines = command.EXAMPLES.replace("\\\n", " ").split("\n")
        examples = [shlex.split(line.partition(">")[0])[3:] for line in lines if line]
        assert all(words[0] == name and main(words) == 0 for words in examples)
        assert len(calls) == len(examples) > 0


def seeded(seed):
    torch.manual_seed(seed)
    return load_network("some_networks:small").eval()


def test_compile_saves_the_network_that_the_library_makes(folder, capsys):
    network = seeded(0)
    torch.save(network.state_dict(), "net.pt")
    options = ["--weights", "net.pt", "--out", "new/slim", "--html", "new/report.html", "--json"]
    assert main(["compile", "some_networks:small", *HALF, *options]) == 0
    out, err = capsys.readouterr()
    x = torch.randn(2, 3, 8, 8)
    mine = fxprune.compile(network, parse_input("1,3,8,8"), fxprune.Budget(macs=0.5), progress=False)
    assert torch.equal(fxprune.load("new/slim", seeded(1))(x), mine(x))
    found = json.loads(out)
    assert found["costs"] == fxprune.report(mine).to_dict()["costs"]
    assert found["verification"]["passed"] is True
    assert Path("new/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert err == "wrote new/report.html\nwrote new/slim: plan.json, weights.safetensors\n"


def test_compile_takes_data_tasks_and_methods(folder, capsys):
    data = ["--calibration", "some_networks:batches", "--tasks", "some_networks:tasks"]
    assert main(["compile", "some_networks:small", *HALF, *data, "--method", "taylor", "--out", "slim"]) == 0
    assert "fxprune: Taylor(" in capsys.readouterr().out
    assert main(["compile", "some_networks:small", *HALF, *data, "--params", "400", "--out", "slim"]) == 0
    out = capsys.readouterr().out
    assert "fxprune: Joint(" in out
    assert "budget macs=0.5, params=400" in out


def test_compile_and_sweep_take_a_latency_model(folder, capsys):
    model = fxprune.LatencyModel.measure(trace(seeded(0), parse_input("1,3,8,8")))
    model.save("latency.json")
    options = ["some_networks:small", *INPUT, "--latency-model", "latency.json", "--json"]
    assert main(["compile", *options, "--macs", "0.5", "--out", "slim"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["costs"]["after"]["latency"] <= found["costs"]["before"]["latency"]
    assert "cannot be met. latency" in refusal(capsys, "compile", *options, "--latency", "1.01", "--out", "small")
    assert main(["sweep", *options, "--macs", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["costs"]["before"] == found["costs"]["before"]
    assert "none.json cannot be read" in refusal(
        capsys, "compile", *options, "--latency-model", "none.json", *HALF, "--out", "s"
    )


def test_report_tells_of_a_folder(folder, capsys):
    assert main(["compile", "some_networks:small", *HALF, "--out", "slim", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["report", "slim", "some_networks:small", "--json", "--html", "report.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key in ("method", "budget", "costs", "groups"):
        assert found[key] == made[key]
    assert [row["reason"] for row in found["frozen"]] == [row["reason"] for row in made["frozen"]]
    assert found["notes"] == ["loaded from a file"]
    assert "0.weight" in Path("report.html").read_text(encoding="utf-8")
    assert main(["report", "slim", "some_networks:small"]) == 0
    assert "note: loaded from a file" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["folder", "file", "plan alone"])
def test_apply_cuts_another_checkpoint(folder, capsys, kind):
    slim = fxprune.compile(seeded(0), parse_input("1,3,8,8"), fxprune.Budget(macs=0.5), progress=False)
    fxprune.save(slim, "slim")
    plan = fxprune.report(slim).plan
    Path("alone.json").write_text(plan.to_json())
    other, x = seeded(5), torch.randn(2, 3, 8, 8)
    save_file(other.state_dict(), "other.safetensors")
    path = {"folder": ["slim"], "file": ["slim/plan.json"], "plan alone": ["alone.json", *INPUT]}[kind]
    options = ["some_networks:small", "--weights", "other.safetensors", "--out", "cut", "--json"]
    assert main(["apply", *path, *options]) == 0
    assert json.loads(capsys.readouterr().out)["verification"]["passed"] is True
    coupling = couple(trace(other, parse_input("1,3,8,8")))
    assert torch.equal(fxprune.load("cut", seeded(1))(x), fxprune.rewrite(coupling, plan)(x))


def test_sweep_prints_the_plans_of_the_library(folder, capsys):
    budgets = [fxprune.Budget(macs=share) for share in (0.7, 0.4)]
    mine = fxprune.sweep(couple(trace(seeded(0), parse_input("1,3,8,8"))), budgets)
    assert main(["sweep", "some_networks:small", *INPUT, "--macs", "0.7", "0.4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == mine.to_dict()
    assert [point["budget"] for point in found["points"]] == [{"macs": 0.7}, {"macs": 0.4}]
    assert main(["sweep", "some_networks:small", *INPUT, "--macs", "0.7", "0.4"]) == 0
    assert capsys.readouterr().out == f"{mine}\n"
    calibrated = ["--calibration", "some_networks:batches", "--tasks", "some_networks:tasks"]
    assert main(["sweep", "some_networks:small", *INPUT, "--params", "0.5", *calibrated]) == 0
    assert "label loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (INPUT, "no budget is given. Pass at least one of `--macs`, `--params`, `--memory`"),
        ((*INPUT, "--macs", "0.0001"), "the budget cannot be met"),
        ((*INPUT, "--macs", "-1"), "is not a positive number"),
        ((*HALF, "--out", "some_networks.py"), "--out some_networks.py is a file. Name a folder."),
        ((*HALF, "--html", "."), "--html . is a folder. Name a file, such as `--html report.html`"),
        ((*HALF, "--method", "taylor"), "pass `--calibration`, or use `--method magnitude`"),
        ((*HALF, "--calibration", "some_networks:number"), "cannot be called"),
        ((*HALF, "--calibration", "builtins:dict"), "gives 'dict' with no batches in it"),
        ((*HALF, "--tasks", "some_networks:batches"), "gives 'list', not tasks by their names"),
        ((*HALF, "--weights", "none.pt"), "none.pt cannot be read: No such file or directory"),
        ((*HALF, "--weights", "some_networks.py"), "some_networks.py holds no weights that can be read without"),
        ((*HALF, "--weights", "list.pt"), "list.pt holds <class 'list'>, not weights by their names"),
        ((*HALF, "--weights", "nested.pt"), "nested.pt holds a dict of 'epoch', not weights by their names"),
        ((*HALF, "--weights", "few.pt"), "few.pt lacks 6 tensors that the network has: 0.bias, 1.bias, 1.num_"),
        ((*HALF, "--weights", "more.pt"), "more.pt has 1 tensors that the network does not have: extra"),
        ((*HALF, "--weights", "wide.pt"), "'0.weight': expected shape (8, 3, 3, 3), found (16, 3, 3, 3)"),
    ],
)
def test_wrong_requests_are_refused_in_one_line_and_write_nothing(folder, capsys, words, message):
    state = seeded(0).state_dict()
    torch.save([1], "list.pt")
    torch.save({"epoch": 3}, "nested.pt")
    torch.save({name: value for name, value in state.items() if "weight" in name}, "few.pt")
    torch.save({**state, "extra": torch.zeros(1)}, "more.pt")
    torch.save(load_network("some_networks:wide").state_dict(), "wide.pt")
    assert message in refusal(capsys, "compile", "some_networks:small", "--out", "slim", *words)
    assert not Path("slim").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "nowhere", "some_networks:small"], "nowhere/plan.json cannot be read"),
        (["report", "slim", "some_networks:wide"], "'0.weight': the plan expects size 8 along dim 0, found 16"),
        (["apply", "slim", "some_networks:wide", "--out", "cut"], "the plan expects size 8 along dim 0, found 16"),
        (["apply", "some_networks.py", "some_networks:small", "--out", "cut"], "breaks off or is damaged"),
        (["apply", "alone.json", "some_networks:small", "--out", "cut"], "Pass `--input` as to `compile`"),
    ],
)
def test_plans_that_do_not_fit_are_refused(folder, capsys, words, message):
    slim = fxprune.compile(seeded(0), parse_input("1,3,8,8"), fxprune.Budget(macs=0.5), progress=False)
    fxprune.save(slim, "slim")
    Path("alone.json").write_text(fxprune.report(slim).plan.to_json())
    assert message in refusal(capsys, *words)
    assert not Path("cut").exists()


def test_a_network_that_fails_its_proof_ends_with_3_and_is_not_saved(folder, capsys, monkeypatch):
    def differs(*args, **kwargs):
        raise fxprune.VerificationError("slim differs")

    monkeypatch.setattr("fxprune.compiling.verify_slim", differs)
    assert main(["compile", "some_networks:small", *HALF, "--out", "slim"]) == 3
    assert capsys.readouterr() == ("", "fxprune: error: slim differs\n")
    assert not Path("slim").exists()


def test_lines_of_the_command_line_are_no_user_code(folder, capsys):
    assert main(["compile", "some_networks:small", *HALF, "--out", "slim", "--json"]) == 0
    lines = [row["source"] for row in json.loads(capsys.readouterr().out)["frozen"]]
    assert not any("contextlib" in line or "compile.py" in line for line in lines)


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
