"""The demo end to end, its scenes and its metrics."""

import json
import math

import pytest
import torch

import fxprune
from fxprune.__main__ import main
from fxprune.errors import ArtifactError
from fxprune.examples import demo, scenes, training
from fxprune.examples.networks import SceneNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the quick demo wrote."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def outcome(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_demo_meets_its_budget_and_proves_it(outcome):
    costs = outcome["report"]["costs"]
    assert 0.48 <= costs["after"]["macs"] / costs["before"]["macs"] <= 0.5
    errors = outcome["report"]["verification"]["errors"]
    assert set(errors) == set(training.metrics)
    assert max(errors.values()) < 1e-9


def test_demo_measures_every_task_and_both_batch_sizes(outcome):
    for stage in ("dense", "cut", "tuned"):
        assert set(outcome["metrics"][stage]) == set(training.metrics)
        assert all(math.isfinite(score) and score <= 1 for score in outcome["metrics"][stage].values())
    assert [latency["batch_size"] for latency in outcome["latencies"]] == list(demo.BATCH_SIZES)
    for latency in outcome["latencies"]:
        assert latency["pairs"] >= 10
        for quartiles in latency["quartiles"].values():
            assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]


def test_demo_writes_a_table_a_picture_and_a_network_that_loads(folder, outcome):
    table = (folder / "table.txt").read_text(encoding="utf-8")
    for name in (*demo.METRICS.values(), "macs", "params", "the proof", f"torch {torch.__version__}"):
        assert name in table
    assert (folder / "groups.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    slim = fxprune.load(folder / "slim", SceneNet())
    assert sum(p.numel() for p in slim.parameters()) == outcome["report"]["costs"]["after"]["params"]


def test_demo_tells_of_a_saved_network_that_is_another(folder, tmp_path):
    slim = fxprune.load(folder / "slim", SceneNet()).eval()
    images = torch.randn(2, 1, 32, 32)
    fxprune.save(slim, tmp_path)
    demo.check_saved(slim, tmp_path, images)
    with torch.no_grad():
        slim.get_parameter("depth.bias").add_(1)
    with pytest.raises(ArtifactError, match="gives another depth"):
        demo.check_saved(slim, tmp_path, images)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--budget", "-1"], "not a positive number"),
        (["--budget", "0.0001"], "macs"),
        (["--out", "a_file"], "is a file"),
    ],
)
def test_demo_refuses_before_it_trains(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda *_, **__: pytest.fail("it trained"))
    (tmp_path / "a_file").write_text("")
    assert main(["demo", "--quick", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_no_scan_is_in_two_splits():
    parts = [{image.tobytes() for image in digits.images} for digits in scenes.split_digits()]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_scenes_follow_from_the_seed():
    first, second, other = (scenes.make_splits(8, 4, 4, seed) for seed in (3, 3, 4))
    for part in ("train", "calibration", "test"):
        for field in ("images", "segmentation", "depth", "presence"):
            value = getattr(getattr(first, part), field)
            assert torch.equal(value, getattr(getattr(second, part), field))
        assert not torch.equal(getattr(first, part).images, getattr(other, part).images)


def test_targets_of_a_scene_agree():
    some = scenes.compose(scenes.split_digits()[0], 200, seed=1)
    assert some.images.shape == (200, 1, 32, 32)
    assert some.segmentation.unique().tolist() == list(range(scenes.NUM_CLASSES))
    background = some.segmentation == scenes.BACKGROUND
    assert torch.equal(background, some.depth == 0)
    assert torch.allclose(some.depth.unique(), torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert (some.depth.flatten(1).max(1).values == 1).all()  # the nearest digit is in full view
    for digit in range(scenes.NUM_DIGITS):
        pixels = (some.segmentation == digit).sum((1, 2))
        assert torch.equal(some.presence[:, digit] == 1, pixels >= 8)


def test_batches_hold_every_scene_once():
    some = scenes.compose(scenes.split_digits()[0], 10, seed=2)
    plain = torch.cat([images for images, _ in some.batches(4)])
    assert torch.equal(plain, some.images)
    shuffled = [(images, targets["depth"]) for images, targets in some.batches(4, shuffle_seed=0)]
    assert [len(images) for images, _ in shuffled] == [4, 4, 2]
    for images, depths in shuffled:
        for image, depth in zip(images, depths, strict=True):
            matches = [i for i in range(10) if torch.equal(some.images[i], image)]
            assert len(matches) == 1
            assert torch.equal(some.depth[matches[0]], depth)


def _logits(classes, count):
    return torch.nn.functional.one_hot(torch.tensor(classes), count).movedim(-1, 1).float()


def test_mean_iou_by_hand():
    truth = torch.tensor([[[0, 0], [1, 1]]])
    assert training.mean_iou(_logits([[[0, 0], [1, 1]]], 3), truth) == 1
    # class 0: 1 of 2; class 1: 2 of 3; class 2 does not occur
    assert training.mean_iou(_logits([[[0, 1], [1, 1]]], 3), truth) == pytest.approx((1 / 2 + 2 / 3) / 2)
    # class 2 is found where it is not: it counts as 0
    assert training.mean_iou(_logits([[[0, 2], [1, 1]]], 3), truth) == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_explained_variance_by_hand():
    depth = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert training.explained_variance(depth, depth) == 1
    assert training.explained_variance(torch.full_like(depth, 0.5), depth) == pytest.approx(0)
    assert training.explained_variance(torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]), depth) == pytest.approx(0)
    assert training.explained_variance(1 - depth, depth) == pytest.approx(-3)


def test_mean_average_precision_by_hand():
    presence = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    in_order = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert training.mean_average_precision(in_order, presence) == 1  # the second digit does not occur
    # ranked: absent, present, present
    reverse = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    assert training.mean_average_precision(reverse, presence) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_losses_of_a_perfect_answer_are_small():
    some = scenes.compose(scenes.split_digits()[0], 16, seed=5)
    batch = next(some.batches(16))
    perfect = {
        "segmentation": 50 * torch.nn.functional.one_hot(some.segmentation, scenes.NUM_CLASSES).movedim(-1, 1).float(),
        "depth": some.depth,
        "presence": 50 * (2 * some.presence - 1),
    }
    for task, loss in training.losses.items():
        assert loss(perfect, batch).item() < 1e-6, task
    for task, metric in training.metrics.items():
        assert metric(perfect[task], getattr(some, task)) == pytest.approx(1), task


def test_training_lowers_the_loss_and_ends_in_evaluation_mode():
    torch.manual_seed(0)
    some = scenes.compose(scenes.split_digits()[0], 64, seed=6)
    network = SceneNet((4, 4, 8, 8), (4, 4, 4))
    batch = next(some.batches(64))

    def loss():
        with torch.no_grad():
            outputs = network(batch[0])
            return float(sum(task_loss(outputs, batch) for task_loss in training.losses.values()))

    before = loss()
    training.train(network, some, epochs=5, learning_rate=1e-2, progress=False, batch_size=16)
    assert not network.training
    assert loss() < before


def test_evaluating_leaves_every_module_in_its_own_mode() -> None:
    model = SceneNet((4, 4, 4, 4), (4, 4, 4)).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    training.evaluate(model, scenes.make_splits(1, 1, 8).test)
    assert not frozen.training
    assert all(m.training for m in model.modules() if m is not frozen)


def test_distilling_brings_a_student_nearer_to_its_teacher() -> None:
    torch.manual_seed(1)
    student, teacher = demo.SceneNet(), demo.SceneNet().eval()
    known = {name: t.clone() for name, t in teacher.state_dict().items()}
    some = scenes.make_splits(128, 8, 8, 0).train
    with torch.no_grad():
        answers = teacher(some.images)
        assert float(training.distillation_loss(answers, answers)) == pytest.approx(0, abs=1e-6)
        before = training.distillation_loss(student.eval()(some.images), answers)
    training.distill(student, teacher, some, 2, 3e-3, progress=False, weight=10.0)
    with torch.no_grad():
        assert training.distillation_loss(student(some.images), answers) < 0.8 * before
    assert all(torch.equal(t, known[name]) for name, t in teacher.state_dict().items())
