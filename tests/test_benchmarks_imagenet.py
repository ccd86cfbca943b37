"""The benchmark on ImageNet: what it reads from a folder, and that it runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

sys.path.append(str(Path(__file__).parent / "benchmarks"))  # its modules import one another, as in the command

from imagenet import MEAN, STD, accuracies, images, main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of three classes of four images, the colour of which is the class."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for number in range(4):
                pixels = np.full((40, 50, 3), 80 * label, np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


def test_images_are_standardised_drawn_by_chance_and_numbered_by_the_names_of_their_folders(folder: Path) -> None:
    some, again, every = images(folder, "train", 32, 5), images(folder, "train", 32, 5), images(folder, "train", 32)
    assert (len(some), len(every)) == (5, 12)
    assert list(some.indices) == list(again.indices) != sorted(some.indices)
    for image, label in every:
        assert image.shape == (3, 32, 32)
        wanted = (80 * label / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose(image, wanted[:, None, None].expand_as(image), atol=1e-5)


def test_a_folder_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no folder 'test'"):
        images(folder, "test", 32)
    with pytest.raises(ValueError, match="has 12 images, and 13 are asked for"):
        images(folder, "train", 32, 13)


def test_accuracies_count_first_answers_and_the_first_five() -> None:
    logits = torch.eye(8)[:4] + 0.1 * torch.arange(8)  # first answers are 0, 1, 2, 3; then 7, 6, 5, 4
    found = accuracies(nn.Identity(), iter([(logits[:2], {"label": torch.tensor([0, 5])}),
                                            (logits[2:], {"label": torch.tensor([1, 3])})]))  # fmt: skip
    assert found == {"top1": pytest.approx(0.5), "top5": pytest.approx(0.75)}


def test_the_command_tests_dense_and_slim_networks(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(shufflenet_v2_x0_5().state_dict(), tmp_path / "weights.pt")
    words = [str(folder), "--network", "shufflenet_v2_x0_5", "--weights", str(tmp_path / "weights.pt"), "--px", "32"]
    words += ["--calibration", "8", "--batch-size", "4", "--methods", "magnitude-global", "joint", "--budgets", "0.5"]
    main([*words, "--out", str(tmp_path / "out")])
    main([*words, "--out", str(tmp_path / "out"), "--resume"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "imagenet.jsonl").read_text("utf-8").splitlines()]
    assert [(r["method"], r["budget"]) for r in rows] == [("dense", 1.0), ("magnitude-global", 0.5), ("joint", 0.5)]
    assert rows[0]["macs"] == 1.0
    assert all(0.4 < r["macs"] <= 0.5 for r in rows[1:])
    assert "| shufflenet_v2_x0_5 | joint" in (tmp_path / "out" / "imagenet.md").read_text("utf-8")
