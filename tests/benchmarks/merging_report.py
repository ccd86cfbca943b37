"""The report of the benchmark of merging, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from classes_report import Curve, needed
from commands import Row, commands_of, header, markdown, seeds_of

Found = dict[tuple[int, str, str], float | None]
"""(seed, method, combination) -> the least macs; None where the metrics are not reached."""
DENSE = 1.0
AS_GOOD = 0.99
"""Of the metric of the separate networks."""
BASELINE = "Separate"
KINDS = {
    BASELINE: ("separate",),
    "MTZ": ("mtz-50", "mtz-90"),
    "PAM, entropy": ("pam-entropy",),
    "PAM, fisher": ("pam-fisher-2", "pam-fisher-10"),
}
"""Kind -> its settings; a combination takes the best of them."""
PACKAGES = ("fxprune", "torch", "scikit-learn", "numpy")


def report(rows: Sequence[Row]) -> str:
    """Put the report together."""
    seeds = seeds_of([r for r in rows if r["tasks"]])
    parts = [header("Merging", PACKAGES, "one thread", command=commands_of(rows), seeds=seeds)]
    for count in sorted({r["tasks"] for r in rows if r["tasks"]}):
        parts += of_set(count, [r for r in rows if r["tasks"] == count])
    parts += [*seconds(rows), *failures(rows)]
    return "\n\n".join(parts) + "\n"


def reference(rows: Sequence[Row], seed: int) -> Mapping[str, float] | None:
    """Return the metrics of the separate networks of a seed, trained as long as others; None if they are missing."""
    found = [r["tuned"] for r in rows if (r["seed"], r["method"], r["budget"]) == (seed, "separate", DENSE)]
    return found[0] if found else None


def curve(rows: Sequence[Row], combination: str, dense: Mapping[str, float]) -> Curve:
    """Return what a combination takes, ascending, and the metric of its worst task, as a share of the dense one's."""
    tasks = combination.split(" + ")
    points = sorted((r["macs"][combination], min(r["tuned"][t] / dense[t] for t in tasks)) for r in rows)
    return np.array([macs for macs, _ in points], dtype=float), np.array([share for _, share in points])


def least(rows: Sequence[Row], method: str, combination: str, dense: Mapping[str, float]) -> float | None:
    """Return the least macs at which all tasks of a combination are as good as the separate networks are.

    Between two budgets, by the logarithm of macs. What is separate needs no common budget: it is the sum over tasks.
    """
    parts = combination.split(" + ") if method == "separate" else [combination]
    mine = [r for r in rows if r["method"] == method and "tuned" in r]
    found = [needed(curve(mine, part, dense), AS_GOOD) for part in parts]
    return None if None in found else float(sum(macs for macs in found if macs is not None))


def all_least(rows: Sequence[Row]) -> Found:
    """Return the least macs of each seed, kind and combination, of the best setting of the kind."""
    found: Found = {}
    names = list(dict.fromkeys(name for r in rows for name in r.get("macs", {})))
    for seed in sorted({r["seed"] for r in rows}):
        mine, dense = [r for r in rows if r["seed"] == seed], reference(rows, seed)
        if dense is None:
            continue
        for kind, settings in KINDS.items():
            for name in names:
                reached = [least(mine, method, name, dense) for method in settings]
                found[seed, kind, name] = min((macs for macs in reached if macs is not None), default=None)
    return found


def bound(found: Found, seed: int, combination: str) -> float:
    """Return how many times less than separate networks a combination takes at best: but for its dearest task."""
    alone = [found[seed, BASELINE, task] or np.nan for task in combination.split(" + ")]
    return sum(alone) / max(alone)


def of_set(count: int, rows: Sequence[Row]) -> list[str]:
    """Tabulate one set of tasks."""
    found = all_least(rows)
    seeds, names = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 2))
    others = [kind for kind in KINDS if kind != BASELINE and any(r["method"] in KINDS[kind] for r in rows)]
    heads = ["tasks", "at best", *(f"Separate / {kind}" for kind in others), *(f"MTZ / {k}" for k in others[1:])]
    table = []
    for name in names:
        line = [name, spread([bound(found, seed, name) for seed in seeds])]
        line += [spread([ratio(found, seed, name, BASELINE, kind) for seed in seeds]) for kind in others]
        line += [spread([ratio(found, seed, name, "MTZ", kind) for seed in seeds]) for kind in others[1:]]
        table.append(line)
    cells = [
        [name, str(seed), *(millions(found[seed, kind, name]) for kind in (BASELINE, *others))]
        for name in names
        for seed in seeds
    ]
    return [
        f"## {count} tasks",
        "How many times less macs each combination takes, where every task's metric is within 1 % of that of the "
        "separate networks, which were trained as long and not pruned: median over seeds, and in brackets the least "
        "and the most. At best: if all tasks but the dearest of the combination cost nothing.",
        markdown(heads, table),
        "The least macs themselves, in millions, of each seed; `-` is not reached at any budget. Between two budgets, "
        "by the logarithm of macs; `Separate` may take another budget for each task.",
        markdown(["tasks", "seed", BASELINE, *others], cells),
        "Metrics of the separate networks, and what is left of them after merging, training, pruning and fine-tuning, "
        "in percent: means over seeds. Macs are means over all combinations, of the separate networks, not pruned.",
        metrics(rows),
    ]


def ratio(found: Found, seed: int, name: str, kind: str, other: str) -> float | None:
    """Return how many times as much one kind takes as another; None where either does not get there."""
    one, two = found[seed, kind, name], found[seed, other, name]
    return one / two if one is not None and two is not None else None


def spread(values: Sequence[float | None]) -> str:
    """Return a median, with the least and the most, and how many there are where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "not reached"
    text = f"{statistics.median(known):.2f}"
    text += f" ({min(known):.2f} .. {max(known):.2f})" if len(known) > 1 else ""
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)} seeds"


def millions(macs: float | None) -> str:
    """Return macs in millions."""
    return "-" if macs is None else f"{macs / 1e6:.3f}"


def metrics(rows: Sequence[Row]) -> str:
    """Tabulate the metrics of each method and budget."""
    whole = [r for r in rows if r["method"] == "separate" and r["budget"] == DENSE]
    tasks, table = list(whole[0]["tuned"]) if whole else [], []
    mean = {r["seed"]: statistics.mean(r["macs"].values()) for r in whole}
    for method, share in dict.fromkeys((r["method"], r["budget"]) for r in rows):
        mine = [r for r in rows if (r["method"], r["budget"]) == (method, share) and "tuned" in r and r["seed"] in mean]
        if not mine:
            continue
        macs = statistics.mean(statistics.mean(r["macs"].values()) / mean[r["seed"]] for r in mine)
        if (method, share) == ("separate", DENSE):
            cells = [f"{statistics.mean(r['tuned'][t] for r in mine):.4f}" for t in tasks]
        else:
            dense = {r["seed"]: r["tuned"] for r in whole}
            cells = [f"{100 * statistics.mean(r['tuned'][t] / dense[r['seed']][t] for r in mine):.1f}" for t in tasks]
        table.append([method, f"{share:g}", f"{macs:.3f}", *cells])
    return markdown(["method", "budget", "macs", *tasks], table)


def seconds(rows: Sequence[Row]) -> list[str]:
    """Tabulate how long merging takes."""
    sets = sorted({r["tasks"] for r in rows if r["tasks"]})
    timed = [r for r in rows if r["method"] == "time"]
    names = list(dict.fromkeys(r["method"] for r in rows if r["tasks"]))
    table = []
    for name in names:
        spent = [[r["seconds"]["merging"] for r in rows if (r["tasks"], r["method"]) == (n, name) and "seconds" in r]
                 for n in sets]  # fmt: skip
        cells = [f"{statistics.median(found):.1f}" if found else "-" for found in spent]
        table.append([name, *cells, *(f"{r['seconds'][name]:.1f}" for r in timed)])
    heads = ["method", *(f"{n} tasks" for n in sets), *("three ResNet-20s" for _ in timed)]
    return ["## How long merging takes", "CPU seconds of one thread, on 512 scenes.", markdown(heads, table)]


def failures(rows: Sequence[Row]) -> list[str]:
    """List what could not be run."""
    wrong = [
        [r["method"], str(r["tasks"]), str(r["seed"]), f"{r['budget']:g}", r["error"]] for r in rows if "error" in r
    ]
    return ["## What could not be run", markdown(["method", "tasks", "seed", "budget", "why"], wrong)] if wrong else []
