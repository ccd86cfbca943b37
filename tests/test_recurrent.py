"""Recurrent layers: input, hidden and projection sizes shrink, and every layer keeps units of its own."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import recurrent
from networks.recurrent import Tagger
from plans import all_kept, cut
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import Budget
from fxprune.masking import AbsentIsNaN, InFloat64
from fxprune.verifying import masked_copy, run_in

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # what torch says, running one

STEPS = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0))
LAYERS = [
    (kind, {"num_layers": layers, "bidirectional": both, **more})
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for layers, both, more in [
        (1, False, {}),
        (1, True, {"bias": False}),
        (3, False, {"batch_first": True, "dropout": 0.1}),
        (2, True, {}),
        *([(2, True, {"proj_size": 5}), (1, False, {"proj_size": 5, "bias": False})] if kind is nn.LSTM else []),
    ]
]
LAYER = pytest.mark.parametrize(
    ("kind", "settings"), LAYERS, ids=[f"{k.__name__}-{'-'.join(map(str, s.values()))}" for k, s in LAYERS]
)
DRAW = torch.Generator().manual_seed(0)
NETWORKS: dict[type[nn.Module], tuple[Tensor, int]] = {
    recurrent.LastStep: (torch.randint(0, 20, (4, 7), generator=DRAW), 1),
    recurrent.LastStates: (STEPS, 0),
    recurrent.Projected: (STEPS, 1),
    recurrent.Residual: (STEPS, 1),
    recurrent.Captions: (torch.randn(2, 3, 8, 10, generator=DRAW), 3),
    recurrent.ChannelByChannel: (torch.randn(2, 3, 9, generator=DRAW), 2),
    recurrent.AlongTime: (STEPS.transpose(0, 1).contiguous(), 0),
    recurrent.Translator: (STEPS, 0),
    recurrent.FromZeros: (STEPS, 0),
    recurrent.FromLearned: (STEPS, 1),
    recurrent.NoBatch: (STEPS[:, 0], 0),
    recurrent.Cells: (STEPS, 1),
}
"""Network -> example inputs, and a dim that may be longer: the batch or the steps."""


def lively(model: Any) -> Any:
    """Give every weight a size at which gates are neither open nor shut, and states are not small."""
    for t in model.parameters():
        t.data.normal_(0, 0.5)
    return model.eval()


def tagger(kind: Any, **settings: Any) -> Any:
    return lively(Tagger(kind(10, 16, **settings)))


def halved(model: nn.Module, inputs: Any = STEPS, **settings: Any) -> Any:
    return fxprune.compile(model, inputs, Budget(macs=0.5), progress=False, **settings)


def error_of(slim: Any) -> float:
    """Return how far the slim network was from the masked original."""
    verification = fxprune.report(slim).verification
    assert verification is not None
    return verification.worst


def counted_macs(model: nn.Module, x: Tensor) -> int:
    """Count the macs of a float64 copy: in float32 the layer may be one op that nobody counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).double()(x.double())
    return counter.get_total_flops() // 2


@LAYER
def test_every_kind_of_layer_is_halved(kind: Any, settings: dict[str, Any]) -> None:
    model = tagger(kind, **settings)
    slim = halved(model)
    layer, report = slim.layer, fxprune.report(slim)
    assert type(layer) is kind
    assert not report.notes
    assert error_of(slim) < 1e-12
    assert layer.hidden_size < 16
    assert layer.input_size == slim.first.out_features
    assert slim.state_dict().keys() == model.state_dict().keys()
    sizes = settings | ({"proj_size": layer.proj_size} if layer.proj_size else {})
    fresh = kind(layer.input_size, layer.hidden_size, **sizes)
    assert {k: t.shape for k, t in layer.state_dict().items()} == {k: t.shape for k, t in fresh.state_dict().items()}
    assert repr(layer) == repr(fresh)


@LAYER
def test_macs_are_those_of_the_layer(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    model = tagger(kind, **settings)
    costs = fxprune.report(slim := halved(model)).costs
    assert costs.before.macs == counted_macs(model, STEPS)
    assert costs.after.macs == counted_macs(slim, STEPS) <= costs.before.macs / 2
    assert costs.after.params == sum(p.numel() for p in slim.parameters())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_networks_satisfy_the_theorem(network: type[nn.Module], seed: int) -> None:
    model, (x, dim) = lively(network()), NETWORKS[network]
    coupling, plan, slim = cut(model, x, seed)
    assert coupling.traced.frontend == "symbolic_trace"
    assert fxprune.verify(coupling, plan, slim).worst < 1e-12
    assert plan.costs.after.params == sum(p.numel() for p in slim.parameters()) <= plan.costs.before.params
    longer = torch.cat([x, x], dim)
    expected = run_in(AbsentIsNaN(), masked_copy(model, plan), (longer,), {})
    found = run_in(InFloat64(), slim.double(), (longer,), {})
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_all_sizes_shrink_and_nothing_is_frozen_that_need_not_be(network: type[nn.Module]) -> None:
    slim = halved(lively(network()), NETWORKS[network][0])
    assert not fxprune.report(slim).notes
    for module in slim.modules():
        if isinstance(module, (nn.RNNBase, nn.modules.rnn.RNNCellBase)):
            dense: Any = network().get_submodule(next(name for name, m in slim.named_modules() if m is module))
            assert module.hidden_size < dense.hidden_size


@LAYER
def test_keeping_all_is_the_identity(kind: type[nn.Module], settings: dict[str, Any]) -> None:
    model = tagger(kind, **settings)
    coupling = fxprune.couple(fxprune.trace(model, STEPS))
    slim = fxprune.rewrite(coupling, all_kept(coupling))
    assert repr(slim.layer) == repr(model.layer)
    torch.testing.assert_close(slim(STEPS), model(STEPS), rtol=0, atol=0)


def test_the_slim_layer_is_the_one_sliced_by_hand() -> None:
    model = tagger(nn.LSTM).double()
    _, plan, slim = cut(model, STEPS.double(), 1)
    inputs, units = (plan.kept[f"layer.weight_{which}_l0", 1].copy() for which in ("ih", "hh"))
    assert len(inputs) < 10
    assert len(units) < 16
    rows = np.concatenate([gate * 16 + units for gate in range(4)])
    layer: Any = nn.LSTM(len(inputs), len(units)).double()
    first = model.first
    with torch.no_grad():
        layer.weight_ih_l0.copy_(model.layer.weight_ih_l0[rows][:, inputs])
        layer.weight_hh_l0.copy_(model.layer.weight_hh_l0[rows][:, units])
        layer.bias_ih_l0.copy_(model.layer.bias_ih_l0[rows])
        layer.bias_hh_l0.copy_(model.layer.bias_hh_l0[rows])
        y = layer(nn.functional.linear(STEPS.double(), first.weight[inputs], first.bias[inputs]))[0]
        expected = nn.functional.linear(torch.relu(y), model.out.weight[:, units], model.out.bias)
        torch.testing.assert_close(slim(STEPS.double()), expected, rtol=1e-12, atol=1e-14)


def kept_units(model: nn.Module) -> list[list[int]]:
    """Return which hidden units every layer and direction keeps at half the macs."""
    kept = fxprune.plan(fxprune.couple(fxprune.trace(model, STEPS)), Budget(macs=0.5)).kept
    return [units.tolist() for (name, dim), units in kept.items() if "weight_hh" in name and dim == 1]


def test_every_layer_and_direction_keeps_units_of_its_own() -> None:
    kept = kept_units(tagger(nn.LSTM, num_layers=2, bidirectional=True))
    assert len({tuple(units) for units in kept}) == len(kept) == 4
    assert len({len(units) for units in kept}) == 1


def test_layers_that_begin_with_the_same_constant_keep_the_same_units() -> None:
    first, second = kept_units(lively(recurrent.FromZeros()))
    assert first == second
    assert len(first) < 12


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 5}), (nn.GRU, {}), (nn.GRU, {"bias": False}), (nn.RNN, {})],
)
def test_what_stands_in_for_a_layer_couples_what_the_layer_does(kind: Any, settings: dict[str, Any]) -> None:
    model = tagger(kind, **settings)
    short = fxprune.couple(fxprune.trace(model, STEPS))
    model.layer.register_forward_hook(lambda *args: None)  # run itself, as its hooks may do anything
    whole = fxprune.couple(fxprune.trace(model, STEPS))
    assert len(whole.record.ledger.ties) > 3 * len(short.record.ledger.ties)
    assert renumbered(short) == renumbered(whole)
    dense = [c.costs(np.ones(c.num_channels, dtype=bool)) for c in (short, whole)]
    assert (dense[0].macs, dense[0].params) == (dense[1].macs, dense[1].params)


def renumbered(coupling: fxprune.Coupling) -> dict[tuple[str, int], list[tuple[int, bool]]]:
    """Return the channels of all sites, numbered as they are met there, and whether they are frozen."""
    number: dict[int, int] = {}
    return {
        (site.name, site.dim): [
            (number.setdefault(c, len(number)), bool(coupling.is_frozen[c])) for c in site.channels.ravel().tolist()
        ]
        for site in sorted(coupling.sites, key=lambda site: (site.name, site.dim))
    }


def test_coupling_takes_no_longer_for_longer_sequences() -> None:
    model = tagger(nn.LSTM, num_layers=2, bidirectional=True)
    short, long = (fxprune.couple(fxprune.trace(model, torch.randn(n, 2, 6))).record for n in (2, 2000))
    assert short.steps == long.steps
    assert len(short.ledger.ties) == len(long.ledger.ties)


def test_hooked_layers_shrink_too() -> None:
    model, seen = tagger(nn.GRU, num_layers=2), []
    model.layer.register_forward_pre_hook(lambda *args: seen.append(1))
    slim = halved(model)
    assert slim.layer.hidden_size < 16
    assert error_of(slim) < 1e-12
    before = len(seen)
    slim(STEPS)
    assert len(seen) == before + 1


def test_slim_networks_train_copy_and_pickle(tmp_path: Path) -> None:
    model = tagger(nn.LSTM, num_layers=2, bidirectional=True, proj_size=6)
    slim, another = halved(model), tagger(nn.LSTM, num_layers=2, bidirectional=True, proj_size=6)
    expected = slim(STEPS)
    file = io.BytesIO()
    torch.save(slim, file)
    file.seek(0)
    fxprune.save(slim, tmp_path / "slim")
    others = copy.deepcopy(slim), pickle.loads(pickle.dumps(slim)), torch.load(file, weights_only=False)
    for other in (*others, fxprune.load(tmp_path / "slim", another)):
        torch.testing.assert_close(other(STEPS), expected, rtol=0, atol=0)
    for net in (slim, *others):
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(net(STEPS).pow(2).mean())
            losses[-1].backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
            optimizer.step()
        assert losses[2] < losses[1] < losses[0]
        assert all(a is b for a, b in zip(net.layer._flat_weights, net.layer.parameters(), strict=True))


def test_lower_precisions_stay() -> None:
    slim = halved(tagger(nn.GRU).bfloat16(), STEPS.bfloat16())
    assert slim(STEPS.bfloat16()).dtype == torch.bfloat16


def test_loops_that_only_export_traces_shrink() -> None:
    slim = halved(lively(recurrent.LoopOverSteps()))
    assert error_of(slim) < 1e-12
    assert slim.state_dict()["cell.weight_hh"].shape[1] < 12


class States(nn.Module):
    """Initial states from outside, and the last ones returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.out = nn.Linear(6, 10), nn.LSTM(10, 16, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return self.out(self.layer(self.first(x), (h, c))[0])


def test_states_from_outside_keep_their_size() -> None:
    states = torch.randn(2, 2, 4, 16)
    slim: Any = fxprune.compile(lively(States()), (STEPS, *states), Budget(macs=0.9), progress=False)
    assert slim.layer.hidden_size == 16
    assert slim.layer.input_size < 10
    assert slim(STEPS, *states).shape == (7, 4, 5)
    coupling = fxprune.couple(fxprune.trace(States(), (STEPS, *states)))
    assert "combined with a dim whose size cannot change" in coupling.why_frozen("layer.weight_hh_l0")


def test_a_projection_stays_smaller_than_what_it_projects() -> None:
    model = lively(Tagger(nn.LSTM(10, 6, proj_size=5)))
    for seed in range(20):
        coupling, plan, slim = cut(model, STEPS, seed)
        layer: Any = slim.layer
        assert layer.proj_size < layer.hidden_size
        assert fxprune.verify(coupling, plan, slim).worst < 1e-12


class Packing(nn.Module):
    """Packs what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.layer(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))[1]


def test_packed_sequences_are_refused_by_name() -> None:
    packed, lengths = rnn.pack_sequence([torch.randn(5, 6), torch.randn(3, 6)]), torch.tensor([7, 3, 5, 2])
    for model, inputs in [(Packing(), (STEPS, lengths)), (nn.GRU(6, 8), (packed,)), (nn.GRU(6, 8), packed)]:
        with pytest.raises(fxprune.TraceError, match="a PackedSequence cannot be followed: pad the sequences"):
            fxprune.trace(model, inputs)


class Wrapped(nn.Module):
    """Makes a packed sequence where the trace does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.pack, self.layer = Pack(), nn.GRU(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.pack(x))[1]


class Pack(nn.Module):
    """Asks for `self.training`, and is left whole for that."""

    def forward(self, x: Tensor) -> Any:
        return rnn.PackedSequence(x.flatten(0, 1), torch.tensor([4] * 7)) if not self.training else x


def test_packed_sequences_from_inside_are_refused_by_name() -> None:
    with pytest.raises(fxprune.TraceError, match="a PackedSequence cannot be followed: pad the sequences"):
        fxprune.couple(fxprune.trace(Wrapped().eval(), STEPS))


class Begun(nn.Module):
    """A state from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 8)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.layer(x, h)[0]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(7, 4, 5), r"input.size\(-1\) must be equal to input_size. Expected 6, got 5"),
        (torch.randn(7, 4, 6, 6), "input must have 3 dimensions, got 4"),
        (torch.randn(6), "input must have 3 dimensions, got 1"),
        (STEPS.double(), "does not match weight dtype"),
        ((STEPS, torch.randn(2, 4, 8)), r"Expected hidden size \(1, 4, 8\), got \[2, 4, 8\]"),
        ((STEPS[:, 0], torch.randn(1, 4, 8)), "Expected hidden size"),
        (STEPS[:0], None),
    ],
    ids=["width", "rank 4", "rank 1", "dtype", "state", "state of no batch", "no steps"],
)
def test_inputs_that_the_layer_does_not_take(inputs: Any, words: str | None) -> None:
    model = nn.Sequential(nn.GRU(6, 8)) if isinstance(inputs, Tensor) else Begun()
    with pytest.raises(fxprune.FxPruneError, match=words):
        fxprune.couple(fxprune.trace(model, inputs))
