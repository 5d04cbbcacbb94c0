"""Scores of two models side by side; only those of one protocol are."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pspnet.errors import InputError
from pspnet.json_values import parse_json, typed
from segfleet.protocol import Protocol, require_same_protocol
from segfleet.scores import Scores


def earlier_scores(path: str | Path, protocol: Protocol, class_names: Iterable[str]) -> tuple[str, Scores]:
    """Return the model and the scores of the scores.json that an earlier evaluation under `protocol` wrote.

    InputError where it is damaged or another file, or its protocol is another.
    """
    try:
        record = typed(dict[str, Any], parse_json(Path(path).read_bytes(), "It"), "It")
        model = typed(str, record.get("model"), "model")
        scores = Scores.from_dict(typed(dict[str, Any], record.get("scores"), "scores"))
    except (OSError, InputError) as error:
        reason = f"{error.strerror}." if isinstance(error, OSError) else error
        raise InputError(
            f"--compare-with must be the scores.json that jobs/evaluate.py wrote, but {path} is not: {reason} "
            "Evaluate that model again."
        ) from error
    require_same_protocol(protocol, scores.protocol)
    if set(scores.class_iou) != set(class_names):
        raise InputError(
            f"--compare-with must have an IoU of each class of the store, but {path} has {len(scores.class_iou)}: "
            f"{', '.join(scores.class_iou) or 'none'}. Evaluate that model again."
        )
    return model, scores


def side_by_side(headings: Sequence[Sequence[str]], ours: Scores, theirs: Scores | None) -> str:
    """Return mIoU, pixel accuracy and the classes' IoU of both, and what ours has more, below rows of four headings."""
    values = _values(ours)
    others = dict.fromkeys(values) if theirs is None else _values(theirs)
    rows = [
        *headings,
        *(
            (name, _number(iou), _number(others[name]), _gain(iou, others[name]))
            for name, iou in values.items()
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


def _values(scores: Scores) -> dict[str, float | None]:
    return {"mIoU": scores.miou, "pixel accuracy": scores.pixel_accuracy, **scores.class_iou}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gain(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{ours - theirs:+.4f}"
