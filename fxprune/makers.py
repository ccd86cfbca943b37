"""Which weights make the channels of a group."""

from __future__ import annotations

from torch import nn

from fxprune.coupling import Coupling, Site
from fxprune.criteria import weight_sites


def makers_of(coupling: Coupling) -> list[list[Site]]:
    """Return, for every group, where the weights that make its channels have them.

    Of channels that no weight makes, all weights that have them count.
    """
    second = _transposed(coupling)
    makers = [s for s in coupling.sites if s.is_parameter and s.channels.ndim > 1 and s.dim == (s.name in second)]
    others = weight_sites(coupling)
    found = []
    for group in coupling.groups():
        mine = coupling.in_group(group)
        made = [s for s in makers if mine[s.channels].any()]
        found.append(made or [s for s in others if mine[s.channels].any()])
    return found


def _transposed(coupling: Coupling) -> set[str]:
    """Return the weights whose second dim makes channels: those of transposed convolutions and embeddings."""
    kinds = (nn.modules.conv._ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)
    return {f"{name}.weight" for name, m in coupling.traced.root.named_modules() if isinstance(m, kinds)}
