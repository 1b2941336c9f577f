"""The measurements as Markdown tables, compared with the targets, and as plots."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tools.simulation.measures import Measured
from tools.simulation.policies import NONE, OURS, PLAIN

TITLES = {
    "steady": "Steady load",
    "bursts": "Bursts",
    "changing": "Changing and uneven",
    "overload": "Overload",
    "tenants": "Tenants",
    "priorities": "Priorities",
}
#: Engines on which waiting for a burst can pay: a batch costs more by itself than a burst lasts.
_WINDOW_PAYS = ("edge", "gpu", "the same")


def _p(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def latency_table(rows: Sequence[Measured]) -> str:
    """One line per case, one column per policy: p50 / p99 ms, mean batch, duty."""
    policies = list(dict.fromkeys(row.policy for row in rows))
    lines = ["| case | " + " | ".join(policies) + " |", "|---" * (len(policies) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        cells = [_cell(row) for row in rows if row.case == case]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Measured) -> str:
    return f"{_p(row.p50_ms)}/{_p(row.p99_ms)} b{row.mean_batch:.1f} u{row.duty:.2f}"


def overload_table(rows: Sequence[Measured]) -> str:
    lines = [
        "| case | policy | goodput | answered late | refused | refused after, p50/p99 ms | p50/p99 ms | batch |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        refusal = (
            "" if row.refusal_p50_ms is None else f"{_p(row.refusal_p50_ms)}/{_p(row.refusal_p99_ms or 0)}"
        )
        lines.append(
            f"| {row.case} | {row.policy} | {_percent(row.goodput)} | {_percent(row.late)} | {_percent(row.refused)} "
            f"| {refusal} | {_p(row.p50_ms)}/{_p(row.p99_ms)} | {row.mean_batch:.1f} |"
        )
    return "\n".join(lines)


def tenants_table(rows: Sequence[Measured]) -> str:
    lines = [
        "| case | policy | Jain | quiet p99 ms | alone | ratio | bound | quiet refused | goodput |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [""] * 5
        if row.quiet_p99_ms and row.quiet_alone_ms and row.bound_ms:
            alone = row.quiet_alone_ms
            cells = [_p(row.quiet_p99_ms), _p(alone), f"{row.quiet_p99_ms / alone:.2f}"]
            cells += [f"{row.bound_ms / alone:.2f}", _percent(row.quiet_refused or 0)]
        lines.append(
            f"| {row.case} | {row.policy} | {row.jain or 0:.3f} | {' | '.join(cells)} | {_percent(row.goodput)} |"
        )
    return "\n".join(lines)


def priorities_table(rows: Sequence[Measured]) -> str:
    lines = ["| case | policy | high p99 ms | low p99 ms | goodput |", "|---" * 5 + "|"]
    lines += [
        f"| {row.case} | {row.policy} | {_p(row.high_p99_ms or 0)} | {_p(row.low_p99_ms or 0)} | {_percent(row.goodput)} |"
        for row in rows
    ]
    return "\n".join(lines)


TABLES = {"overload": overload_table, "tenants": tenants_table, "priorities": priorities_table}


def by_case(rows: Sequence[Measured], *groups: str) -> dict[str, dict[str, Measured]]:
    """Case -> policy -> row, of some groups."""
    found: dict[str, dict[str, Measured]] = {}
    for row in rows:
        if row.group in groups:
            found.setdefault(row.case, {})[row.policy] = row
    return found


def worst_against(rows: Sequence[Measured], other: str) -> tuple[float, str]:
    """The largest p50 of ours over that of another policy, less 1, and where."""
    cases = by_case(rows, "steady", "bursts", "changing")
    return max((case[OURS].p50_ms / case[other].p50_ms - 1, name) for name, case in cases.items())


def least_gain_in_bursts(rows: Sequence[Measured]) -> tuple[float, str]:
    """The smallest gain of p50 in bursts, over no window, where a window can pay."""
    cases = by_case(rows, "bursts").items()
    return min(
        (1 - case[OURS].p50_ms / case[NONE].p50_ms, name)
        for name, case in cases
        if name.startswith(_WINDOW_PAYS)
    )


def low_load_wins(rows: Sequence[Measured]) -> dict[str, float]:
    """p50 of ours over that of the fixed 2 ms window, in each case of low load."""
    cases = by_case(rows, "steady", "bursts").items()
    return {
        name: case[OURS].p50_ms / case["fixed 2 ms"].p50_ms
        for name, case in cases
        if "bursts" in name or name.endswith((" 2%", " 10%"))
    }


def figures(rows: Sequence[Measured]) -> str:
    """The targets and the measured figures."""
    worst, worst_at = max(worst_against(rows, NONE), worst_against(rows, PLAIN))
    gain, gain_at = least_gain_in_bursts(rows)
    wins = low_load_wins(rows)
    lost = [name for name, ratio in wins.items() if ratio >= 1]
    overload = [(case[OURS].goodput, name) for name, case in by_case(rows, "overload").items()]
    goodput, goodput_at = min(overload)
    ratios = {
        name: (case[OURS].quiet_p99_ms or 0) / case[OURS].quiet_alone_ms
        for name, case in by_case(rows, "tenants").items()
        if case[OURS].quiet_alone_ms
    }
    reached = [name for name, ratio in ratios.items() if ratio <= 1.2]
    lines = [
        (
            "p50 over natural batching, plain or ours, at most 3 %",
            worst <= 0.03,
            f"worst {100 * worst:+.1f} % ({worst_at})",
        ),
        (
            "p50 in bursts at least 15 % below no window, edge and gpu",
            gain >= 0.15,
            f"least {_percent(gain)} ({gain_at})",
        ),
        (
            "p50 below a fixed 2 ms window at low load",
            not lost,
            f"in {len(wins) - len(lost)} of {len(wins)} cases",
        ),
        ("goodput at least 95 % in overload", goodput >= 0.95, f"least {_percent(goodput)} ({goodput_at})"),
        (
            "a flood raises the quiet tenant's p99 by at most 20 %",
            len(reached) == len(ratios),
            f"in {len(reached)} of {len(ratios)} cases: {'; '.join(reached) or 'none'}",
        ),
    ]
    head = "| target | reached | measured |\n|---|---|---|\n"
    return head + "\n".join(
        f"| {name} | {'yes' if is_so else 'no'} | {what} |" for name, is_so, what in lines
    )


def markdown(rows: Sequence[Measured]) -> str:
    parts = []
    for group, title in TITLES.items():
        chosen = [row for row in rows if row.group == group]
        if chosen:
            parts.append(f"### {title}\n\n{TABLES.get(group, latency_table)(chosen)}")
    return "\n\n".join([*parts, f"### Figures\n\n{figures(rows)}"])


def plot_p50(rows: Sequence[Measured], out: Path) -> None:
    """p50 of each policy over that of plain natural batching, case by case."""
    from matplotlib import pyplot as plt

    cases = by_case(rows, "steady", "bursts")
    names = list(cases)[::-1]
    figure, axes = plt.subplots(figsize=(8, 7))
    shown = {
        OURS: "o",
        "fixed 1 ms": "<",
        "fixed 2 ms": "s",
        "fixed 5 ms": ">",
        "bentoml": "^",
        "clipper": "x",
    }
    for policy, mark in shown.items():
        ratios = [cases[name][policy].p50_ms / cases[name][PLAIN].p50_ms for name in names]
        axes.plot(ratios, range(len(names)), mark, label=policy, zorder=3 if policy == OURS else 2)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="p50 over that of plain natural batching", yticks=range(len(names)))
    axes.set_yticklabels(names, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, out)


def plot_goodput(rows: Sequence[Measured], out: Path) -> None:
    """Answers in time over offered load, both as shares of what full batches can serve."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    chosen = [row for row in rows if row.group == "goodput"]
    for policy in dict.fromkeys(row.policy for row in chosen):
        of = [row for row in chosen if row.policy == policy]
        axes.plot(
            [float(row.case) for row in of], [row.goodput for row in of], "o-", label=policy, markersize=3
        )
    axes.set(xlabel="offered load / capacity", ylabel="answers in time / capacity", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, out)


def plot_latencies(latencies: dict[str, NDArray[np.float64]], title: str, out: Path) -> None:
    """The distribution of latencies of one case, in milliseconds by policy."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for policy, values in latencies.items():
        ordered = np.sort(values[~np.isnan(values)])
        axes.plot(ordered, np.linspace(0, 1, len(ordered)), label=policy, linewidth=1.2)
    longest = max(float(np.nanpercentile(values, 99)) for values in latencies.values())
    axes.set(xlabel="latency, ms", ylabel="share of requests", xlim=(0, longest), ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, out)


def _save(figure: object, out: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(out, dpi=110, bbox_inches="tight")  # type: ignore[attr-defined]
    plt.close(figure)  # type: ignore[arg-type]
