"""The report of the benchmark of merging, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from classes_report import Curve, needed
from commands import Row, commands_of, header, markdown, seeds_of

Found = dict[tuple[int, str, str], float | None]
"""(seed, kind, combination), of those that ran -> the least macs; None where the metrics are not reached."""
DENSE, TIME = "dense", "time"
"""The method that prunes nothing; what the row with seconds is called."""
AS_GOOD = 0.99
"""Of the metric of the separate networks."""
BASELINE = "Separate"
KINDS = {
    BASELINE: ("separate",),
    "MTZ": ("mtz-50", "mtz-90"),
    "PAM, entropy": ("pam-entropy",),
    "PAM, fisher": ("pam-fisher-2",),
    "All shared": ("shared",),
}
"""Kind -> its settings; a combination takes the best of them."""
HOW = (
    "Networks of one topology, trained for one task each on the demo's scenes. The tasks of the set `demo` are its "
    "three; those of `attributes` are sets of attributes of the digit in front, at every position, and need the "
    "same knowledge. All are merged, then pruned by `Joint` and fine-tuned again and again, to smaller and smaller "
    "budgets, in the same way for every method. `separate` shares nothing; `mtz-50` and `mtz-90` share half and "
    "nine tenths of every layer; `pam-entropy` is PAM as published; `pam-fisher-2` is `PAM(alpha=0.02, "
    "estimator='fisher')`; `shared` gives every channel to all tasks, and leaves it to `Joint` to find which repeat "
    "others."
)
PACKAGES = ("fxprune", "torch", "scikit-learn", "numpy")


def report(rows: Sequence[Row]) -> str:
    """Put the report together."""
    trained = [r for r in rows if r["method"] != TIME]
    parts = [header("Merging", PACKAGES, "one thread", command=commands_of(rows), seeds=seeds_of(trained)), HOW]
    for name in dict.fromkeys(r["set"] for r in trained):
        parts += of_set(name, [r for r in trained if r["set"] == name])
    parts += [*seconds(rows), *failures(rows)]
    return "\n\n".join(parts) + "\n"


References = Mapping[float, Mapping[str, float]]
"""Budget -> the metrics of networks that are not pruned, and trained as long."""


def references(rows: Sequence[Row], seed: int) -> References:
    """Return what the rows of a seed are compared with."""
    return {r["budget"]: r["tuned"] for r in rows if (r["seed"], r["method"]) == (seed, DENSE)}


def curve(rows: Sequence[Row], combination: str, dense: References) -> Curve:
    """Return what a combination takes, ascending, and the metric of its worst task, as a share of the dense one's."""
    tasks = combination.split(" + ")
    points = sorted(
        (r["macs"][combination], min(r["tuned"][t] / dense[r["budget"]][t] for t in tasks))
        for r in rows
        if r["budget"] in dense
    )
    return np.array([macs for macs, _ in points], dtype=float), np.array([share for _, share in points])


def least(rows: Sequence[Row], method: str, combination: str, dense: References) -> float | None:
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
        mine, dense = [r for r in rows if r["seed"] == seed], references(rows, seed)
        if not dense:
            continue
        ran = {r["method"] for r in mine}
        for kind, settings in KINDS.items():
            for name in names if ran & {*settings} else ():
                reached = [least(mine, method, name, dense) for method in settings]
                found[seed, kind, name] = min((macs for macs in reached if macs is not None), default=None)
    return found


def all_most(rows: Sequence[Row]) -> Found:
    """Return the most macs at which a kind was tried, of each seed and combination; of its settings, the least."""
    found: Found = {}
    for (seed, kind, name), _ in all_least(rows).items():
        tried = [
            [r["macs"][name] for r in rows if (r["seed"], r["method"]) == (seed, method) and "tuned" in r]
            for method in KINDS[kind]
        ]
        found[seed, kind, name] = min(map(max, tried)) if all(tried) else None
    return found


def bound(found: Found, seed: int, combination: str) -> float:
    """Return how many times less than separate networks a combination takes at best: but for its dearest task."""
    alone = [found[seed, BASELINE, task] or np.nan for task in combination.split(" + ")]
    return sum(alone) / max(alone)


def of_set(title: str, rows: Sequence[Row]) -> list[str]:
    """Tabulate one set of tasks."""
    found, most = all_least(rows), all_most(rows)
    seeds, names = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 2))
    others = [kind for kind in KINDS if kind != BASELINE and any(r["method"] in KINDS[kind] for r in rows)]
    heads = ["tasks", "at best", *(f"Separate / {kind}" for kind in others), *(f"MTZ / {k}" for k in others[1:])]
    table = []
    for name in names:
        separate = [seed for seed in seeds if (seed, BASELINE, name) in found]
        line = [name, spread([bound(found, seed, name) for seed in separate])]
        for of, kinds in ((BASELINE, others), ("MTZ", others[1:])):
            for kind in kinds:
                pairs = [((seed, of, name), (seed, kind, name)) for seed in seeds]
                ran = [(one, other) for one, other in pairs if one in found and other in found]
                known = [found[one] is not None for one, _ in ran]
                values = [ratio(found, most, one, other) for one, other in ran]
                line.append(("" if all(known) or values == [None] * len(values) else "> ") + spread(values))
        table.append(line)
    cells = [
        [name, str(seed), *(millions(found, (seed, kind, name)) for kind in (BASELINE, *others))]
        for name in names
        for seed in seeds
    ]
    return [
        f"## The set `{title}`",
        "How many times less macs each combination takes, where every task's metric is within 1 % of that of its own "
        "network, trained as long and not pruned: median over seeds, and in brackets the least and the most. At best: "
        "if all tasks but the dearest of the combination cost nothing. `>`: what is divided does not get there at any "
        "budget, on some seed; it takes more than the most macs that it was tried with, which stand for it.",
        markdown(heads, table),
        "The least macs themselves, in millions, of each seed; `-` is not reached at any budget, an empty cell was not "
        "run. Between two budgets, by the logarithm of macs; `Separate` may take another budget for each task.",
        markdown(["tasks", "seed", BASELINE, *others], cells),
        "Metrics of the networks that were not pruned, trained as long as others at the last budget; and, of those "
        "trained as long as at its own budget, what each method has left, in percent: means over seeds. Macs are means "
        "over all combinations, as shares of what the separate networks take, not pruned.",
        metrics(rows),
    ]


def ratio(found: Found, most: Found, one: tuple[int, str, str], other: tuple[int, str, str]) -> float | None:
    """Return how many times as much one takes as the other; None where the other does not get there.

    Where the one does not, it takes more than all it was tried with.
    """
    takes, less = found[one] if found[one] is not None else most[one], found[other]
    return takes / less if takes is not None and less is not None else None


def spread(values: Sequence[float | None]) -> str:
    """Return a median, with the least and the most, and how many of those that ran there are where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "not reached" if values else "not run"
    text = f"{statistics.median(known):.2f}"
    text += f" ({min(known):.2f} .. {max(known):.2f})" if len(known) > 1 else ""
    return text if len(known) == len(values) else f"{text}, {len(known)} of {len(values)} seeds"


def millions(found: Found, key: tuple[int, str, str]) -> str:
    """Return macs in millions; nothing of what did not run."""
    macs = found.get(key)
    return f"{macs / 1e6:.3f}" if macs is not None else "-" if key in found else ""


def metrics(rows: Sequence[Row]) -> str:
    """Tabulate the metrics of each method and budget."""
    dense = {(r["seed"], r["budget"]): r for r in rows if r["method"] == DENSE}
    budgets = sorted({budget for _, budget in dense}, reverse=True)
    if not budgets:
        return ""
    last = [r for r in dense.values() if r["budget"] == budgets[-1]]
    tasks = list(last[0]["tuned"])
    every = ", ".join(str(seed) for seed, budget in dense if budget == budgets[-1])
    table = [[DENSE, "", every, "1", *(f"{statistics.mean(r['tuned'][t] for r in last):.4f}" for t in tasks)]]
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != DENSE):
        for share in budgets:
            mine = [r for r in rows if (r["method"], r["budget"]) == (method, share) and "tuned" in r]
            pairs = [(r, dense[r["seed"], share]) for r in mine if (r["seed"], share) in dense]
            if pairs:
                macs = statistics.mean(sum(r["macs"].values()) / sum(d["macs"].values()) for r, d in pairs)
                cells = [f"{100 * statistics.mean(r['tuned'][t] / d['tuned'][t] for r, d in pairs):.1f}" for t in tasks]
                seeds = ", ".join(str(r["seed"]) for r, _ in pairs)
                table.append([method, f"{share:g}", seeds, f"{macs:.3f}", *cells])
    return markdown(["method", "budget", "seeds", "macs", *tasks], table)


def seconds(rows: Sequence[Row]) -> list[str]:
    """Tabulate how long merging takes."""
    timed = [r for r in rows if r["method"] == TIME]
    merged = [r for r in rows if r["method"] not in (TIME, DENSE) and "seconds" in r]
    sets = list(dict.fromkeys(r["set"] for r in merged))
    names = dict.fromkeys([name for r in timed for name in r["seconds"]] + [r["method"] for r in merged])
    table = []
    for name in names:
        spent = [[r["seconds"]["merging"] for r in merged if (r["set"], r["method"]) == (of, name)] for of in sets]
        cells = [f"{statistics.median(found):.1f}" if found else "-" for found in spent]
        table.append([name, *cells, *(f"{r['seconds'][name]:.1f}" if name in r["seconds"] else "-" for r in timed)])
    heads = ["method", *sets, *("three ResNet-20s" for _ in timed)]
    return ["## How long merging takes", "CPU seconds of one thread, on 512 scenes.", markdown(heads, table)]


def failures(rows: Sequence[Row]) -> list[str]:
    """List what could not be run."""
    wrong = [[r["method"], r["set"], str(r["seed"]), f"{r['budget']:g}", r["error"]] for r in rows if "error" in r]
    return ["## What could not be run", markdown(["method", "set", "seed", "budget", "why"], wrong)] if wrong else []
