"""Small networks, each with a construction that pruning tools get wrong. `TRAPS` is the list."""

from traps import attention, channels, convolutions, spectral, transformers, weights  # noqa: F401 (they fill the list)
from traps.spec import TRAPS, Trap

__all__ = ["TRAPS", "Trap"]
