"""The parts of the quality benchmark that are quick to check."""

import argparse
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # its modules import one another, as in the command

from quality_cifar import FOLDER, TEST, TRAIN, cifar_splits
from quality_data import Counts, gratings, hard_digits, make_splits
from quality_measure import DENSE, Job, Options, measure
from quality_plots import plot
from quality_problems import problems
from quality_report import duels, failures, protection, report
from quality_scores import Cell, points, verdict, weakest
from quality_torch_pruning import OVER, TORCH_PRUNING, ratio_for
from quality_training import macs_of, refresh

from fxprune.examples.scenes import Digits, split_digits


def test_splits_share_no_scan():
    seen = []

    def note(digits, count, seed):
        seen.append({image.tobytes() for image in digits.images})
        return hard_digits(digits, count, seed)

    splits = make_splits(note, Counts(6, 5, 4))
    assert [len(part) for part in (splits.train, splits.calibration, splits.test)] == [6, 5, 4]
    assert len(seen) == 3
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


@pytest.mark.parametrize("compose", [hard_digits, gratings])
def test_images_are_made_of_the_given_scans_and_are_the_same_again(compose):
    digits = split_digits()[0]
    threes = Digits(digits.images[digits.labels == 3], digits.labels[digits.labels == 3])
    made, again = compose(threes, 20, (1,)), compose(threes, 20, (1,))
    assert made.inputs.shape == (20, 1, 32, 32)
    assert (made.targets["digit"] == 3).all()
    assert torch.equal(made.inputs, again.inputs)


def _write_cifar(folder: Path, per_batch: int) -> np.ndarray:
    """Write batches in CIFAR-10's format; return the pixels of all training images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, per_batch, 3072), dtype=np.uint8)
    for name, data in zip(TRAIN + TEST, pixels, strict=True):
        batch = {b"data": data, b"labels": [int(row[0]) % 10 for row in data], b"batch_label": b"a batch"}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return pixels[:5].reshape(-1, 3072)


def test_cifar_is_read_from_a_folder_and_from_an_archive(tmp_path):
    pixels = _write_cifar(tmp_path / FOLDER, per_batch=4)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(tmp_path / FOLDER, FOLDER)
    for path in (tmp_path, tmp_path / FOLDER, archive):
        splits = cifar_splits(path, Counts(14, 6, 3))
        found = torch.cat([splits.train.inputs, splits.calibration.inputs])
        restored = ((found * 0.25 + 0.47) * 255).round().numpy().astype(np.uint8)
        assert np.array_equal(restored.reshape(20, 3072), pixels)
        assert torch.equal(splits.train.targets["label"], torch.from_numpy(pixels[:14, 0].astype(np.int64) % 10))
        assert len(splits.test) == 3


def test_cifar_refuses_what_it_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"Pass cifar-10-python\.tar\.gz, or the folder"):
        cifar_splits(tmp_path, Counts(1, 1, 1))
    _write_cifar(tmp_path / FOLDER, per_batch=2)
    with pytest.raises(ValueError, match="asks for more"):
        cifar_splits(tmp_path, Counts(10, 1, 1))
    (tmp_path / FOLDER / TRAIN[0]).write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(ValueError, match="a CIFAR-10 batch refers to pathlib"):
        cifar_splits(tmp_path, Counts(1, 1, 1))


@pytest.mark.parametrize("share", [0.7, 0.15])
def test_ratio_leaves_the_most_macs_within_the_budget(share):
    ratio = ratio_for(share, lambda r: (1 - r) ** 2)
    assert share * 0.99 < (1 - ratio) ** 2 <= share * (1 + OVER)
    with pytest.raises(ValueError, match="leaves 10% of the macs or less"):
        ratio_for(0.1, lambda r: 0.2)


@pytest.mark.parametrize("method", ["tp-magnitude", "tp-taylor-global", "tp-hessian", "tp-activation"])
def test_torch_pruning_meets_a_budget_and_leaves_the_network(method):
    problem = problems(quick=True)["two-heads"]
    batches = list(problem.split(Counts(1, 64, 1)).calibration.batches(32))
    network = problem.build().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    slim = TORCH_PRUNING[method].start(network, problem, batches)(0.5)
    share = macs_of(slim, batches[0][0][:1]) / macs_of(network, batches[0][0][:1])
    assert 0.4 < share <= 0.5 * (1 + OVER)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_refresh_gives_batch_norms_the_statistics_of_the_data():
    norm = torch.nn.BatchNorm2d(3).eval()
    data = torch.randn(8, 3, 4, 4) * 2 + 1
    refresh(norm, [(data[:4], {}), (data[4:], {})])
    assert torch.allclose(norm.running_mean, data.mean((0, 2, 3)), atol=1e-6)
    assert norm.momentum == 0.1
    assert not norm.training


def test_jobs_give_rows_and_reasons(tmp_path):
    options = Options(tmp_path, None, quick=True, tune=True)
    (dense,) = measure(Job("two-heads", 0, DENSE, (1.0,)), options)
    (row,) = measure(Job("two-heads", 0, "magnitude", (0.5,)), options)
    assert len(list(tmp_path.glob("two-heads_0_*.pt"))) == 1
    assert dense["macs"] > 1e6
    assert 0.45 < row["macs"] <= 0.5
    assert all(set(row[stage]) == {"digit", "grating"} for stage in ("cut", "refreshed", "tuned"))
    (failed,) = measure(Job("two-heads", 0, "tp-obdc", (0.5,)), options)
    assert failed["error"].endswith("(in `_prepare_model` of importance.py)")


def _row(method: str, seed: int, score: float, budget: float = 0.5, network: str = "vgg") -> dict:
    scores = {stage: {"digit": score} for stage in ("cut", "refreshed", "tuned")}
    about = {"network": network, "seed": seed, "method": method, "budget": budget, "seconds": 1.0, "command": "run"}
    return about | {"macs": 0.5, "params": 0.4} | scores


def test_report_counts_wins_and_losses_and_tells_what_failed(tmp_path):
    rows = [_row(DENSE, seed, 0.97, budget=1.0) | {"macs": 1_000, "params": 10} for seed in (0, 1)]
    rows += [_row("joint", 0, 0.9), _row("joint", 1, 0.92), _row("tp-taylor", 0, 0.7), _row("tp-taylor", 1, 0.8)]
    rows += [_row("tp-lamp", seed, 0.6) for seed in (0, 1)]
    rows += [
        {"network": "vgg", "seed": 0, "method": "tp-obdc", "budget": 0.5, "error": "TypeError: a | b", "command": "run"}
    ]
    known = {"vgg": problems()["vgg"]}
    page = report(rows, known, {"vgg": plot("vgg", rows, tmp_path)}, argparse.Namespace(jobs=1))
    assert "win +16.0: 91.0, tp-taylor 75.0" in page
    assert "**91.0 ± 1.4**" in page
    assert "Dense, 2 seed(s): 97.0 ± 0.0 points (digit accuracy 97.0 ± 0.0), 1,000 macs, 10 parameters" in page
    assert "TypeError: a \\| b" in page
    assert "](quality_vgg.png)" in page
    assert (tmp_path / "quality_vgg.png").stat().st_size > 10_000
    assert failures([]).endswith("Nothing.")
    assert "* command: `run`\n" in page
    assert "| vgg       | 97.0    | 0.5" in duels(rows, ["vgg"])[-1]


def test_weakest_task_is_measured_against_the_dense_network():
    about = {"network": "two-heads", "seed": 0}
    rows = [about | {"method": DENSE, "budget": 1.0, "cut": {"a": 0.8, "b": 0.5, "c": -1.0}}]
    rows += [about | {"method": "joint", "budget": 0.5, "cut": {"a": 0.6, "b": 0.4, "c": -2.0}}]
    found = weakest(rows, "joint", 0.5, "cut")
    assert found is not None
    assert found.mean == pytest.approx(75)
    assert "75.0" in protection(rows, ["two-heads"])


def test_scores():
    assert points({"a": float("nan"), "b": 0.5}) == 25
    assert points({"a": 0.5, "b": -3.0}) == 25
    assert verdict(Cell(80, 1.0), Cell(81, 1.0)) == "even"
    assert verdict(Cell(80, None), Cell(81, None)) == "loss"
    assert verdict(Cell(82.1, 1.0), Cell(80, 1.0)) == "win"
