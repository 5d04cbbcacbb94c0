"""A search in one table and one picture: what each trial tried, reached, and why it ended."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import matplotlib.lines
import matplotlib.ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pspnet.sizes import Size, sides
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


def leaderboard_table(trials: Sequence[TrialRecord]) -> str:
    """Return the trials in the given order as a plain table; the last column says why each ended."""
    paths = list(dict.fromkeys(path for trial in trials for path in trial.changes))
    names = [path.split(".")[-1] for path in paths]
    header = ["rank", "trial", "mIoU", "epochs", *names, "ended", "because"]
    rows = [header] + [[str(rank), *_cells(trial, paths)] for rank, trial in enumerate(trials, start=1)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
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
        epochs = list(trial.miou_by_epoch)
        curves.plot(epochs, list(trial.miou_by_epoch.values()), color=colour, marker="o", markersize=3)
        curves.annotate(
            f" {trial.number}", (epochs[-1], trial.miou_by_epoch[epochs[-1]]), color=colour, va="center"
        )
        by_lr.plot(trial.changes["optim.base_lr"], trial.miou, "o", color=colour)
        by_crop.plot(_side(trial.changes["data.crop_size"]), trial.miou, "o", color=colour)
    curves.set(xlabel="epoch (dashed: rungs)", ylabel="mIoU", title=title)
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


def _side(size: Size) -> float:
    """Return the side of the square of as many pixels."""
    return math.sqrt(math.prod(sides(size)))


def _cells(trial: TrialRecord, paths: Sequence[str]) -> list[str]:
    return [
        str(trial.number),
        "-" if math.isnan(trial.miou) else f"{trial.miou:.4f}",
        str(trial.num_epochs),
        *(_shown(trial.changes.get(path, "-")) for path in paths),
        trial.reason,
        trial.detail,
    ]


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
