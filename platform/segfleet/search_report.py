"""A search in one table and one picture: what each trial tried, reached, and why it ended."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.cm
import matplotlib.colors
import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pspnet.sizes import Size, sides
from segfleet.finals import Finalist
from segfleet.importance import Importance
from segfleet.study import TrialRecord

_COLOUR_OF = {
    "complete": "#1b7837",
    "pruned": "#2166ac",
    "diverged": "#b2182b",
    "oom": "#d6604d",
    "refused": "#e08214",
    "failed": "#762a83",
    "lost": "#4d4d4d",
    "running": "#999999",
}


MAX_LISTED = 8
"""Causes, and trials of each, that a message lists."""


def leaderboard_table(trials: Sequence[TrialRecord], front: Collection[int] = ()) -> str:
    """Return the trials in the given order as a plain table; the last column says why each ended.

    Those on the front of mIoU and cost have a star behind their cost in worker-seconds.
    """
    paths = list(dict.fromkeys(path for trial in trials for path in trial.changes))
    names = [path.split(".")[-1] for path in paths]
    header = ["rank", "trial", "mIoU", "epochs", "cost_s", *names, "ended", "because"]
    rows = [header] + [
        [str(rank), *_cells(trial, paths, front)] for rank, trial in enumerate(trials, start=1)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def ended_badly(trials: Sequence[TrialRecord]) -> list[str]:
    """Return a sentence for each way in which trials ended without being complete or pruned: how many, and why."""
    by_cause: dict[tuple[str, str], list[int]] = {}
    for trial in trials:
        if trial.reason in ("diverged", "oom", "refused", "failed", "lost"):
            by_cause.setdefault((trial.reason, trial.detail), []).append(trial.number)
    found = sorted(by_cause.items(), key=lambda item: (-len(item[1]), item[1]))
    sentences = [
        f"{len(numbers)} of {len(trials)} trials {reason} ({', '.join(map(str, numbers[:MAX_LISTED]))}"
        f"{', …' if len(numbers) > MAX_LISTED else ''}): {detail or 'no reason was kept'}"
        for (reason, detail), numbers in found
    ]
    return sentences[:MAX_LISTED] + (
        [f"and {len(found) - MAX_LISTED} more causes"] if len(found) > MAX_LISTED else []
    )


def draw_study(trials: Sequence[TrialRecord], *, title: str, rung_epochs: Sequence[int], path: Path) -> Path:
    """Write a PNG to `path`: the mIoU of every trial over its epochs, and over its learning rate and crop size."""
    figure = matplotlib.figure.Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    curves, by_lr, by_crop = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for rung in rung_epochs:
        curves.axvline(rung, color="#cccccc", linewidth=1, linestyle="--")
    for trial in trials:
        colour = _COLOUR_OF[trial.reason]
        if not trial.miou_by_epoch:
            continue
        seen, mious = (
            [epoch * trial.epoch_weight for epoch in trial.miou_by_epoch],
            list(trial.miou_by_epoch.values()),
        )
        curves.plot(seen, mious, color=colour, marker="o", markersize=3)
        curves.annotate(f" {trial.number}", (seen[-1], mious[-1]), color=colour, va="center")
        by_lr.plot(trial.changes["optim.base_lr"], trial.miou, "o", color=colour)
        by_crop.plot(_side(trial.changes["data.crop_size"]), trial.miou, "o", color=colour)
    is_scaled = any(trial.epoch_weight != 1 for trial in trials)
    unit = "pixels seen, in epochs of the base configuration" if is_scaled else "epoch"
    curves.set(xlabel=f"{unit} (dashed: rungs)", ylabel="mIoU", title=title)
    by_lr.set(xlabel="base_lr", xscale="log")
    crop_sizes = sorted({trial.changes["data.crop_size"] for trial in trials}, key=_side)
    by_crop.set(xlabel="crop_size, pixels")
    by_lr.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    by_crop.set_xticks([_side(size) for size in crop_sizes], [str(size) for size in crop_sizes])
    present = [reason for reason in _COLOUR_OF if any(trial.reason == reason for trial in trials)]
    curves.legend(
        handles=[matplotlib.lines.Line2D([], [], color=_COLOUR_OF[reason], marker="o") for reason in present],
        labels=present,
    )
    for axes in (curves, by_lr, by_crop):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    return path


def draw_importances(importances: Sequence[Importance], *, title: str, path: Path) -> Path:
    """Write a PNG to `path`: the share of each setting in the variance of the mIoU, with its interval."""
    figure = matplotlib.figure.Figure(figsize=(9, 1.2 + 0.5 * len(importances)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = [item.share for item in importances]
    around = [
        [max(0.0, item.share - item.low) for item in importances],
        [max(0.0, item.high - item.share) for item in importances],
    ]
    axes.barh(range(len(shares)), shares, xerr=around, color="#2166ac", ecolor="#777777", capsize=4)
    axes.set_yticks(range(len(shares)), [item.name for item in importances])
    axes.invert_yaxis()
    axes.set(
        xlim=(0, 1), xlabel="share of the variance (line: middle 90 % over resampled trials)", title=title
    )
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)
    return path


def draw_front(trials: Sequence[TrialRecord], front: Collection[int], *, title: str, path: Path) -> Path:
    """Write a PNG to `path`: mIoU over cost of the complete trials, and the line of those on the front."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    complete = [trial for trial in trials if trial.reason == "complete"]
    on_front = sorted((trial for trial in complete if trial.number in front), key=lambda trial: trial.cost_s)
    axes.plot([trial.cost_s for trial in complete], [trial.miou for trial in complete], "o", color="#999999")
    axes.plot([trial.cost_s for trial in on_front], [trial.miou for trial in on_front], "o-", color="#1b7837")
    for trial in complete:
        axes.annotate(f" {trial.number}", (trial.cost_s, trial.miou), va="bottom")
    axes.set(xlabel="worker-seconds", ylabel="mIoU", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path


def draw_finals(finalists: Sequence[Finalist], *, path: Path) -> Path:
    """Write a PNG to `path`: of each finalist the mIoU of every seed, their mean and its lower bound."""
    figure = matplotlib.figure.Figure(figsize=(8, 1.4 + 0.6 * len(finalists)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, finalist in enumerate(finalists):
        mious = [training.miou for training in finalist.trainings if training.reason == "complete"]
        axes.plot(mious, [row] * len(mious), "o", color="#2166ac", label="a seed" if row == 0 else None)
        axes.plot(finalist.trial.miou, row, "x", color="#b2182b", label=None if row else "in the search")
        axes.plot(
            [finalist.low, finalist.mean],
            [row, row],
            "-|",
            color="#1b7837",
            markersize=14,
            label=None if row else "mean, lower bound",
        )
    axes.set_yticks(range(len(finalists)), [f"trial {finalist.trial.number}" for finalist in finalists])
    axes.invert_yaxis()
    axes.set(xlabel="mIoU", title="finalists, trained again with other seeds")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return path


def draw_slices(points: Sequence[tuple[Mapping[str, Any], float]], *, title: str, path: Path) -> Path:
    """Write a PNG to `path`: for each setting the mIoU over its values, and all settings of each trial side by side."""
    names = list(dict.fromkeys(name for params, _ in points for name in params))
    mious = [miou for _, miou in points]
    colours = matplotlib.colormaps["viridis"]
    norm = matplotlib.colors.Normalize(min(mious), max(mious))
    figure = matplotlib.figure.Figure(figsize=(13, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.1))[:, 0]
    above.suptitle(title)
    positions: list[tuple[list[float], Sequence[str]]] = []
    for name, axes in zip(names, above.subplots(1, len(names), squeeze=False, sharey=True)[0], strict=True):
        values = [params.get(name) for params, _ in points]
        places, ticks, is_log = _axis(values)
        ends = [10**place if is_log else place for place in (min(places), max(places))]
        positions.append((places, (ticks[0], ticks[-1]) if ticks else [f"{end:.3g}" for end in ends]))
        axes.scatter(places, mious, c=mious, cmap=colours, norm=norm)
        axes.set(xlabel=f"log10 {name}" if is_log else name)
        if name == names[0]:
            axes.set_ylabel("mIoU")
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        axes.grid(alpha=0.3)
    parallel = below.subplots()
    for number, miou in enumerate(mious):
        line = [_between(places, number) for places, _ in positions] + [float(norm(miou))]
        parallel.plot(range(len(line)), line, color=colours(norm(miou)), alpha=0.7)
    parallel.set_xticks(range(len(names) + 1), [*names, "mIoU"])
    for column, (_, both) in enumerate(positions):
        for height, text in zip((0.0, 1.0), both, strict=True):
            parallel.annotate(f" {text}", (column, height), color="#777777", fontsize=8)
    parallel.set_yticks([])
    below.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=parallel, label="mIoU")
    figure.savefig(path, dpi=110)
    return path


def _axis(values: Sequence[Any]) -> tuple[list[float], list[str], bool]:
    """Return where values lie, names of the places where they are choices, and whether these are logarithms."""
    if not all(isinstance(value, float) for value in values):
        choices = sorted(set(values), key=lambda value: (str(type(value)), value))
        return [float(choices.index(value)) for value in values], list(map(str, choices)), False
    if min(values) > 0 and max(values) / min(values) > 20:
        return [math.log10(value) for value in values], [], True
    return list(values), [], False


def _between(places: Sequence[float], number: int) -> float:
    """Return a place as a share of the way from the lowest to the highest."""
    span = max(places) - min(places)
    return (places[number] - min(places)) / span if span else 0.5


def _side(size: Size) -> float:
    """Return the side of the square of as many pixels."""
    return math.sqrt(math.prod(sides(size)))


def _cells(trial: TrialRecord, paths: Sequence[str], front: Collection[int]) -> list[str]:
    return [
        str(trial.number),
        "-" if math.isnan(trial.miou) else f"{trial.miou:.4f}",
        str(trial.num_epochs),
        "-" if math.isnan(trial.cost_s) else f"{trial.cost_s:.0f}{'*' if trial.number in front else ''}",
        *(_shown(trial.changes.get(path, "-")) for path in paths),
        trial.reason,
        trial.detail,
    ]


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
