"""Class-aware second moments: what tells classes apart counts in full, what varies within them counts less."""

from __future__ import annotations

from dataclasses import replace

from fxprune.calibrations import Calibration
from fxprune.errors import PlanError


def weigh_classes(calibration: Calibration, within: float) -> Calibration:
    """Return a calibration whose second moments are B + within * (H - B) in place of H = E[x x^T].

    B = E[m m^T] is made of the means m of classes alone: an error in it moves whole classes. Unlike a sum of scores by
    channel, this is a whole matrix: what one channel tells of the classes and others tell too costs nothing to lose.
    Layers of which classes are not known (such as attention over windows) keep their H.

    Args:
        calibration: gathered with `by_class=True`.
        within: weight of what varies within classes; at 1 nothing changes.

    Raises:
        PlanError: classes were not told apart.
    """
    if within == 1:
        return calibration
    if all(m.between is None for m in calibration.moments.values()):
        raise PlanError(
            f"Joint(within={within:g}) needs moments by class, and this calibration has none. Pass labelled batches as "
            "`calibration=`, or `calibrate(coupling, batches, tasks, by_class=True)`."
        )
    moments = {
        name: m if m.between is None else replace(m, second=m.between + within * (m.second - m.between))
        for name, m in calibration.moments.items()
    }
    return replace(calibration, moments=moments)
