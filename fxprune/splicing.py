"""Parameters of networks side by side of which some channels are one."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxprune.cloning import named_part
from fxprune.matching import joint
from fxprune.merging import Merger
from fxprune.reading import Reading, Zipped
from fxprune.splitting import COMMON, MAP, Splits

TINY = 1e-12
"""A scale below which a batch norm is taken to let nothing pass."""


def spliced(merger: Merger, readings: list[Reading], zipped: Zipped) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of networks side by side, for `Sharing.written`.

    What is one has the id of the first network's. Layers read it there, whichever network they are of. What is said of
    single channels, such as the filters of depthwise convolutions, is the mean over the networks.

    Args:
        merger: the networks.
        readings: their layers.
        zipped: which channels are one.
    """
    splits = merger.splits
    found = {name: values for name in splits.coupling.tensors if (values := _means(splits, name, zipped)) is not None}
    for n in splits.networks[0].graph.nodes:
        if splits.kinds.get(n.name) == MAP:
            found[f"{n.target}.weight"] = _read_as_one(splits, n, zipped)
    for reading in readings:
        _write_shared(found, splits, reading, zipped)
    return found


def _means(splits: Splits, name: str, zipped: Zipped) -> torch.Tensor | None:
    """Return what is said of single channels side by side; None where more than one dim is labelled."""
    shape, labels = splits.coupling.tensors[name]
    dims = [d for d, ids in enumerate(labels) if ids is not None and ids.size == shape[d] and shape[d] > 1]
    if len(dims) != 1:
        return None
    dim, count = dims[0], len(splits.networks)
    values = [named_part(t.root, name).detach().double().cpu().movedim(dim, 0) for t in splits.networks]
    whole = torch.stack(values, 1).flatten(0, 1)
    ids = labels[dim]
    places = zipped.places(ids.ravel()) if ids is not None else []
    mean = torch.stack([v[torch.from_numpy(at)] for v, at in zip(values, places, strict=True)]).mean(0)
    whole[torch.from_numpy(places[0] * count)] = mean
    return whole.movedim(0, dim)


def _read_as_one(splits: Splits, n: fx.Node, zipped: Zipped) -> torch.Tensor:
    """Return the weight of a layer side by side: (outputs * networks, inputs * networks, ..), turned if its own is."""
    count = len(splits.networks)
    modules = [named_part(t.root, str(n.target)) for t in splits.networks]
    turned = isinstance(modules[0], nn.modules.conv._ConvTransposeNd)
    weights = [m.weight.detach().double().cpu() for m in modules]
    weights = [w.transpose(0, 1) for w in weights] if turned else weights
    source = n.all_input_nodes[0].name
    if splits.kinds[source] == COMMON:
        whole = torch.stack(weights, 1).flatten(0, 1)
    else:
        out, into = weights[0].shape[:2]
        whole = torch.zeros(out, count, into, count, *weights[0].shape[2:], dtype=torch.float64)
        for t, w in enumerate(weights):
            whole[:, t, :, t] = w
        if source in splits.dims:
            places = [torch.from_numpy(at) for at in zipped.places(splits.dims[source][1])]
            for t in range(1, count):
                whole[:, t, places[0], 0] = weights[t][:, places[t]]
        whole = whole.flatten(2, 3).flatten(0, 1)
    return whole.transpose(0, 1) if turned else whole


def _write_shared(found: dict[str, torch.Tensor], splits: Splits, r: Reading, zipped: Zipped) -> None:
    """Write what makes the shared channels of a layer: weights, and the bias or batch norm that keeps means."""
    columns, rows = r.columns(zipped), [] if r.made is None else zipped.places(r.made)
    if not rows or not len(rows[0]) or not len(columns[0]):
        return
    count = len(splits.networks)
    at = [torch.from_numpy(places) for places in rows]
    scales = [r.scale(t)[at[t]] for t in range(count)]
    weights = [r.weight(t, columns[t])[at[t]] * scales[t][:, None, None] for t in range(count)]
    scale = torch.stack(scales).mean(0)
    scale = torch.where(scale.abs() < TINY, 1.0, scale)
    new = joint(weights, [r.second(t, columns[t]) for t in range(count)]) / scale[:, None, None]
    mean_in = torch.stack([r.mean(t, columns[t]) for t in range(count)]).mean(0)
    mean = torch.einsum("icn,n->i", new, mean_in)
    shared = at[0] * count
    taps = new.transpose(1, 2) if r.moments[0].shared_taps else new.reshape(len(new), len(columns[0]), -1)
    whole = found[f"{r.layer}.weight"]
    side = 1 if r.read is None else count
    whole[shared[:, None], torch.from_numpy(columns[0] * side)] = taps.reshape(*taps.shape[:2], *whole.shape[2:])
    levels = [r.level(t)[at[t]] for t in range(count)]
    if r.norms is None:
        if r.has_bias:
            found[f"{r.layer}.bias"][shared] = torch.stack(levels).mean(0) - mean
        return
    if r.has_bias:
        mean = mean + found[f"{r.layer}.bias"][shared]
    second = torch.stack([r.second(t, columns[t]) for t in range(count)]).mean(0)
    var = torch.einsum("icn,nm,icm->i", new, second, new)
    offsets = [n.bias[a] + s * (v - n.mean[a]) for n, a, s, v in zip(r.norms, at, scales, levels, strict=True)]
    _write_norm(found, r, shared, scale, torch.stack(offsets).mean(0), mean, var)


def _write_norm(
    found: dict[str, torch.Tensor],
    r: Reading,
    at: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
) -> None:
    """Let a batch norm scale by `scale` and return `offset` at the mean of what comes in, all (channels,)."""
    assert r.norms is not None
    name, eps = r.norms[0].name, r.norms[0].eps
    if f"{name}.weight" in found:
        found[f"{name}.running_var"][at] = var
        found[f"{name}.weight"][at] = scale * (var + eps).sqrt()
    else:
        found[f"{name}.running_var"][at] = (scale.square().reciprocal() - eps).clamp_min(0)
    if f"{name}.bias" in found:
        found[f"{name}.running_mean"][at] = mean
        found[f"{name}.bias"][at] = offset
    else:
        found[f"{name}.running_mean"][at] = mean - offset / scale
