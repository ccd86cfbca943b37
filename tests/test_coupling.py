"""The coupling: its invariants on random networks, its answers in words, and what it does about unknown ops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from small import Chain, Multitask, Residual
from strategies import Network, build, example_inputs, networks, random_network
from torch import Tensor, nn

import fxprune
from fxprune import Coupling, CouplingError

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FIXED = -1


def coupled(model: nn.Module, inputs: object = X, **settings: object) -> Coupling:
    return fxprune.couple(fxprune.trace(model, inputs), **settings)  # type: ignore[arg-type]


def channels_of(coupling: Coupling, name: str, dim: int) -> np.ndarray:
    return next(s.channels for s in coupling.sites if (s.name, s.dim) == (name, dim)).ravel()


def check_invariants(coupling: Coupling) -> None:
    count = coupling.num_channels
    state = dict(coupling.traced.module.named_parameters()) | dict(coupling.traced.module.named_buffers())
    seen = []
    for site in coupling.sites:
        channels = site.channels
        assert channels.dtype == np.int64
        assert channels.min() >= FIXED
        assert channels.max() < count
        if site.name in state:
            shape = tuple(state[site.name].shape)
            assert channels.shape[site.dim] == shape[site.dim]
            np.broadcast_shapes(channels.shape, shape)
            assert channels.ndim == len(shape)
            assert site.is_parameter == isinstance(state[site.name], nn.Parameter)
        seen.append(channels.ravel())
    for batch in coupling.rows:
        assert batch.columns.shape[0] == len(batch.row)
        assert batch.node in {n.name for n in coupling.traced.graph.nodes}
        assert batch.columns.max() < count
        seen += [batch.columns.ravel(), batch.row]
    seen += [coupling.products.channel, coupling.products.row, coupling.products.column]
    everything = np.concatenate(seen)
    assert set(everything[everything != FIXED].tolist()) <= set(range(count))
    assert (
        coupling.has_site == np.isin(np.arange(count), np.concatenate([*seen[: len(coupling.sites)], [FIXED]]))
    ).all()
    check_numbering(coupling)
    check_frozen(coupling)
    check_groups(coupling)


def check_numbering(coupling: Coupling) -> None:
    """Check that sites are in graph order."""
    order = {name: i for i, name in enumerate(coupling.tensors)}
    places = [order[site.name] for site in coupling.sites]
    assert places == sorted(places)


def check_frozen(coupling: Coupling) -> None:
    nodes = {n.name for n in coupling.traced.module.graph.nodes}
    held = np.concatenate([f.channels for f in coupling.frozen] or [np.empty(0, dtype=np.int64)])
    assert len(np.unique(held)) == len(held)
    fixed = np.concatenate([f.channels for f in coupling.fixed] or [np.empty(0, dtype=np.int64)])
    assert set(fixed.tolist()) == set(np.flatnonzero(coupling.is_frozen).tolist())
    for frozen in coupling.frozen:
        assert frozen.node in nodes
        assert frozen.reason
        assert len(frozen.channels)


def check_groups(coupling: Coupling) -> None:
    chosen: list[int] = []
    for index, group in enumerate(coupling.groups()):
        assert group.index == index
        assert group.kind in ("channels", "balanced", "rows")
        assert group.name in coupling.tensors
        assert len(group.cells) == len(group.takes) >= 1
        assert group.width == sum(map(len, group.cells))
        chosen += group.choices.tolist()
    assert len(chosen) == len(set(chosen))
    decided = np.isin(coupling.members.choice, chosen)
    reached = np.unique(coupling.members.channel[decided])
    free = np.flatnonzero(coupling.has_site & ~coupling.is_frozen)
    reported = {c for f in coupling.frozen for c in f.channels.tolist()}
    assert set(np.flatnonzero(coupling.has_site).tolist()) <= reported | set(reached.tolist())
    assert not reported & set(reached[coupling.has_site[reached]].tolist()) - set(np.flatnonzero(coupling.is_frozen))
    assert not coupling.is_frozen[np.array(chosen, dtype=np.int64)].all() or not chosen
    if not coupling.rows and not len(coupling.products.channel):
        assert set(free.tolist()) == set(chosen) == set(reached.tolist())


@given(network=networks())
@settings(max_examples=40)
def test_invariants_on_drawn_networks(network: Network) -> None:
    check_invariants(coupled(build(network), example_inputs(network)))


@pytest.mark.parametrize("first", [0, 20])
def test_invariants_on_seeded_networks(first: int) -> None:
    for seed in range(first, first + 20):
        network = random_network(seed)
        check_invariants(coupled(build(network), example_inputs(network)))


@pytest.mark.parametrize("model", [Chain(), Residual(), Multitask()], ids=lambda m: type(m).__name__)
def test_channels_are_numbered_as_they_first_occur(model: nn.Module) -> None:
    coupling = coupled(model)
    check_invariants(coupling)
    channels = np.concatenate([s.channels.ravel() for s in coupling.sites])
    _, firsts = np.unique(channels[channels != FIXED], return_index=True)
    assert (np.diff(firsts) > 0).all()


def test_keeping_all_is_legal_and_settling_changes_nothing() -> None:
    for seed in range(40, 60):
        network = random_network(seed)
        coupling = coupled(build(network), example_inputs(network))
        everything = np.ones(coupling.num_channels, dtype=bool)
        assert np.array_equal(coupling.settle(everything), everything)
        assert coupling.violation(everything) is None


def test_residual_branches_are_one_group() -> None:
    coupling = coupled(Residual())
    trunk = channels_of(coupling, "stem.weight", 0)
    for name, dim in (
        ("stem.bias", 0),
        ("a1.weight", 1),
        ("a2.weight", 0),
        ("a2.bias", 0),
        ("b1.weight", 1),
        ("b2.weight", 0),
        ("head.weight", 1),
    ):
        assert np.array_equal(channels_of(coupling, name, dim), trunk), (name, dim)
    assert len(set(trunk.tolist())) == 16
    assert not set(channels_of(coupling, "a1.weight", 0)) & set(trunk)
    assert np.array_equal(channels_of(coupling, "a1.weight", 0), channels_of(coupling, "a2.weight", 1))


def test_inputs_and_outputs_are_frozen() -> None:
    coupling = coupled(Multitask())
    for name in ("seg.2.weight", "present.weight"):
        channels = channels_of(coupling, name, 0)
        assert coupling.is_frozen[channels[channels != FIXED]].all()
    channels = channels_of(coupling, "trunk.0.weight", 1)
    assert coupling.is_frozen[channels[channels != FIXED]].all()
    assert not coupling.is_frozen[channels_of(coupling, "seg.0.weight", 0)].any()


def test_grouped_convolutions_choose_inputs_per_group() -> None:
    coupling = coupled(Residual())
    inner = next(s for s in coupling.sites if (s.name, s.dim) == ("b2.weight", 1))
    assert inner.channels.shape == (16, 4, 1, 1)
    rows = inner.channels[:, :, 0, 0]
    assert np.array_equal(rows[::4].ravel(), channels_of(coupling, "b1.weight", 0))
    assert all((rows[i : i + 4] == rows[i]).all() for i in (0, 4, 8, 12))
    assert any(batch.columns.shape == (4, 4) or batch.columns.shape[1] == 4 for batch in coupling.rows)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embed(tokens))


def test_tied_weights_have_one_set_of_sites() -> None:
    coupling = coupled(Tied(), torch.arange(6).reshape(2, 3))
    assert [(s.name, s.dim) for s in coupling.sites] == [("embed.weight", 0), ("embed.weight", 1)]
    assert coupling.is_frozen[channels_of(coupling, "embed.weight", 0)].all()
    assert not coupling.is_frozen[channels_of(coupling, "embed.weight", 1)].any()


class Elsewhere(nn.Module):
    """The bias of a layer has another name too, which comes first and is not the one that forward goes by."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(12))
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.b.bias = self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Backwards(nn.Module):
    """The projection onto the output is declared before the table that it shares."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 4, bias=False)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.shared = nn.Embedding(4, 16)
        self.out.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.shared(x)
        return self.out(y + self.down(self.up(y).relu()))


@pytest.mark.parametrize(
    ("kind", "inputs", "name", "keep"),
    [
        (Elsewhere, torch.ones(8, 4), "b.bias", "a"),
        (Backwards, torch.zeros(8, 2, dtype=torch.int64), "shared.weight", "up"),
    ],
)
def test_shared_tensors_have_the_name_of_the_graph(kind: type[nn.Module], inputs: Tensor, name: str, keep: str) -> None:
    torch.manual_seed(0)
    model = kind()
    traced = fxprune.trace(model, inputs)
    assert name in {site.name for site in fxprune.couple(traced).sites}
    assert not traced.notes
    slim = fxprune.compile(
        model,
        inputs,
        fxprune.Budget(macs=0.5),
        calibration=[(inputs, torch.zeros(1))] * 2,
        tasks={"task": fxprune.Task(lambda y, b: y.square().mean())},
        constraints=fxprune.Constraints(keep_outputs=[keep]),
        progress=False,
    )
    assert slim.get_parameter(name).numel() < model.get_parameter(name).numel()
    moved = fxprune.transfer(torch.optim.Adam(model.parameters()), slim, model=model).param_groups[0]["params"]
    assert {id(p) for p in moved} == {id(p) for p in slim.parameters()}


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.relu(self.block(self.stem(x)))))


def test_a_module_used_twice_ties_its_input_to_its_output() -> None:
    coupling = coupled(Repeated())
    trunk = channels_of(coupling, "stem.weight", 0)
    assert np.array_equal(channels_of(coupling, "block.weight", 0), trunk)
    assert np.array_equal(channels_of(coupling, "block.weight", 1), trunk)
    assert len([s for s in coupling.sites if s.name == "block.weight" and s.dim < 2]) == 2


# in words


def test_the_graph_is_a_networkx_graph_of_sites() -> None:
    coupling = coupled(Residual())
    graph = coupling.graph
    assert type(graph) is nx.Graph
    assert {(s.name, s.dim) for s in coupling.sites} <= set(graph.nodes)
    nodes = {n.name for n in coupling.traced.module.graph.nodes}
    assert graph.number_of_edges()
    for _, _, data in graph.edges(data=True):
        assert data["node"] in nodes
        assert data["relation"] in ("tie", "row", "crossing")
    assert nx.has_path(graph, ("stem.weight", 0), ("head.weight", 1))
    assert not nx.has_path(graph, ("a1.weight", 0), ("stem.weight", 0))


def test_explaining_reads_a_chain_of_ties() -> None:
    coupling = coupled(Residual())
    lines = coupling.explain(("stem.weight", 0), ("head.weight", 1)).splitlines()
    assert lines[0] == "stem.weight[0]"
    assert "head.weight[1]" in lines[-1]
    assert len(lines) >= 2
    for line in lines[1:]:
        assert line.startswith(("  is tied to ", "  shares rows with ", "  crosses "))
        assert " at node '" in line
        assert "(small.py:" in line
    assert (
        coupling.explain("a1.weight", "a1.bias")
        .splitlines()[-1]
        .startswith("  is tied to a1.bias[0] at node 'a1' (small.py:")
    )


def test_explaining_what_is_not_coupled() -> None:
    coupling = coupled(Residual())
    assert coupling.explain(("a1.weight", 0), ("stem.weight", 0)).endswith(
        "are not coupled: no chain of ties joins them."
    )
    assert coupling.explain(("a1.weight", 0), ("a1.weight", 0)) == "a1.weight[0] is one and the same site."


@pytest.mark.parametrize(
    "question", [lambda c: c.explain("stem.weight", "tail.weight"), lambda c: c.why_frozen("tail.weight")]
)
def test_asking_for_a_parameter_that_is_not_there(question: object) -> None:
    with pytest.raises(CouplingError, match=r"no parameter 'tail\.weight'.*for example: \w+\.weight"):
        question(coupled(Residual()))  # type: ignore[operator]


def test_why_frozen_tells_how_many_where_and_why() -> None:
    coupling = coupled(Residual())
    assert coupling.why_frozen(("a1.weight", 0)) == "a1.weight[0]: nothing is frozen, all 16 channels may go."
    lines = coupling.why_frozen(("head.weight", 0)).splitlines()
    assert lines[0] == "head.weight[0]: 5 of 5 channels may not go:"
    assert lines[1] == "  5 because node 'output' is an output of the network"
    stem = coupling.why_frozen(("stem.weight", 1))
    assert stem.startswith("stem.weight[1]: 3 of 3 channels may not go:")
    assert "node 'stem' (small.py:" in stem


# unknown ops


class Unknown(nn.Module):
    """Two ops that no rule knows, on two branches, and one branch without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.linalg.svdvals(self.a(x)).unsqueeze(1)
        b = torch.linalg.matrix_exp(self.b(x)[:, :4, :4]).sum((1, 2), keepdim=True)
        return self.out(torch.relu(self.c(x))) + a[:, :, :1] + b


UNKNOWN = torch.randn(3, 6, 8)


def test_unknown_ops_freeze_what_reaches_them_and_nothing_else() -> None:
    coupling = coupled(Unknown(), UNKNOWN)
    a = channels_of(coupling, "a.weight", 0)
    assert coupling.is_frozen[a].all()
    assert not coupling.is_frozen[channels_of(coupling, "c.weight", 0)].any()
    text = coupling.why_frozen(("a.weight", 0))
    assert "_linalg_svd" in text
    assert "which has no rule" in text
    assert "test_coupling.py:" in text
    assert "torch.linalg.svdvals(self.a(x))" in text


def test_unknown_ops_are_all_named_at_once() -> None:
    with pytest.raises(CouplingError) as caught:
        coupled(Unknown(), UNKNOWN, unknown="error")
    message = str(caught.value)
    assert "have no rule" in message
    for words in ("_linalg_svd", "matrix_exp", "test_coupling.py:", "@fxprune.rules.rule", '`unknown="freeze"`'):
        assert words in message
    assert message.count(" at node ") >= 2


def test_known_ops_pass_the_strict_mode() -> None:
    for model in (Chain(), Residual(), Multitask()):
        assert coupled(model, unknown="error").fingerprint == coupled(model).fingerprint


def test_other_words_for_unknown_are_refused() -> None:
    with pytest.raises(CouplingError, match="unknown='ignore' is neither 'freeze' nor 'error'"):
        coupled(Chain(), unknown="ignore")


def test_freezing_nodes_by_name() -> None:
    coupling = coupled(Residual(), freeze={"a1": "is mine"})
    assert coupling.is_frozen[channels_of(coupling, "a1.weight", 0)].all()
    assert "node 'a1'" in coupling.why_frozen(("a1.weight", 0))
    assert "is mine" in coupling.why_frozen(("a1.weight", 0))
    assert not coupling.is_frozen[channels_of(coupling, "b1.weight", 0)].any()
    with pytest.raises(CouplingError, match="'nowhere', which the graph does not have"):
        coupled(Residual(), freeze={"nowhere": "is mine"})


# numbering

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import fxprune
from small import Multitask, Residual
from strategies import build, example_inputs, random_network
import torch
for model in (Residual(), Multitask()):
    print(fxprune.couple(fxprune.trace(model, torch.zeros(2, 3, 8, 8))).fingerprint)
for seed in range(12):
    network = random_network(seed)
    print(fxprune.couple(fxprune.trace(build(network), example_inputs(network))).fingerprint)
"""


def test_numbering_is_the_same_in_every_process() -> None:
    found = []
    for seed in ("0", "1234"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(Path(__file__).parent)],
            capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        found.append(done.stdout.split())
    assert found[0] == found[1]
    assert len(set(found[0])) == 14


def test_fingerprints_tell_networks_apart_but_not_checkpoints() -> None:
    torch.manual_seed(0)
    first = coupled(Residual()).fingerprint
    torch.manual_seed(1)
    assert coupled(Residual(), torch.randn(1, 3, 16, 16)).fingerprint == first
    assert coupled(Residual(24)).fingerprint != first
    assert coupled(Chain()).fingerprint != first


class Product(nn.Module):
    """Rows of which each repeats its channels at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rows, self.columns = nn.Linear(8, 6), nn.Linear(3, 3, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)).unflatten(-1, (3, 2))
        return torch.einsum("...hd,gh,ed->...ge", y, self.rows.weight, self.columns.weight).flatten(-2)


def test_rows_may_repeat_channels_more_often_than_there_are_channels() -> None:
    coupling = coupled(Product(), torch.randn(2, 64, 8))
    rows = next(g for g in coupling.groups() if g.kind == "rows")
    keep = np.ones(coupling.num_channels, dtype=bool)
    keep[rows.cells[0][0]] = False
    assert coupling.violation(coupling.settle(keep)) is None


class Pairs(nn.Module):
    """Groups of two channels that only go together, read by a weight that is computed: its columns hold all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 1), nn.Conv3d(4, 4, (3, 3, 3), padding=1)
        self.b = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 16, 3, padding=1, groups=4))
        self.out, self.more = nn.Conv2d(16, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return self.out(self.b(x)), self.more(self.c(x.unflatten(1, (-1, 2))).flatten(1, 2))


def test_what_a_channel_needs_stays() -> None:
    coupling = coupled(Pairs())
    columns = channels_of(coupling, "b.parametrizations.weight.original1", 1)
    assert coupling.is_frozen[columns].all()
    assert "is needed by rows" in coupling.why_frozen(("b.parametrizations.weight.original1", 1))
    assert not coupling.is_frozen[channels_of(coupling, "a.weight", 0)].any()
    report = fxprune.report(fxprune.compile(Pairs().eval(), X, fxprune.Budget(params=0.5), progress=False))
    assert report.verification is not None
    assert report.verification.passed
