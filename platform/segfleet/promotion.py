"""Whether the challenger replaces the champion: a pure decision, and its execution in the registry."""

import math
from dataclasses import dataclass

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.evaluation import evaluate_model
from segfleet.protocol import Protocol, ViewOptions, require_same_protocol
from segfleet.registry import CHALLENGER, CHAMPION, aliases_of, fetch, find_version, record_promotion
from segfleet.scores import Scores


@dataclass(frozen=True)
class Promotion:
    """A decision and the numbers behind it."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class PromotionReport:
    """What `promote` compared, decided and did."""

    name: str
    challenger_version: int
    champion_version: int | None
    """The champion before."""
    challenger: Scores
    champion: Scores | None
    promotion: Promotion
    is_executed: bool
    """Whether the challenger is the champion now."""


def decide_promotion(challenger: Scores, champion: Scores | None, *, min_gain: float) -> Promotion:
    """Promote a challenger whose mIoU is at least `min_gain` above the champion's, measured the same way."""
    if not 0 <= min_gain <= 1:
        raise InputError(f"min_gain must be a difference of mIoUs between 0 and 1, but got {min_gain}.")
    if not math.isfinite(challenger.miou):
        return Promotion(promote=False, reason="the challenger's mIoU is not a number")
    if champion is None:
        return Promotion(promote=True, reason=f"there is no champion yet; mIoU {challenger.miou:.4f}")
    try:
        require_same_protocol(challenger.protocol, champion.protocol)
    except InputError as error:
        return Promotion(promote=False, reason=str(error))
    gain = challenger.miou - champion.miou
    reason = (
        f"mIoU {challenger.miou:.4f} against {champion.miou:.4f}: gain {gain:+.4f}, required {min_gain:.4f}"
    )
    return Promotion(promote=gain >= min_gain, reason=reason)


def promote(
    tracking_uri: str,
    name: str,
    *,
    store: Store,
    split: str,
    views: ViewOptions,
    min_gain: float,
    dry_run: bool,
) -> PromotionReport:
    """Score the challenger and the champion of `name` under one protocol and move the alias if that is
    earned. A protocol that goes by the training's crop goes by the challenger's, for both.

    With `dry_run` nothing in the registry changes. InputError where there is no challenger, or where somebody
    else moved an alias meanwhile.
    """
    challenger_version = int(find_version(tracking_uri, name, CHALLENGER).version)
    before = aliases_of(tracking_uri, name)
    champion_version = before.get(CHAMPION)
    model = fetch(f"models:/{name}/{challenger_version}", tracking_uri=tracking_uri)
    protocol = views.protocol_on(store.digest, split, crop_size=model.crop_size)
    challenger = evaluate_model(model, store, protocol).scores
    if champion_version == challenger_version:
        promotion = Promotion(promote=True, reason=f"version {challenger_version} is the champion already")
        return PromotionReport(
            name, challenger_version, champion_version, challenger, challenger, promotion, is_executed=True
        )
    champion = (
        None if champion_version is None else _scored(tracking_uri, name, champion_version, store, protocol)
    )
    promotion = decide_promotion(challenger, champion, min_gain=min_gain)
    if not dry_run:
        if aliases_of(tracking_uri, name) != before:
            raise InputError(
                f"The aliases of {name!r} must not change during a comparison, but somebody moved one. Run "
                "the same "
                "command again."
            )
        record_promotion(
            tracking_uri,
            name,
            version=challenger_version,
            is_promoted=promotion.promote,
            reason=f"{promotion.reason} (protocol {protocol.digest}: {protocol})",
        )
    return PromotionReport(
        name,
        challenger_version,
        champion_version,
        challenger,
        champion,
        promotion,
        is_executed=promotion.promote and not dry_run,
    )


def comparison_table(report: PromotionReport) -> str:
    """Return both models' scores side by side, and the difference."""
    champion = report.champion
    rows = [("", "challenger", "champion", "gain")]
    rows.append(("version", str(report.challenger_version), str(report.champion_version or "none"), ""))
    for label, challenger_value, champion_value in (
        ("mIoU", report.challenger.miou, champion.miou if champion else None),
        ("pixel accuracy", report.challenger.pixel_accuracy, champion.pixel_accuracy if champion else None),
        *(
            (name, iou, champion.class_iou[name] if champion else None)
            for name, iou in report.challenger.class_iou.items()
        ),
    ):
        rows.append(
            (
                label,
                _number(challenger_value),
                _number(champion_value),
                _gain(challenger_value, champion_value),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _gain(challenger: float | None, champion: float | None) -> str:
    return "" if challenger is None or champion is None else f"{challenger - champion:+.4f}"


def _scored(tracking_uri: str, name: str, version: int, store: Store, protocol: Protocol) -> Scores:
    model = fetch(f"models:/{name}/{version}", tracking_uri=tracking_uri)
    return evaluate_model(model, store, protocol).scores
