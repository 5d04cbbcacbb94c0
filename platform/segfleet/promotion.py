"""Whether the challenger replaces the champion: both measured in one way, the gate's decision, and its execution."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import numpy as np

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.clean_load import check_clean_load
from segfleet.comparison import side_by_side
from segfleet.evaluation import Evaluation, evaluate_model
from segfleet.gate import Decision, Limits, Measured, decide, size_failures
from segfleet.package import SegmentationModel
from segfleet.promotion_record import PromotionEntry, alone, append, history, record
from segfleet.protocol import Protocol, ViewOptions
from segfleet.registry import CHALLENGER, CHAMPION, aliases_of, fetch, find_version
from segfleet.scores import Scores
from segfleet.too_large import predict_or_refuse

LATENCY_ROUNDS, LATENCY_IMAGES = 3, 2


@dataclass(frozen=True, kw_only=True)
class PromotionReport:
    """What `promote` compared, decided and did."""

    name: str
    challenger_version: int
    champion_version: int | None
    """The champion before."""
    challenger: Scores
    champion: Scores | None
    promote: bool
    reasons: list[str]
    numbers: dict[str, float] = field(default_factory=dict)
    """Gain, its lower end, seconds per image, bytes: what the decision rests on."""
    is_executed: bool
    """Whether the challenger is the champion now."""


def promote(
    tracking_uri: str,
    name: str,
    *,
    store: Store,
    split: str,
    views: ViewOptions,
    limits: Limits,
    dry_run: bool,
    why: str = "",
) -> PromotionReport:
    """Score the challenger and the champion of `name` under one protocol and move the alias if that is earned.

    A protocol that goes by the training's crop goes by the challenger's, for both. A first champion needs no gain.
    With `dry_run` nothing in the registry changes. InputError where there is no challenger, where it does not load in
    a process of its own, or where somebody else decides at the same time.
    """
    version = int(find_version(tracking_uri, name, CHALLENGER).version)
    before = aliases_of(tracking_uri, name)
    champion_version = before.get(CHAMPION)
    challenger = fetch(f"models:/{name}/{version}", tracking_uri=tracking_uri)
    protocol = views.protocol_on(store.digest, split, crop_size=challenger.crop_size)
    ours = evaluate_model(challenger, store, protocol)
    if champion_version == version:
        if not dry_run:
            _completed(tracking_uri, name, version, "promoted")
        return PromotionReport(
            name=name,
            challenger_version=version,
            champion_version=version,
            challenger=ours.scores,
            champion=ours.scores,
            promote=True,
            reasons=[f"version {version} is the champion already"],
            is_executed=True,
        )
    theirs: Evaluation | None = None
    if champion_version is None:
        decision, numbers = _without_champion(challenger, ours, limits)
    else:
        champion = fetch(f"models:/{name}/{champion_version}", tracking_uri=tracking_uri)
        theirs = evaluate_model(champion, store, protocol)
        decision, numbers = _compared(challenger, ours, champion, theirs, store, protocol, limits)
    check_clean_load(challenger, tracking_uri=tracking_uri)
    if not dry_run:
        entry = PromotionEntry(
            decision="promoted" if decision.promote else "refused",
            version=version,
            champion_before=champion_version,
            champion_after=version if decision.promote else champion_version,
            reasons=decision.reasons,
            protocol=f"{protocol.digest}: {protocol}",
            numbers=numbers | {f"iou {key}": round(value, 5) for key, value in decision.class_gains.items()},
            why=why,
        )
        execute(tracking_uri, name, entry, before=before)
    return PromotionReport(
        name=name,
        challenger_version=version,
        champion_version=champion_version,
        challenger=ours.scores,
        champion=None if theirs is None else theirs.scores,
        promote=decision.promote,
        reasons=decision.reasons,
        numbers=numbers,
        is_executed=decision.promote and not dry_run,
    )


def execute(tracking_uri: str, name: str, entry: PromotionEntry, *, before: Mapping[str, int]) -> None:
    """Carry out a decision that rests on the aliases `before`; InputError where one was moved since."""
    with alone(tracking_uri, name):
        if aliases_of(tracking_uri, name) != before:
            raise InputError(
                f"The aliases of {name!r} must not change during a comparison, but somebody moved one. Run the "
                "same command again."
            )
        record(tracking_uri, name, entry)


def roll_back(tracking_uri: str, name: str, *, dry_run: bool, why: str = "") -> PromotionEntry:
    """Make the champion before the last promotion the champion again; InputError where there was none.

    Where that was done and who did it died before the history knew, it is only added there.
    """
    current = aliases_of(tracking_uri, name).get(CHAMPION)
    if current is not None and not dry_run:
        completed = _completed(tracking_uri, name, current, "rolled back")
        if completed is not None:
            return completed
    former = next(
        (
            entry.champion_before
            for entry in reversed(history(tracking_uri, name))
            if entry.decision == "promoted" and entry.champion_after == current
        ),
        None,
    )
    if current is None or former is None:
        raise InputError(
            f"A promotion can be taken back where there was a champion before, but the history of {name!r} has none "
            f"before version {current}. --history True shows it."
        )
    check_clean_load(fetch(f"models:/{name}/{former}", tracking_uri=tracking_uri), tracking_uri=tracking_uri)
    entry = PromotionEntry(
        decision="rolled back",
        version=former,
        champion_before=current,
        champion_after=former,
        reasons=[f"back to the champion before version {current}"],
        why=why,
    )
    if not dry_run:
        with alone(tracking_uri, name):
            if aliases_of(tracking_uri, name).get(CHAMPION) != current:
                raise InputError(
                    f"The champion of {name!r} must not change meanwhile, but it did. Look again."
                )
            record(tracking_uri, name, entry)
    return entry


def comparison_table(report: PromotionReport) -> str:
    """Return both models' scores side by side, and the difference."""
    headings = (
        ("", "challenger", "champion", "gain"),
        ("version", str(report.challenger_version), str(report.champion_version or "none"), ""),
    )
    return side_by_side(headings, report.challenger, report.champion)


def _completed(
    tracking_uri: str, name: str, version: int, decision: Literal["promoted", "rolled back"]
) -> PromotionEntry | None:
    """Add the decision that made the present champion to the history, if who made it died before it did."""
    entries = history(tracking_uri, name)
    tags = find_version(tracking_uri, name, str(version)).tags
    before = next((entry.champion_after for entry in reversed(entries) if entry.champion_after), None)
    if before == version or tags.get("promotion") != decision:
        return None
    entry = PromotionEntry(
        decision=decision,
        version=version,
        champion_before=before,
        champion_after=version,
        reasons=[tags.get("promotion_reason", "")],
        why="completed after an interruption",
    )
    append(tracking_uri, name, entry)
    return entry


def _without_champion(
    challenger: SegmentationModel, evaluation: Evaluation, limits: Limits
) -> tuple[Decision, dict[str, float]]:
    size = _num_bytes(challenger)
    measured = Measured(
        counts=_counts(evaluation, list(evaluation.images)), seconds_per_image=0.0, size_bytes=size
    )
    failed = size_failures(measured, limits)
    miou = evaluation.scores.miou
    decision = Decision(
        promote=not failed,
        reasons=failed or [f"there is no champion yet; mIoU {miou:.4f}"],
        gain=miou,
        lower_gain=miou,
        class_gains={},
        num_images=len(evaluation.image_miou),
    )
    return decision, {"miou": miou, "bytes": float(size)}


def _compared(
    challenger: SegmentationModel,
    ours: Evaluation,
    champion: SegmentationModel,
    theirs: Evaluation,
    store: Store,
    protocol: Protocol,
    limits: Limits,
) -> tuple[Decision, dict[str, float]]:
    indices = sorted(ours.images)
    seconds = _seconds_per_image((challenger, champion), store, protocol, indices)
    measured = [
        Measured(counts=_counts(evaluation, indices), seconds_per_image=taken, size_bytes=_num_bytes(model))
        for model, evaluation, taken in zip((challenger, champion), (ours, theirs), seconds, strict=True)
    ]
    decision = decide(measured[0], measured[1], list(store.class_table.class_names), limits)
    numbers = {
        "miou": ours.scores.miou,
        "champion_miou": theirs.scores.miou,
        "gain": decision.gain,
        "lower_gain": decision.lower_gain,
        "min_gain": limits.min_gain,
        "confidence": limits.confidence,
        "num_images": float(decision.num_images),
        "latency_ratio": seconds[0] / seconds[1],
        "bytes": float(measured[0].size_bytes),
    }
    return decision, {key: round(value, 6) for key, value in numbers.items()}


def _counts(evaluation: Evaluation, indices: Sequence[int]) -> np.ndarray:
    return np.stack([evaluation.images[index].confusion.counts.numpy() for index in indices])


def _num_bytes(model: SegmentationModel) -> int:
    return sum(value.numel() * value.element_size() for value in model.network.state_dict().values())


def _seconds_per_image(
    models: Sequence[SegmentationModel], store: Store, protocol: Protocol, indices: Sequence[int]
) -> list[float]:
    """Return the median seconds of each model per image, the models by turns."""
    split = store.split(protocol.split)
    images = [(split.name(index), split.image(index)) for index in indices[:LATENCY_IMAGES]]
    taken: list[list[float]] = [[] for _ in models]
    for _ in range(LATENCY_ROUNDS):
        for of_model, model in zip(taken, models, strict=True):
            started = time.perf_counter()
            for name, image in images:
                predict_or_refuse(model, image, protocol, name=name)
            of_model.append((time.perf_counter() - started) / len(images))
    return [median(of_model) for of_model in taken]
