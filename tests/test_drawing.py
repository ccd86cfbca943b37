import json
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import nn

from fxprune import Budget, FxPruneError, couple, draw_groups, layering, plan, select_tasks, trace
from fxprune.boxes import find_boxes
from fxprune.collapsing import collapse
from fxprune.examples.networks import SceneNet
from fxprune.figures import COLORS, STAYS
from fxprune.layering import lay_out
from fxprune.planning import plan_of


class Small(nn.Module):
    """A residual block, a concat, two heads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 5, 1), nn.Conv2d(20, 7, 1)

    def forward(self, x):
        x = self.stem(x)
        inner = self.inner(x)
        x = torch.relu(x + self.outer(inner))
        return {"left": self.left(x), "right": self.right(torch.cat([x, inner], 1))}


@pytest.fixture(scope="module")
def coupling():
    return couple(trace(Small(), torch.zeros(1, 3, 8, 8)))


def patches(figure):
    return {p.get_gid(): p for p in figure.axes[0].patches if p.get_gid()}


def test_every_layer_join_input_and_output_has_a_patch(coupling):
    found = {gid for gid in patches(draw_groups(coupling)) if ":" not in gid or gid.startswith("output:")}
    layers = {"stem_0", "inner", "outer", "left", "right"}
    assert found == layers | {"add", "cat", "x", "output:left", "output:right"}


def test_there_is_a_curve_for_every_edge(coupling):
    (edges,) = [c for c in draw_groups(coupling).axes[0].collections if isinstance(c, PathCollection)]
    assert len(edges.get_paths()) == 11


def test_what_stays_is_grey_and_hatched_and_nothing_else_is(coupling):
    found = {
        gid: p for gid, p in patches(draw_groups(coupling)).items() if ":" in gid and not gid.startswith("output:")
    }
    hatched = {gid for gid, p in found.items() if p.get_hatch()}
    assert hatched == {"left:None", "right:None"}
    assert {to_hex(found[gid].get_facecolor()).upper() for gid in hatched} == {STAYS}


def test_layers_of_one_group_share_a_colour_and_neighbouring_groups_do_not(coupling):
    found = patches(draw_groups(coupling))
    residual, inner = (g.index for g in coupling.groups())
    colors = {gid: to_hex(found[gid].get_facecolor()).upper() for gid in found}
    assert colors[f"stem_0:{residual}"] == colors[f"outer:{residual}"] == colors[f"add:{residual}"] in COLORS
    assert colors[f"cat:{inner}"] == colors[f"inner:{inner}"] != colors[f"cat:{residual}"]


def test_a_plan_shows_widths_before_and_after(coupling):
    chosen = plan(coupling, Budget(macs=0.5))
    figure = draw_groups(coupling, plan=chosen)
    words = [text.get_text() for text in figure.axes[0].texts]
    kept = len(chosen.kept["inner.weight", 0])
    assert kept < 12
    assert f"12→{kept}" in words
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("inner" in text and f"12→{kept}" in text for text in legend)
    inner = next(g.index for g in coupling.groups() if g.name == "inner.weight")
    found = patches(figure)
    share = found[f"inner:{inner}"].get_width() / found["inner"].get_width()
    assert share == pytest.approx(kept / 12)


def test_a_norm_belongs_to_the_layer_it_follows_unless_something_else_comes_between():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.first(x)
            return self.last(self.norm(x + self.second(x)))

    boxes, graph = find_boxes(*_dense(PreActivation()))
    assert boxes["norm"].kind == "layer"
    assert list(graph.predecessors("norm")) == ["add"]


def _dense(model):
    coupling = couple(trace(model, torch.zeros(1, 3, 8, 8)))
    return coupling, torch.ones(coupling.num_channels, dtype=torch.bool).numpy()


def test_no_boxes_of_one_row_overlap(coupling):
    _, graph = find_boxes(coupling, torch.ones(coupling.num_channels, dtype=torch.bool).numpy())
    layers = lay_out(graph, dict.fromkeys(graph, 2.0), 0.5)
    places = list(layers.at.values())
    assert all(abs(x - y) >= 2 - 1e-9 for i, (x, r) in enumerate(places) for y, s in places[:i] if r == s)
    assert all(layers.at[a][1] < layers.at[b][1] for a, b in graph.edges)
    assert all([row for _, row in path] == list(range(path[0][1], path[-1][1] + 1)) for path in layers.paths.values())


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_written(coupling, tmp_path, suffix):
    path = tmp_path / "new" / f"groups.{suffix}"
    assert isinstance(draw_groups(coupling, path), Figure)
    assert path.stat().st_size > 1000


def test_drawing_leaves_pyplot_alone(coupling, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    assert isinstance(draw_groups(coupling), Figure)


def test_an_unknown_kind_of_file_is_refused(coupling, tmp_path):
    with pytest.raises(FxPruneError, match=r"cannot write .*groups\.xyz.*ends in \.png, \.svg or \.pdf"):
        draw_groups(coupling, tmp_path / "groups.xyz")


def test_without_matplotlib_the_error_says_what_to_install(coupling, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FxPruneError, match=r'pip install -e "\.\[examples\]"'):
        draw_groups(coupling)


def test_the_layout_does_not_depend_on_hash_seeds(coupling):
    _, graph = find_boxes(coupling, torch.ones(coupling.num_channels, dtype=torch.bool).numpy())
    code = (  # the module by its path: without the package, and so without torch
        "import importlib.util as u, json, sys; spec = u.spec_from_file_location('layering', sys.argv[1])\n"
        "sys.modules['layering'] = layering = u.module_from_spec(spec); spec.loader.exec_module(layering)\n"
        "graph = layering.nx.DiGraph(json.loads(sys.argv[2]))\n"
        "print(sorted(layering.lay_out(graph, dict.fromkeys(graph, 2.0), 0.5).at.items()))"
    )
    command = [sys.executable, "-c", code, layering.__file__, json.dumps(list(graph.edges))]
    found = [
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] != b""


def test_exported_networks_show_the_same_layers():
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            if isinstance(x, torch.fx.Proxy):
                raise TypeError("symbolic values are not taken")
            for _ in range(x.size(0) // 2):
                x = self.a(x)
                x = x + self.b(x)
            x = x.mean((2, 3))
            return self.head(x + self.norm(x))

    coupling = couple(trace(Exported(), torch.zeros(2, 3, 8, 8)))
    boxes, _ = find_boxes(coupling, torch.ones(coupling.num_channels, dtype=torch.bool).numpy())
    assert coupling.traced.frontend == "export"
    assert [box.name for box in boxes.values() if box.kind == "layer"] == ["a", "b", "norm", "head"]
    assert [box.name for box in boxes.values() if box.kind == "output"] == ["output"]


class Repeated(nn.Module):
    """Two blocks of one layer more than the rest, then four equal residual blocks, a head."""

    def __init__(self, widths=(8, 8, 8, 8), taps=()):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, w, 1), nn.Conv2d(w, 4, 1)) for w in widths)
        self.head = nn.Conv2d(4 * (1 + len(taps)), 2, 1)
        self.taps = taps

    def forward(self, x):
        x = self.stem(x)
        tapped = []
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i in self.taps:
                tapped.append(x)
        return self.head(torch.cat([x, *tapped], 1) if tapped else x)


def collapsed(model):
    boxes, graph = find_boxes(*_dense(model))
    return collapse(boxes, graph)


def test_equal_blocks_are_drawn_once():
    boxes, graph, (repeat,), stands = collapsed(Repeated())
    assert (repeat.count, len(repeat.blocks[0])) == (4, 3)
    assert [box.name for box in boxes.values()] == [
        "x 1\N{MULTIPLICATION SIGN}3\N{MULTIPLICATION SIGN}8\N{MULTIPLICATION SIGN}8",
        "stem",
        "blocks.0\N{EN DASH}3.0",
        "blocks.0\N{EN DASH}3.1",
        "add",
        "head",
        "output",
    ]
    assert list(graph.edges) == [
        ("x", "stem"), ("stem", "blocks_0_0"), ("stem", "add"), ("blocks_0_0", "blocks_0_1"), ("blocks_0_1", "add"),
        ("add", "head"), ("head", "output:output"),
    ]  # fmt: skip
    assert list(map(len, stands.values())) == [4]  # each block has a group inside; that of the residual is one


def test_blocks_that_differ_are_drawn_each():
    assert [r.count for r in collapsed(Repeated((8, 8, 6, 6)))[2]] == [2, 2]
    assert [r.count for r in collapsed(Repeated((8, 6, 8, 6)))[2]] == [2]  # pairs of blocks
    assert [r.count for r in collapsed(Repeated((8, 6, 7, 4)))[2]] == []
    assert [r.count for r in collapsed(Repeated(taps=(1,)))[2]] == [2, 2]  # what else is read ends a repeat
    assert [r.count for r in collapsed(Repeated(taps=(0, 1, 2)))[2]] == []


def test_widths_may_grow_by_equal_steps():
    boxes, _, (repeat,), _ = collapsed(Repeated((8, 10, 12, 14)))
    assert repeat.count == 4
    assert boxes["blocks_0_0"].size == "8\N{EN DASH}14"


def test_what_stands_for_several_tells_the_range_that_a_plan_leaves():
    coupling, _ = _dense(Repeated())
    keep = torch.ones(coupling.num_channels, dtype=torch.bool).numpy()
    inner = [g for g in coupling.groups() if g.name.endswith(".0.weight") and g.width == 8]
    for goes, group in enumerate(inner):
        keep[group.cells[0][:goes]] = False
    figure = draw_groups(coupling, plan=plan_of(coupling, coupling.settle(keep)), collapse=True)
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "8\N{RIGHTWARDS ARROW}5\N{EN DASH}8" in words
    assert "\N{MULTIPLICATION SIGN} 4" in words
    assert "repeat:blocks_0_0" in patches(figure)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("8\N{RIGHTWARDS ARROW}5\N{EN DASH}8, 4 groups" in line for line in legend)


def test_large_networks_are_collapsed_unless_told_otherwise():
    coupling, _ = _dense(Repeated((8,) * 24))
    assert sum(gid == "repeat:blocks_0_0" for gid in patches(draw_groups(coupling))) == 1
    every = patches(draw_groups(coupling, collapse=False))
    assert {f"blocks_{i}_1" for i in range(24)} <= set(every)
    assert not any(gid.startswith("repeat:") for gid in every)


def test_letters_say_which_layers_the_network_of_a_task_needs():
    torch.manual_seed(0)
    model, x = SceneNet().eval(), torch.zeros(1, 1, 16, 16)
    coupling = couple(trace(model, x))
    figure = draw_groups(coupling)
    found = {gid.removeprefix("serves:"): p.get_label() for gid, p in patches(figure).items()
             if gid.startswith("serves:")}  # fmt: skip
    tasks = {"A": "segmentation", "B": "depth", "C": "presence"}
    needed = {a: {n.name for n in select_tasks(coupling.traced, [task]).graph.nodes} for a, task in tasks.items()}
    boxes, _ = find_boxes(coupling, torch.ones(coupling.num_channels, dtype=torch.bool).numpy())
    for node, box in boxes.items():
        if box.kind != "output":
            letters = " ".join(letter for letter in tasks if node in needed[letter])
            assert found.get(node, "A B C") == letters, node
    assert {found[f"output:{task}"] for task in tasks.values()} == {"A", "B", "C"}
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [line for line in legend if "serves depth" in line] == ["$\\bf{B}$  serves depth"]


def test_a_network_with_one_output_has_no_letters():
    coupling, _ = _dense(Repeated())
    assert not [gid for gid in patches(draw_groups(coupling)) if gid.startswith("serves:")]


def test_the_legend_says_why_channels_stay(coupling):
    legend = [text.get_text() for text in draw_groups(coupling).axes[0].get_legend().get_texts()]
    assert "12 channels: is an output of the network" in [line.replace("\n ", "") for line in legend]


def test_a_dense_block_is_a_chain():
    class Dense(nn.Module):
        def __init__(self, slices=False):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4 + 4 * i, 4, 1) for i in range(5))
            self.slices = slices

        def forward(self, x):
            found = [x + 1]
            for conv in self.convs:
                y = conv(torch.cat(found, 1) if len(found) > 1 else found[0])
                found.append(y)
            if self.slices:
                found[0] = found[0][:, :2]
            return torch.cat(found, 1)

    boxes, graph = find_boxes(*_dense4(Dense()))
    cats = [node for node in boxes if node.startswith("cat")]
    assert [list(graph.predecessors(cat)) for cat in cats[1:]] == [
        [cats[i], f"convs_{i + 1}"] for i in range(len(cats) - 1)
    ]
    _, graph = find_boxes(*_dense4(Dense(slices=True)))
    assert set(graph.predecessors(cats[-1])) == {"x", *(f"convs_{i}" for i in range(5))}


def _dense4(model):
    coupling = couple(trace(model, torch.zeros(1, 4, 8, 8)))
    return coupling, torch.ones(coupling.num_channels, dtype=torch.bool).numpy()


def test_pictures_show_themselves_in_notebooks(coupling):
    assert draw_groups(coupling)._repr_png_().startswith(b"\x89PNG")
