"""One group in detail, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.boxes import change, short
from fxprune.cards import Card, cards_of, find_group, fold
from fxprune.coupling import Coupling
from fxprune.errors import check_kind
from fxprune.explaining import Vertex
from fxprune.figures import CHARACTER, COLORS, EDGE, FONT, INK, new_figure, pale, saved
from fxprune.grouping import Group
from fxprune.planning import keep_of
from fxprune.plans import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CARD, PITCH, MARGIN, HEAD = 0.22, 0.29, 0.25, 0.95
"""Inches: height of a card, from row to row, around the picture, and from its top to the first row."""
LINK, SPINE, NODE = 0.35, 0.09, 0.18
"""Inches: from the spine to a card, the width of the spine, the height of a node."""
HALF, TIMES_ROOM = 2.4, 0.55
"""Inches: each side of the spine at least, and for how often layers repeat."""
MANY_CARDS, SOURCE, MOST_NODES = 40, 56, 3
"""How many cards are drawn without asking for repeats, characters of a source line, nodes named at one card."""
STEPS = {
    "channels": "",
    "balanced": "; a step takes equally many from every row",
    "rows": "; a step takes a whole row",
}


def draw_group(
    coupling: Coupling,
    group: int | str | Vertex,
    path: str | Path | None = None,
    plan: Plan | None = None,
    *,
    collapse: bool | None = None,
) -> Figure:
    """Draw one group in detail: the layers it has sites in, from first to last, and the nodes that tie them.

    The bar in the middle stands for the group's channels. On the left is what makes them or has a value for each; on
    the right is what reads them. A layer is tied to those before it by running on them, or by the node in between.

    Args:
        coupling: from `couple`.
        group: its number, a parameter that makes or has its channels, or (parameter, dim).
        path: where to write the picture: `.png`, `.svg` or `.pdf`.
        plan: what to tell the width after.
        collapse: draw layers that repeat once; by default where there are more than 40.

    Returns:
        The figure. Cards carry their layer as `gid`, nodes `tie:` and their name.

    Raises:
        CouplingError: there is no such group, or several.
        FxPruneError: matplotlib is not installed, or cannot write such a file.
        ArtifactError: the plan is of another network.

    Example:
        >>> fxprune.draw_group(coupling, "layer1.0.conv1.weight", "group.png")  # doctest: +SKIP
    """
    check_kind(coupling, Coupling)
    found = find_group(coupling, group)
    after = found.width if plan is None else int(keep_of(coupling, plan)[found.choices].sum())
    cards = cards_of(coupling, found)
    sites = sum(len(card.sites) for card in cards if not card.made)
    blocks: dict[int, tuple[int, int]] = {}
    count = len(cards)
    if count > MANY_CARDS if collapse is None else collapse:
        cards, blocks = fold(cards)
    left = max([0.0, *(_reach(card) for card in cards if not card.reads), *(_told(c) for c in cards if c.reads)])
    right = max([0.0, *(_reach(card) for card in cards if card.reads), *(_told(c) for c in cards if not c.reads)])
    left, right = max(left, HALF) + MARGIN + (TIMES_ROOM if blocks else 0), max(right, HALF) + MARGIN
    height = HEAD + PITCH * len(cards) + MARGIN
    figure = new_figure(left + right, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-left, right), ylim=(MARGIN - height, MARGIN))
    axes.axis("off")
    for start, (length, times) in blocks.items():
        _draw_block(axes, _y(start), _y(start + length - 1), -left + 0.1, right - 0.1, times)
    _draw_spine(axes, _y(len(cards) - 1))
    for row, card in enumerate(cards):
        _draw_card(axes, card, _y(row))
    _draw_head(axes, found, coupling, change(found.width, after), sites, -left + 0.1)
    return saved(figure, path)


def _y(row: int) -> float:
    return -row * PITCH - HEAD + MARGIN


def _wide(card: Card) -> float:
    """Return the inches that a card is wide."""
    return CHARACTER * (len(short(card.layer)) + len(_about(card)) + 3) + 0.1


def _about(card: Card) -> str:
    """Return what a card says besides its layer."""
    words = "no parameter" if card.made else card.words
    return words if card.width == card.size else f"{words} {card.width} of {card.size}"


def _nodes(card: Card) -> str:
    """Return the nodes that tie a card, as they are written."""
    more = f" and {len(card.ties) - MOST_NODES} more" if len(card.ties) > MOST_NODES else ""
    return ", ".join(card.ties[:MOST_NODES]) + more


def _between(card: Card) -> float:
    """Return the inches from the spine to a card: room for the nodes that tie it."""
    return 2 * LINK + CHARACTER * len(_nodes(card)) + 0.1 if card.ties else LINK


def _reach(card: Card) -> float:
    return _between(card) + _wide(card)


def _told(card: Card) -> float:
    return CHARACTER * len(_source(card)) + LINK


def _source(card: Card) -> str:
    line = card.sources[0] if card.sources else ""
    return line if len(line) <= SOURCE else f"{line[: SOURCE - 2]}.."


def _draw_head(axes: Axes, group: Group, coupling: Coupling, width: str, sites: int, left: float) -> None:
    name = type(coupling.traced.model).__name__
    title = f"group {group.index} of {name}: {width} {'rows' if group.kind == 'rows' else 'channels'}"
    axes.text(left, MARGIN - 0.17, title, fontsize=FONT + 3, weight="bold", color=INK, va="center", gid="title")
    words = f"{sites} site{'' if sites == 1 else 's'}{STEPS[group.kind]}"
    axes.text(left, MARGIN - 0.38, words, fontsize=FONT + 0.5, color=INK, va="center")
    style: dict[str, Any] = {"fontsize": FONT + 0.5, "style": "italic", "color": INK, "va": "center"}
    axes.text(-LINK, MARGIN - 0.66, "make them, or have a value for each", ha="right", **style)
    axes.text(LINK, MARGIN - 0.66, "read them", ha="left", **style)


def _draw_spine(axes: Axes, bottom: float) -> None:
    from matplotlib.patches import Rectangle

    top = MARGIN - HEAD + 0.32
    look: dict[str, Any] = {"fc": COLORS[0], "ec": INK, "lw": 0.7, "zorder": 2, "gid": "spine"}
    axes.add_patch(Rectangle((-SPINE / 2, bottom - CARD / 2), SPINE, top - bottom + CARD / 2, **look))


def _draw_block(axes: Axes, top: float, bottom: float, left: float, right: float, times: int) -> None:
    """Draw what is behind layers that repeat, with how often they do."""
    from matplotlib.patches import Rectangle

    low = bottom - PITCH / 2 + 0.02
    look: dict[str, Any] = {"fc": "#F1F1F1", "lw": 0, "zorder": 0, "gid": "repeat"}
    axes.add_patch(Rectangle((left, low), right - left, top - low + PITCH / 2 - 0.02, **look))
    words = f"\N{MULTIPLICATION SIGN} {times}"
    axes.text(left + 0.06, top, words, va="center", fontsize=FONT + 3, weight="bold", color=INK)


def _draw_card(axes: Axes, card: Card, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch, Rectangle

    side = 1 if card.reads else -1
    near, wide = side * _between(card), _wide(card)
    axes.plot([side * SPINE / 2, near], [y, y], color=EDGE, lw=0.9, zorder=1)
    start = near if card.reads else near - wide
    color, dashes = "white" if card.reads or card.made else pale(COLORS[0]), (0, (3, 1.5)) if card.made else "-"
    look: dict[str, Any] = {"fc": color, "ec": INK, "lw": 0.7, "ls": dashes, "zorder": 3}
    axes.add_patch(Rectangle((start, y - CARD / 2), wide, CARD, gid=card.layer, **look))
    style: dict[str, Any] = {"fontsize": FONT, "va": "center", "zorder": 4}
    axes.text(start + 0.06, y - 0.008, short(card.layer), color=INK, ha="left", **style)
    axes.text(start + wide - 0.06, y - 0.008, _about(card), color="#444444", ha="right", **style)
    if card.ties:
        room = CHARACTER * len(_nodes(card)) + 0.1
        middle = side * (LINK + room / 2)
        look = {"fc": "white", "ec": EDGE, "lw": 0.8, "zorder": 3, "gid": f"tie:{' '.join(card.ties)}"}
        shape = "round,pad=0,rounding_size=0.09"
        axes.add_patch(FancyBboxPatch((middle - room / 2, y - NODE / 2), room, NODE, shape, **look))
        axes.text(middle, y - 0.008, _nodes(card), color=INK, ha="center", **style)
    where = {"ha": "left" if side < 0 else "right", "color": "#666666", **style}
    axes.text(-side * (SPINE / 2 + 0.1), y - 0.008, _source(card).replace("$", r"\$"), **where)
