"""The proof itself: it passes for the right reason, and a broken network does not pass."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plans import all_kept, cut
from small import Chain, Multitask, Residual, settled
from torch import Tensor, nn

import fxprune
from fxprune import VerificationError
from fxprune.masking import AbsentIsNaN
from fxprune.verifying import masked_copy, relative_error, run_in

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class ByHand(nn.Module):
    """A small network whose masked form is written down by hand below: convolutions, norms, softmax, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.sigmoid(self.bn(self.a(x)))  # sigmoid: what is zero before is not zero after
        x = self.b(x).mean((2, 3))
        return {"logits": self.head(self.norm(x)), "spread": F.softmax(x, 1).amax(1), "mean": x.mean(1)}


def masked_by_hand(net: Any, x: Tensor, a: list[int], b: list[int]) -> dict[str, Tensor]:
    """Compute the outputs with the channels `a` and `b` alone, in terms of the dense weights."""
    here_a, here_b = torch.zeros(8, dtype=x.dtype), torch.zeros(12, dtype=x.dtype)
    here_a[a], here_b[b] = 1, 1
    x = torch.sigmoid(net.bn(net.a(x))) * here_a[:, None, None]
    x = net.b(x).mean((2, 3))
    mean = (x * here_b).sum(1, keepdim=True) / len(b)
    var = ((x - mean) ** 2 * here_b).sum(1, keepdim=True) / len(b)
    y = ((x - mean) / (var + net.norm.eps).sqrt() * net.norm.weight + net.norm.bias) * here_b
    e = torch.exp(x) * here_b
    return {"logits": net.head(y), "spread": (e / e.sum(1, keepdim=True)).amax(1), "mean": mean.squeeze(1)}


def halved(model: nn.Module) -> tuple[fxprune.Coupling, fxprune.Plan, Any]:
    """Cut a network to half its multiply-accumulates; what is left of it is alive."""
    coupling = fxprune.couple(fxprune.trace(model, X))
    plan = fxprune.plan(coupling, fxprune.Budget(macs=0.5))
    return coupling, plan, fxprune.rewrite(coupling, plan)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_the_masked_network_by_hand(seed: int) -> None:
    model = settled(ByHand()).double()
    coupling, plan, slim = cut(model, X, seed)
    assert fxprune.verify(coupling, plan, slim).errors.keys() == {"logits", "spread", "mean"}
    kept = [plan.kept[name, 0].tolist() for name in ("a.weight", "b.weight")]
    assert len(kept[0]) < 8 or len(kept[1]) < 12
    with torch.no_grad():
        expected = masked_by_hand(model, X, *kept)
        reference, found = run_in(AbsentIsNaN(), masked_copy(model, plan), (X,), {}), slim(X)
    for name in expected:
        torch.testing.assert_close(reference[name], expected[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def test_the_reference_differs_from_the_dense_network() -> None:
    model = settled(Residual()).double()
    coupling, plan, slim = halved(model)
    with torch.no_grad():
        dense, masked = model(X), run_in(AbsentIsNaN(), masked_copy(model, plan), (X,), {})
    assert relative_error(masked, dense) > 1e-3
    assert masked.isfinite().all()
    assert fxprune.verify(coupling, plan, slim).worst < 1e-12
    with pytest.raises(VerificationError):
        fxprune.verify(coupling, all_kept(coupling), slim)


def test_the_reference_of_the_whole_network_is_the_network() -> None:
    model = settled(Multitask()).double()
    plan = all_kept(fxprune.couple(fxprune.trace(model, X)))
    with torch.no_grad():
        masked, dense = run_in(AbsentIsNaN(), masked_copy(model, plan), (X,), {}), model(X)
    assert all(torch.equal(masked[name], dense[name]) for name in dense)


def swapped(slim: Any) -> None:
    """Give two channels of one layer, and of it alone, each other's weights."""
    with torch.no_grad():
        slim.get_submodule("trunk.0").weight[[0, 1]] = slim.get_submodule("trunk.0").weight[[1, 0]]


def nudged(slim: Any) -> None:
    with torch.no_grad():
        slim.get_submodule("depth.2").weight[0, 0] += 1e-6


def rescaled_statistics(slim: Any) -> None:
    slim.get_submodule("trunk.4").running_var.mul_(1.001)


def off_by_one(slim: Any) -> None:
    slim.get_submodule("seg.0").padding = (0, 0)


@pytest.mark.parametrize(
    ("harm", "output", "node"),
    [
        (swapped, r"'(seg|depth|present)'", r"'trunk_0'"),
        (nudged, "'depth'", "'depth_2'"),
        (rescaled_statistics, r"'(seg|depth|present)'", r"'trunk_4'"),
        (off_by_one, "'seg'", "'seg_0'"),
    ],
)
def test_a_broken_network_is_caught_where_it_breaks(harm: Any, output: str, node: str) -> None:
    coupling, plan, slim = halved(settled(Multitask()).double())
    assert fxprune.verify(coupling, plan, slim).passed
    with torch.no_grad():
        assert all((out.std(0) > 0).any() for out in slim(X).values())
    harm(slim)
    with pytest.raises(VerificationError) as caught:
        fxprune.verify(coupling, plan, slim)
    assert caught.match(f"output {output} of the slim network differs")
    assert caught.match(f"first node that differs is {node} \\(small.py:\\d+: ")


def test_a_plan_with_the_wrong_positions_is_caught() -> None:
    model = settled(Chain()).double()
    coupling, plan, slim = halved(model)
    kept = plan.kept["conv1.weight", 0]
    assert 0 < len(kept) < 16
    shifted = dict(plan.kept)
    other = np.sort(np.random.default_rng(0).permutation(16)[: len(kept)])
    assert not np.array_equal(other, kept)
    for key in [
        ("conv1.weight", 0),
        ("conv1.bias", 0),
        ("conv2.weight", 1),
        *((f"bn.{n}", 0) for n in ("weight", "bias", "running_mean", "running_var")),
    ]:
        shifted[key] = other
    wrong = fxprune.Plan(shifted, plan.sizes, plan.costs, plan.groups, plan.method)
    with pytest.raises(VerificationError):
        fxprune.verify(coupling, wrong, slim)


def test_a_lost_output_is_caught() -> None:
    coupling, plan, slim = cut(settled(Multitask()).double(), X, 1)
    output = next(n for n in slim.graph.nodes if n.op == "output")
    output.args = ({k: v for k, v in output.args[0].items() if k != "depth"},)
    slim.recompile()
    with pytest.raises(VerificationError, match="'depth'"):
        fxprune.verify(coupling, plan, slim)


def test_verification_tells_numbers_and_prints() -> None:
    coupling, plan, slim = cut(settled(Multitask()), X.float(), 1)
    found = fxprune.verify(coupling, plan, slim)
    assert set(found.errors) == {"seg", "depth", "present"}
    assert found.worst == max(found.errors.values()) <= found.tolerance == 1e-9
    assert found.passed is True
    assert found.to_dict() == {"passed": True, "worst": found.worst, "tolerance": 1e-9, "errors": dict(found.errors)}
    assert str(found).startswith("slim(x) against masked(x) in float64: equal, worst relative error ")
    failed = fxprune.Verification({"a": 0.0, "b": 1e-3})
    assert not failed.passed
    assert "DIFFERENT" in str(failed)


def test_verifying_leaves_both_networks_alone() -> None:
    model = settled(Multitask()).train()
    coupling, plan, slim = cut(model, X.float(), 1)
    before = [{k: t.clone() for k, t in m.state_dict().items()} for m in (model, slim)]
    x = coupling.traced.args[0].clone()
    fxprune.verify(coupling, plan, slim)
    for module, state in zip((model, slim), before, strict=True):
        assert module.training
        assert all(torch.equal(t, state[k]) and t.dtype == state[k].dtype for k, t in module.state_dict().items())
    assert torch.equal(coupling.traced.args[0], x)


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1, 3]), torch.tensor([1, 2]), float("inf")),
        (torch.tensor([1e-3]), torch.tensor([0.0]), 1e-3),
    ],
)
def test_relative_error(found: Tensor, expected: Tensor, error: float) -> None:
    assert relative_error(found, expected) == pytest.approx(error)


OPS: dict[str, Any] = {
    "matmul": lambda x, w: x @ w,
    "linear": lambda x, w: F.linear(x, w.t()),
    "einsum": lambda x, w: torch.einsum("nk,km->nm", x, w),
    "mean": lambda x, w: x.mean(1),
    "var": lambda x, w: x.var(1),
    "std": lambda x, w: x.std(1),
    "sum": lambda x, w: x.sum(1),
    "prod": lambda x, w: x.prod(1),
    "amax": lambda x, w: x.amax(1),
    "norm": lambda x, w: x.norm(dim=1),
    "logsumexp": lambda x, w: x.logsumexp(1),
    "softmax": lambda x, w: x.softmax(1).amax(1),
    "layer_norm": lambda x, w: F.layer_norm(x, x.shape[1:]).nan_to_num(-9.0).amax(1),
    "std_mean": lambda x, w: torch.stack(torch.std_mean(x, 1)),
    "max of all": lambda x, w: x.max() - x.min(),
    "norm of all": lambda x, w: x.norm(),
    "vdot": lambda x, w: torch.vdot(x[0], x[1]),
    "cdist": lambda x, w: torch.cdist(x, w.t()),
    "weight_norm": lambda x, w: torch._weight_norm(x, x[:, :1].detach().clone(), 0).nan_to_num(-9.0).amax(1),
    "complex matmul": lambda x, w: torch.complex(x, 2 * x) @ torch.complex(w, -w),
    "parts of a complex": lambda x, w: torch.view_as_real(torch.complex(x, 2 * x)).sum((1, 2)),
    "fft": lambda x, w: torch.fft.irfft(torch.fft.rfft(x[:, :, None] * w, dim=2), n=4, dim=2).sum(1),
    "patches with padding": lambda x, w: F.unfold(x[:, :, None, None], (1, 3), padding=(0, 1)).mean((1, 2)),
}


WRITES: dict[str, Any] = {
    "fill": lambda x, mask, i: x.fill_(2.0),
    "slice": lambda x, mask, i: x[1].zero_(),
    "masked_fill": lambda x, mask, i: x.masked_fill(mask, 2.0),
    "masked_fill_": lambda x, mask, i: x.masked_fill_(mask, -torch.inf),
    "index_fill": lambda x, mask, i: x.index_fill(0, i, 2.0),
    "index_fill_": lambda x, mask, i: x.index_fill_(0, i, 2.0),
    "positions": lambda x, mask, i: x.index_put((i,), torch.tensor(2.0, dtype=x.dtype)),
    "mask": lambda x, mask, i: x.index_put_((mask[:, 0],), torch.tensor(2.0, dtype=x.dtype)),
    "scatter": lambda x, mask, i: x.scatter(0, torch.zeros(1, x.shape[1], dtype=torch.long), 2.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_absent_stays_so_where_it_is_written_over(name: str) -> None:
    x, mask, i = torch.randn(3, 6, dtype=torch.float64), torch.tensor([[True], [False], [True]]), torch.tensor([1])
    absent = x.clone()
    absent[:, 4:] = torch.nan
    with AbsentIsNaN():
        found = WRITES[name](absent, mask, i)
    expected = WRITES[name](x, mask, i)
    assert found[..., 4:].isnan().all()
    assert torch.equal(found[..., :4], expected[..., :4])


def test_memory_that_nothing_was_written_to_is_not_absent() -> None:
    with AbsentIsNaN():
        fresh = [torch.empty(1000).fill_(1.0), torch.empty_like(torch.full((9,), torch.nan))]
    assert not any(t.isnan().any() for t in fresh)


@pytest.mark.parametrize("name", OPS)
def test_ops_of_the_reference_act_on_what_is_present(name: str) -> None:
    x, w, here = torch.randn(3, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64), [0, 2, 3]
    absent = x.clone()
    absent[:, [1, 4, 5]] = torch.nan
    with AbsentIsNaN():
        found = OPS[name](absent, w)
    torch.testing.assert_close(found, OPS[name](x[:, here], w[here]))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("mean", torch.ones(8))


class Casting(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).float().relu().to(torch.float32))


class Mixing(Body):
    """Multiplies constants of the precision of the input with others of float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        like = x.new_zeros(1, dtype=torch.float32)
        places = torch.arange(6).type_as(like)
        table = places[:, None].float() @ torch.arange(6).type_as(like)[None] / 36
        return self.last(self.first(x) + table)


class Elsewhere(Body):
    def forward(self, x: torch.Tensor, **extra: object) -> torch.Tensor:
        y = self.first(x.to(next(self.parameters()).device)).cpu()
        return self.last(y + torch.zeros(1, 8, 1, 1))


class Spectrum(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft2(self.last(self.first(x)))


class Noisy(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.last(y + torch.randn_like(y))


class Hollow(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)) * float("nan")


class Counting(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return self.last(self.first(x))


class Averaging(Body):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.training:
            self.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3)), alpha=0.1)
        return self.last(y * self.mean[:, None, None])


IMAGE = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("kind", [Casting, Mixing, Elsewhere, Spectrum])
def test_precision_device_and_complex_outputs_are_no_obstacle(kind: type[Body]) -> None:
    slim = fxprune.compile(kind().eval(), IMAGE, fxprune.Budget(macs=0.6), progress=False)
    verification = fxprune.report(slim).verification
    assert verification is not None
    assert verification.passed


@pytest.mark.parametrize(("kind", "words"), [(Noisy, "random numbers"), (Hollow, "nothing can be compared")])
def test_what_cannot_be_compared_is_no_proof(kind: type[Body], words: str) -> None:
    with pytest.raises(fxprune.VerificationError, match=words):
        fxprune.compile(kind().eval(), IMAGE, fxprune.Budget(macs=0.6), progress=False)


@pytest.mark.parametrize("kind", [Counting, Averaging])
def test_buffers_of_the_model_are_never_written(kind: type[Body]) -> None:
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    fxprune.compile(model, IMAGE, fxprune.Budget(macs=0.6), progress=False)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_hooks_on_the_model_go_on() -> None:
    model = Casting().eval()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    slim = fxprune.compile(model, IMAGE, fxprune.Budget(macs=1.0), progress=False)
    assert torch.allclose(slim(IMAGE), model(IMAGE), atol=1e-6)
    assert torch.allclose(copy.deepcopy(slim)(IMAGE), model(IMAGE), atol=1e-6)


class Inferring(Chain):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_forward_in_inference_mode_is_compared() -> None:
    slim = fxprune.compile(settled(Inferring()), X.float(), fxprune.Budget(macs=0.5), progress=False)
    assert fxprune.report(slim).verification.passed
