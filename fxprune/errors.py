"""The errors that fxprune raises.

Every message says what happened, where (node, source line, shapes) and what to do, as code in back-ticks.
Catch `FxPruneError` for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ArtifactError",
    "CouplingError",
    "FxPruneError",
    "PlanError",
    "RewriteError",
    "TraceError",
    "VerificationError",
]

MADE_BY = {
    "Traced": "fxprune.trace(model, example_inputs)",
    "Coupling": "fxprune.couple(fxprune.trace(model, example_inputs))",
    "Plan": "fxprune.plan(coupling, budget)",
}


class FxPruneError(Exception):
    """Base of every error that fxprune raises on purpose.

    Example:
        >>> issubclass(PlanError, FxPruneError)
        True
    """


def check_kind(value: object, kind: type) -> None:
    """Check an argument that another step returns: a `Traced`, `Coupling` or `Plan`.

    Raises:
        FxPruneError: it is something else.
    """
    if not isinstance(value, kind):
        raise FxPruneError(
            f"this is a {type(value).__name__}, where a {kind.__name__} is needed. Pass what "
            f"`{MADE_BY[kind.__name__]}` returns."
        )


class TraceError(FxPruneError):
    """The model cannot be turned into a graph, or does not run on the example inputs.

    The message carries the model's own error and, where there is one, the line of the user's code.
    """


class CouplingError(FxPruneError):
    """Channels cannot be followed through an op, and freezing them was not asked for.

    Raised by ``unknown="error"`` with all such ops at once, and by a rule that met labels it cannot express.
    """


class PlanError(FxPruneError, ValueError):
    """The request cannot be met, or makes no sense.

    The message says what was asked, what is possible, and which constraint binds.

    Example:
        >>> try:
        ...     raise PlanError("macs=0.01 asked, 0.12 possible: `min_width=8` binds")
        ... except ValueError as error:
        ...     print(error)
        macs=0.01 asked, 0.12 possible: `min_width=8` binds
    """


class RewriteError(FxPruneError):
    """The graph holds sizes that cannot be rewritten, or a postcondition of the rewrite failed.

    The model is untouched. Freezing the nodes named makes the plan possible without them.

    Attributes:
        nodes: fx node -> reason.
    """

    def __init__(self, message: str, *, nodes: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.nodes = dict(nodes or {})


class VerificationError(FxPruneError):
    """The slim model differs from the masked original.

    The message names the output, by how much it differs, and the first node that does.
    """


class ArtifactError(FxPruneError):
    """A saved plan or model does not fit: it is damaged, of another version, or of another model.

    The message names the file or the parameter, what was expected and what was found.
    """
