"""A search on one page that can be sent by mail: no script, nothing from elsewhere, pictures inside."""

import base64
import html
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segfleet.importance import Importance
from segfleet.study import TrialRecord

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .7rem;text-align:left;vertical-align:top;"
    "border-bottom:1px solid #ddd}td.number{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"
    ".faint{color:#777}code{background:#f4f4f4;padding:.1rem .3rem}.scroll{overflow-x:auto}"
    ".bar{display:inline-block;height:.7rem;background:#2166ac;margin-right:.5rem}"
)
_MEANING_OF = {
    "complete": "trained to its end",
    "pruned": "given up at a rung, below the bar",
    "diverged": "the loss or its gradient was not finite",
    "oom": "did not fit into memory",
    "refused": "settings that cannot be trained together",
    "failed": "ended with an error",
    "lost": "its workers died too often",
    "running": "not ended",
}


@dataclass(frozen=True, kw_only=True)
class SearchFacts:
    """What the page says beside the trials."""

    study: str
    facts: Mapping[str, str]
    """Name and value, in the order of the page: data, protocol, base configuration, …"""
    class_iou: Mapping[str, float | None] = field(default_factory=dict)
    """Of the best model."""
    importances: Sequence[Importance] = ()
    compared_epoch: float = 0
    num_compared: int = 0
    pictures: Mapping[str, Path] = field(default_factory=dict)
    """Caption and PNG file."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Heading and plain table: finalists, where the time went."""
    front: Collection[int] = ()
    """Trials on the front of mIoU and cost."""
    commands: Sequence[str] = ()
    """What to type next."""


def write_page(path: Path, trials: Sequence[TrialRecord], about: SearchFacts) -> Path:
    """Write the page of a search; `trials` are the leaderboard."""
    title = f"Search {about.study}"
    counts = Counter(trial.reason for trial in trials)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _table(("", ""), [(name, value) for name, value in about.facts.items()]),
        "<h2>Why trials ended</h2>",
        _table(
            ("reason", "trials", "meaning"),
            [(reason, count, _MEANING_OF.get(reason, "")) for reason, count in counts.most_common()],
        ),
        "<h2>Leaderboard</h2>",
        _leaderboard(trials, about.front),
        _importance(about),
        *(_picture(caption, file) for caption, file in about.pictures.items() if file.is_file()),
        _classes(about.class_iou),
        *(
            f'<h2>{html.escape(heading)}</h2><pre class="scroll">{html.escape(table)}</pre>'
            for heading, table in about.tables.items()
        ),
    ]
    if about.commands:
        commands = "".join(f"<p><code>{html.escape(command)}</code></p>" for command in about.commands)
        parts.append(f"<h2>Next</h2>{commands}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    aside = path.with_suffix(".aside")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def _leaderboard(trials: Sequence[TrialRecord], front: Collection[int]) -> str:
    paths = list(dict.fromkeys(path for trial in trials for path in trial.changes))
    rows = []
    for rank, trial in enumerate(trials, start=1):
        miou = "" if math.isnan(trial.miou) else f"{trial.miou:.4f}"
        values = [_shown(trial.changes.get(path, "")) for path in paths]
        star = "*" if trial.number in front else ""
        cost = "" if math.isnan(trial.cost_s) else f"{trial.cost_s:.0f}{star}"
        rows.append((rank, trial.number, miou, trial.num_epochs, cost, *values, trial.reason, trial.detail))
    names = [path.split(".")[-1] for path in paths]
    head = ("rank", "trial", "mIoU", "epochs", "worker-s", *names, "ended", "because")
    return f'<div class="scroll">{_table(head, rows)}</div>'


def _importance(about: SearchFacts) -> str:
    heading = "<h2>Which settings matter</h2>"
    if not about.importances:
        return f"{heading}<p>Too few trials, or too much alike, to say.</p>"
    rows = []
    for item in about.importances:
        bar = f'<span class="bar" style="width:{12 * item.share:.2f}rem"></span>'
        rows.append((item.name, _Markup(f"{bar}{item.share:.0%}"), f"{item.low:.0%} to {item.high:.0%}"))
    return (
        f"{heading}<p>Share of each in the variance of the mIoU after epoch {about.compared_epoch:.4g}, which "
        f"{about.num_compared} trials reached (fANOVA); in the last column the middle 90 % over resampled trials.</p>"
        + _table(("setting", "share", "could be"), rows)
    )


def _classes(class_iou: Mapping[str, float | None]) -> str:
    if not class_iou:
        return ""
    rows = []
    for name, value in sorted(class_iou.items(), key=lambda item: 1.0 if item[1] is None else -item[1]):
        if value is None or math.isnan(value):
            rows.append((name, "absent"))
            continue
        bar = f'<span class="bar" style="width:{12 * value:.2f}rem"></span>'
        rows.append((name, _Markup(f"{bar}{value:.4f}")))
    return "<h2>Classes of the best model</h2>" + _table(("class", "IoU"), rows)


def _picture(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    text = html.escape(caption)
    return f'<h2>{text}</h2><img alt="{text}" src="data:image/png;base64,{data}">'


class _Markup(str):
    """Text that is HTML already."""


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = []
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{html.escape(name)}" for name in head) + "</tr>")
    for row in rows:
        cells = []
        for cell in row:
            text = cell if isinstance(cell, _Markup) else html.escape(str(cell))
            kind = ' class="number"' if isinstance(cell, int | float) else ""
            cells.append(f"<td{kind}>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
