"""The summary of `zoo.py`'s rows, as Markdown."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from commands import command, header, markdown

TOLERANCE = 1e-9
SENSITIVE = 1e-3  # how much the outputs must change with the inputs, so that their equality says something
STAGES = ("trace", "couple", "plan", "rewrite", "verify")
REFUSALS = ("TraceError", "CouplingError", "PlanError", "RewriteError")
LEAST = 1e-3  # share of the macs from which on a reason is listed
SLOW = (0.4, 1.0)  # ratios of time above which networks are listed
PACKAGES = ("fxprune", "torch", "torchvision", "timm", "torch-pruning", "numpy", "networkx")
TRAINED = {True: "yes", False: "not finite", None: "-"}
KEPT = {True: "kept", False: "CHANGED", None: "-"}
MAKING = ("start", "build", "describe", "trace", "couple", "plan", "rewrite", "report")

Row = dict[str, Any]


def is_pruned(row: Row) -> bool:
    """Whether there is a slim network."""
    return "share" in row


def is_half(row: Row) -> bool:
    """Whether the slim network has at most half of the macs."""
    return is_pruned(row) and row["budget"] <= 0.5 and row["share"] <= 0.5


def is_exact(row: Row) -> bool:
    """Whether the slim network equals the masked original, in outputs that depend on the inputs."""
    error = row.get("error")
    return error is not None and error <= TOLERANCE and row.get("sensitivity", 0.0) >= SENSITIVE


def is_refused(row: Row) -> bool:
    """Whether fxprune said itself that it cannot prune the network."""
    return any(row["failures"].get(stage, "").startswith(REFUSALS) for stage in MAKING)


def is_wrong(row: Row) -> bool:
    """Whether the slim network was run and is not what was promised."""
    found = row["failures"].get("verify", "")
    return "differs from the masked original" in found or row.get("shapes_kept") is False


def tool_outcome(row: Row) -> str:
    """Return what became of Torch-Pruning."""
    return row.get("torch_pruning", {}).get("outcome", "not run")


def verdict(row: Row) -> str:
    """Say in a few words what became of a network."""
    parts = [f"{stage}: {message[:110]}" for stage, message in row["failures"].items()]
    if is_pruned(row):
        parts.insert(0, f"{row['share']:.1%} of macs, error {row.get('error')}, coverage {row['coverage']['macs']:.1%}")
    ratio = f" (time ratio {row['ratio']:.2f})" if "ratio" in row else ""
    return "; ".join([*parts, f"Torch-Pruning {tool_outcome(row)}{ratio}"])


def totals(rows: Sequence[Row]) -> list[Row]:
    """Return a line for each family, and one for all."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    counts: dict[str, Callable[[Row], bool]] = {
        "half the macs": is_half,
        "above half": lambda row: is_pruned(row) and not is_half(row),
        "exact": is_exact,
        "trained": lambda row: row.get("trained") is True,
        "refused": is_refused,
        "wrong": is_wrong,
        "other failure": lambda row: bool(row["failures"]) and not is_refused(row) and not is_wrong(row),
    }
    for kind in ("exact", "differs", "unchanged", "runs", "raises", "too long", "killed"):
        counts[f"TP {kind}"] = lambda row, kind=kind: tool_outcome(row) == kind
    lines = []
    for title, part in [*((f, [r for r in rows if r["family"] == f]) for f in families), ("all", list(rows))]:
        lines.append({"family": title, "networks": len(part)} | {k: sum(map(f, part)) for k, f in counts.items()})
    return lines


def medians(rows: Sequence[Row]) -> list[str]:
    """Return lines about coverage and time."""
    lines = []
    for title, attention in (("networks without softmax attention", False), ("networks with softmax attention", True)):
        found = [r["coverage"]["macs"] for r in rows if is_pruned(r) and r["attention"] is attention]
        if found:
            lines.append(
                f"macs that can shrink, {title}: median {statistics.median(found):.1%}, least {min(found):.1%} "
                f"({len(found)} networks)"
            )
    ratios = {f"{r['family']}/{r['name']}": r["ratio"] for r in rows if "ratio" in r}
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        lines.append(
            f"time of fxprune (trace, couple, plan, rewrite) / Torch-Pruning (graph, pruner, step): median "
            f"{statistics.median(ratios.values()):.2f}, most {ratios[worst]:.2f} ({worst}), where both finish "
            f"({len(ratios)} networks)"
        )
    for limit in SLOW:
        over = sorted((name for name in ratios if ratios[name] > limit), key=lambda name: -ratios[name])
        if over:
            lines.append(f"above {limit}: " + ", ".join(f"{name} {ratios[name]:.2f}" for name in over))
    return lines


def line(row: Row) -> Row:
    """Return the table's line of one network."""
    other = row.get("torch_pruning", {})
    seconds = row.get("seconds", {})
    shown: Row = {"network": row["name"], "front end": row.get("frontend", "-")}
    shown["coverage"] = f"{row['coverage']['macs']:.1%}" if is_pruned(row) else "-"
    shown["macs left"] = f"{row['share']:.1%}" if is_pruned(row) else "-"
    shown["error"] = f"{row['error']:.0e}" if row.get("error") is not None else "-"
    shown["trained"] = TRAINED[row.get("trained")]
    shown["shapes"] = KEPT[row.get("shapes_kept")]
    shown |= {f"{stage} (s)": f"{seconds[stage]:.2f}" if stage in seconds else "-" for stage in STAGES}
    shown["peak (GB)"] = f"{row['peak'] / 1e9:.1f}" if "peak" in row else "-"
    shown["TP"] = tool_outcome(row)
    shown["TP macs left"] = f"{other['share']:.1%}" if "share" in other else "-"
    shown["TP (s)"] = f"{sum(other['seconds'].values()):.2f}" if "seconds" in other else "-"
    shown["time ratio"] = f"{row['ratio']:.2f}" if "ratio" in row else "-"
    return shown


def remarks(row: Row) -> list[str]:
    """Return all that went wrong with a network, and what it could not lose beyond inputs and outputs."""
    found = [f"{stage}: {message}" for stage, message in row["failures"].items()]
    if is_pruned(row) and not is_half(row):
        found.append(f"half of the macs cannot be reached: {row['share']:.1%} is left, with the least in reach")
    if row.get("sensitivity", 1.0) < SENSITIVE:
        found.append(f"outputs hardly depend on the inputs ({row['sensitivity']:.0e}): equality says little")
    if row.get("trained") is False:
        found.append("a training step gives numbers that are not finite")
    if row.get("shapes_kept") is False:
        found.append("the slim network returns other shapes")
    return found


def blocked(row: Row) -> str:
    """Return which shares of the macs cannot go, and why, as words."""
    return "; ".join(f"{b['macs']:.1%} {b['reason']}" for b in row["blocked"] if b["macs"] >= LEAST)


def heading(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """Describe when, where, with what and how the rows were made."""
    return header(
        "The zoo",
        PACKAGES,
        f"{args.threads} thread(s)",
        command=f"`{command()}`" + (", which keeps the rows of earlier runs" if args.resume else ""),
        limits=f"{args.limit:g} s for a stage of fxprune, {args.other_limit:g} s for a run of Torch-Pruning, "
        f"{args.memory:g} GB",
        time=f"{sum(row['wall'] for row in rows) / 60:.0f} minutes of processes",
    )


NOTES = f"""Every model builder of torchvision (of detectors, which branch on the values of boxes, the backbone with its
pyramid) and the smallest model of every module of timm, with random weights, scales and statistics of which none is
zero. *Exact*: the slim network equals the masked original to {TOLERANCE:.0e} in float64, and its outputs depend on its
inputs. *Trained*: one step of SGD, finite. *Refused*: fxprune says why it returns nothing. *Coverage*: macs of ops of
which a dim can shrink. Times are medians of up to fifteen runs on a warm process, that of `verify` is of one.

TP is Torch-Pruning with its `MagnitudePruner`, at the ratio of channels that leaves about half of the macs, told which
layers make the outputs and how many heads each attention has, and with sizes that attention modules remember corrected
afterwards. *Exact* and *differs* compare its result with the masked original, as above; *unchanged*: it runs, and
nothing was removed; *runs*: it runs, and what was removed cannot be told; *raises*: it or its result raises; *too
long*: over the limit of time; *killed*: the process died."""


def report(rows: Sequence[Row], args: argparse.Namespace) -> str:
    """Return the whole summary."""
    parts = [heading(args, rows), NOTES, "## Totals", markdown("keys", totals(rows))]
    parts.append("\n".join(f"* {text}" for text in medians(rows)))
    for family in dict.fromkeys(row["family"] for row in rows):
        parts += [f"## {family}", markdown("keys", [line(row) for row in rows if row["family"] == family])]
    wrong = [f"* {row['family']}/{row['name']}: {text}" for row in rows for text in remarks(row)]
    parts += ["## Refusals and failures", "\n".join(wrong) or "None."]
    theirs = [(r, r["torch_pruning"]["message"]) for r in rows if r.get("torch_pruning", {}).get("message")]
    parts += [
        "## What Torch-Pruning raises",
        "\n".join(f"* {r['family']}/{r['name']}: {m}" for r, m in theirs) or "None.",
    ]
    stuck = [f"* {row['family']}/{row['name']}: {blocked(row)}" for row in rows if is_pruned(row) and blocked(row)]
    note = f"Shares of the macs; networks without one of at least {LEAST:.1%} are left out."
    parts += ["## What may not go", note, "\n".join(stuck) or "None."]
    return "\n\n".join(parts) + "\n"
