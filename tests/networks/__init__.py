"""Random networks as small printable data: draw a `Network`, then `build` it."""

from networks.growing import Picker, grow
from networks.ops import OPS, Op
from networks.shrinking import shrink
from networks.spec import Network, Step, build, example_inputs

__all__ = ["OPS", "Network", "Op", "Picker", "Step", "build", "example_inputs", "grow", "shrink"]
