"""Rewriting: literals follow the channels, and everything else about the network stays as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plans import cut
from small import Chain, Residual, settled
from torch import Tensor, nn

import fxprune

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module, inputs: Any = X, macs: float = 0.5) -> Any:
    return fxprune.compile(model, inputs, fxprune.Budget(macs=macs), progress=False)


class Literal(nn.Module):
    """Convolution to 24 channels, an op with a literal, and a layer that reads what comes out."""

    def __init__(self, op: Callable[[Tensor], Tensor], width: int = 24) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.op = op
        shape = op(torch.zeros(2, 24, 8, 8)).shape
        self.tail: nn.Module = nn.Conv2d(shape[1], 6, 1) if len(shape) == 4 else nn.Linear(shape[-1], 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.op(F.relu(self.conv(x))))


LITERALS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(-1, 24, 64).mean(2),
    "view_flat": lambda x: x.view(-1, 24 * 64),
    "view_size": lambda x: x.view(x.size(0), x.size(1) * 64),
    "reshape": lambda x: torch.reshape(x, (-1, 24, 64)).amax(2),
    "flatten": lambda x: x.flatten(1),
    "flatten_last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "unflatten": lambda x: x.unflatten(1, (4, 6)).flatten(1, 2),
    "shuffle": lambda x: x.view(-1, 4, 6, 8, 8).transpose(1, 2).reshape(-1, 24, 8, 8),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, 24, 8, 8),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "split": lambda x: torch.split(x, [8, 16], 1)[1],
    "split_equal": lambda x: sum(x.split(12, dim=1)),  # type: ignore[arg-type,return-value]
    "chunk": lambda x: torch.cat(x.chunk(3, 1)[::-1], 1),
    "tensor_split": lambda x: torch.tensor_split(x, 2, 1)[0],
    "unbind": lambda x: torch.stack(x.unbind(1)[2:14], 1),
    "slice": lambda x: x[:, 4:20],
    "slice_step": lambda x: x[:, ::2],
    "slice_end": lambda x: x[:, -6:],
    "index": lambda x: x[:, [5, 3, 17, 3]],
    "integer": lambda x: x[:, 7][:, None],
    "narrow": lambda x: x.narrow(1, 6, 12),
    "select": lambda x: x.select(1, 3).unsqueeze(1),
    "index_select": lambda x: torch.index_select(x, 1, torch.tensor([1, 4, 9])),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(5, 1),
    "pad": lambda x: F.pad(x, (0, 0, 0, 0, 4, 8)),
    "pad_space": lambda x: F.pad(x, (1, 1, 1, 1)),
    "crop": lambda x: F.pad(x, (0, 0, 0, 0, -4, -4)),
    "group_norm": lambda x: F.group_norm(x, 4),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (24,)).permute(0, 3, 1, 2),
    "glu": lambda x: F.glu(x, 1),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "zeros": lambda x: x + torch.zeros(1, 24, 1, 1),
    "new_ones": lambda x: x * x.new_ones(x.shape[0], 24, 1, 1),
    "scale_by_width": lambda x: x * x.shape[1] ** -0.5,
    "einsum": lambda x: torch.einsum("bchw->bc", x),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
}  # fmt: skip


HELD = ("unbind",)  # every position gets a name of its own in the graph, so none may go


@pytest.mark.parametrize("name", LITERALS)
def test_literals_follow_the_channels(name: str) -> None:
    model = Literal(LITERALS[name]).double().eval()
    smaller = 0
    for seed in range(3):
        coupling, plan, slim = cut(model, X.double(), seed)
        fxprune.verify(coupling, plan, slim)
        smaller += plan.costs.after.params < plan.costs.before.params
        with torch.no_grad():
            assert slim(torch.randn(5, 3, 8, 8, dtype=torch.float64)).shape[0] == 5
    assert smaller or name in HELD


MODULES: dict[str, Callable[[], nn.Module]] = {
    "grouped": lambda: nn.Conv2d(24, 24, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv2d(24, 48, 3, padding=1, groups=24),
    "transposed": lambda: nn.ConvTranspose2d(24, 12, 2, 2),
    "transposed_grouped": lambda: nn.ConvTranspose2d(24, 12, 2, 2, groups=3),
    "batch_norm": lambda: nn.BatchNorm2d(24),
    "batch_norm_plain": lambda: nn.BatchNorm2d(24, affine=False),
    "instance_norm": lambda: nn.InstanceNorm2d(24, affine=True),
    "group_norm": lambda: nn.GroupNorm(6, 24),
    "prelu": lambda: nn.PReLU(24),
    "unflatten": lambda: nn.Sequential(nn.Unflatten(1, (4, 6)), nn.Flatten(1, 2)),
    "channel_shuffle": lambda: nn.ChannelShuffle(4),
    "pixel_unshuffle": lambda: nn.PixelUnshuffle(2),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "dropout": lambda: nn.Dropout2d(0.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_say_what_their_parameters_say(name: str) -> None:
    model = settled(Literal(torch.relu).double())
    model.op = MODULES[name]().double()  # type: ignore[assignment]
    with torch.no_grad():
        model.tail = nn.Conv2d(model.op(torch.zeros(2, 24, 8, 8).double()).shape[1], 6, 1).double()
    model.eval()
    coupling, plan, slim = cut(model, X.double(), 1)
    fxprune.verify(coupling, plan, slim)
    assert plan.costs.after.params < plan.costs.before.params
    for module in slim.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            transposed = isinstance(module, nn.ConvTranspose2d)
            widths = (module.in_channels, module.out_channels // module.groups)
            if not transposed:
                widths = (module.out_channels, module.in_channels // module.groups)
            assert tuple(module.weight.shape[:2]) == widths
            assert module.bias is not None
            assert module.bias.shape == (module.out_channels,)
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)) and module.weight is not None:
            width = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
            assert module.weight.shape == (width,)
        if isinstance(module, nn.PReLU):
            assert module.weight.shape == (module.num_parameters,)


def test_names_kinds_and_dtypes_of_state_are_kept() -> None:
    model = settled(Chain()).double()
    model.conv2.weight.requires_grad_(False)
    slim = compiled(model, X.double())
    ours, theirs = slim.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    for name, t in ours.items():
        assert (t.dtype, t.device, t.requires_grad) == (
            theirs[name].dtype,
            theirs[name].device,
            theirs[name].requires_grad,
        )
        assert isinstance(t, nn.Parameter) == isinstance(theirs[name], nn.Parameter)
        assert t.data_ptr() != theirs[name].data_ptr()
    assert slim.bn.num_batches_tracked == model.bn.num_batches_tracked
    assert slim.conv1.out_channels == slim.bn.num_features == slim.conv2.in_channels < 16


def test_surviving_weights_are_bit_identical() -> None:
    model = settled(Residual())
    slim = compiled(model)
    plan = fxprune.report(slim).plan
    for name, dense in model.named_parameters():
        assert torch.equal(dict(slim.named_parameters())[name], plan.cut(name, dense))
    rows, columns = plan.kept["a1.weight", 0].tolist(), plan.kept["a1.weight", 1].tolist()
    assert torch.equal(slim.a1.weight, model.a1.weight[rows][:, columns])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.hidden = nn.Linear(12, 12)
        self.out = nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(x + F.relu(self.hidden(x)))


def test_tied_weights_stay_tied() -> None:
    tokens = torch.arange(6).reshape(2, 3)
    slim = compiled(Tied(), tokens)
    assert slim.embed.weight is slim.out.weight
    assert slim.embed.weight.shape[1] < 12
    assert slim.embed.embedding_dim == slim.out.in_features == slim.embed.weight.shape[1]
    assert [name for name, _ in slim.named_parameters()] == [name for name, _ in Tied().named_parameters()]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.block = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU())
        self.alias = self.block
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.block(self.stem(x))))


def test_shared_modules_stay_shared() -> None:
    slim = compiled(Shared())
    assert list(dict(slim.named_parameters())) == list(dict(Shared().named_parameters()))
    calls = [n.target for n in slim.graph.nodes if n.op == "call_module"]
    assert len([c for c in calls if slim.get_submodule(str(c)) is slim.get_submodule("block.0")]) == 2
    assert slim.get_submodule("block.0").weight.shape[0] < 12


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 13, 10)])
def test_batch_and_spatial_sizes_stay_dynamic(shape: tuple[int, ...]) -> None:
    model = settled(Residual()).double()
    slim = compiled(model, X.double())
    x = torch.randn(shape, dtype=torch.float64)
    plan = fxprune.report(slim).plan
    expected = fxprune.verifying.run_in(
        fxprune.masking.AbsentIsNaN(), fxprune.verifying.masked_copy(model, plan), (x,), {}
    )
    torch.testing.assert_close(slim(x), expected, rtol=1e-9, atol=1e-12)


def test_literal_views_stay_dynamic_in_the_batch() -> None:
    model = Literal(LITERALS["shuffle"])
    assert compiled(model)(torch.randn(7, 3, 8, 8)).shape == (7, 6, 8, 8)


def test_hooks_on_leaf_modules_still_run() -> None:
    model = settled(Chain())
    seen: list[tuple[int, ...]] = []
    model.conv1.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    slim = compiled(model)
    seen.clear()
    slim(X)
    assert seen == [(2, slim.conv1.out_channels, 8, 8)]


def test_memory_format_is_kept() -> None:
    model = settled(Residual()).to(memory_format=torch.channels_last)
    slim = compiled(model, X.to(memory_format=torch.channels_last))
    for name in ("a1", "a2"):
        weight = slim.get_submodule(name).weight
        assert weight.shape[0] < 16 or weight.shape[1] < 16
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


@pytest.mark.parametrize("training", [True, False])
def test_the_input_model_is_untouched(training: bool) -> None:
    model = settled(Residual())
    model.train(training)
    model.a1.eval()
    model.head.weight.requires_grad_(False)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    objects = {name: id(t) for name, t in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    x = X.clone()
    slim = compiled(model, x)
    assert torch.equal(x, X)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert objects == {name: id(p) for name, p in model.named_parameters()}
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert needs == {name: p.requires_grad for name, p in model.named_parameters()}
    assert attributes == {name: sorted(vars(m)) for name, m in model.named_modules()}
    assert all(p.grad is None and p.grad_fn is None for p in model.parameters())
    assert slim.training == training
    assert not slim.a1.training
    assert not slim.head.weight.requires_grad


def test_deepcopy_and_pickle_keep_outputs_and_report() -> None:
    slim = compiled(settled(Residual()))
    for other in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(other(X), slim(X))
        assert list(other.state_dict()) == list(slim.state_dict())
        assert fxprune.report(other).to_dict() == fxprune.report(slim).to_dict()
        assert other.stem.weight.data_ptr() != slim.stem.weight.data_ptr()


def test_dtype_can_be_changed() -> None:
    slim = compiled(settled(Chain()))
    double = copy.deepcopy(slim).to(torch.float64)
    assert double(X.double()).dtype == torch.float64
    torch.testing.assert_close(double(X.double()).float(), slim(X))
    assert slim.to(torch.bfloat16)(X.bfloat16()).dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    slim = compiled(settled(Chain()))
    other = copy.deepcopy(slim)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(other(X), slim(X))
    assert str(other.load_state_dict(slim.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(other(X), slim(X))


def test_the_slim_network_trains() -> None:
    slim = compiled(settled(Chain()))
    slim.train()
    running = slim.bn.running_mean.clone()
    optimizer = torch.optim.SGD(slim.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(slim(X), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in slim.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(running, slim.bn.running_mean)


def test_rewriting_is_repeatable_and_shares_nothing() -> None:
    coupling, plan, slim = cut(settled(Chain()), X, 0)
    again = fxprune.rewrite(coupling, plan)
    with torch.no_grad():
        for p in slim.parameters():
            p.add_(1)
    fxprune.verify(coupling, plan, again)


def test_what_cannot_be_rewritten_names_node_line_and_way_out() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, padding=1)
            self.conv = nn.Conv2d(16, 16, 1)
            self.tail = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.conv(self.first(x)).view(-1, 4, 4, 8, 8)[:, :, 1:3].flatten(1, 2))

    traced = fxprune.trace(Ragged(), X)
    coupling = fxprune.couple(traced)
    keep = np.ones(coupling.num_channels, dtype=bool)
    conv = next(s.channels.ravel() for s in coupling.sites if (s.name, s.dim) == ("conv.weight", 0))
    keep[conv[[0, 7, 8, 15]]] = False  # other positions in every row: no slice says that
    with pytest.raises(fxprune.RewriteError) as caught:
        fxprune.rewrite(coupling, fxprune.planning.plan_of(coupling, coupling.settle(keep)))
    assert list(caught.value.nodes) == ["getitem"]
    assert "[:, :, 1:3]" in str(caught.value)
    assert "freeze=" in str(caught.value)
    slim = fxprune.compile(Ragged(), X, fxprune.Budget(macs=0.15), method=fxprune.methods.Random(), progress=False)
    assert slim(X).shape == (2, 2, 8, 8)
    assert slim.first.out_channels < 16 == slim.conv.out_channels
    assert any(
        "'getitem' was frozen" in note and "rows keep different positions" in note
        for note in fxprune.report(slim).notes
    )
