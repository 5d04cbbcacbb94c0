"""Laws of the promotion: the decision on numbers, and its execution in a registry."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet import promotion, registry, tracking
from segfleet.config import TrackingConfig
from segfleet.evaluation import evaluate_model
from segfleet.promotion import comparison_table, decide_promotion, promote
from segfleet.protocol import Protocol, ViewOptions
from segfleet.registry import aliases_of, package_model, register
from segfleet.scores import Scores

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)

HOW: dict[str, Any] = {"split": "val", "views": ViewOptions()}
PROTOCOL = Protocol(store_digest="d", split="val")


def scores(miou: float, protocol: Protocol = PROTOCOL) -> Scores:
    return Scores(miou=miou, mean_accuracy=0.5, pixel_accuracy=0.5, class_iou={}, protocol=protocol)


@pytest.mark.parametrize(
    ("challenger", "champion", "min_gain", "is_promoted", "reason"),
    [
        (0.25, None, 0.0, True, "there is no champion yet; mIoU 0.2500"),
        (0.75, 0.5, 0.25, True, "mIoU 0.7500 against 0.5000: gain +0.2500, required 0.2500"),
        (0.75, 0.5, 0.5, False, "mIoU 0.7500 against 0.5000: gain +0.2500, required 0.5000"),
        (0.5, 0.75, 0.0, False, "mIoU 0.5000 against 0.7500: gain -0.2500, required 0.0000"),
        (0.5, 0.5, 0.0, True, "mIoU 0.5000 against 0.5000: gain +0.0000, required 0.0000"),
        (math.nan, None, 0.0, False, "the challenger's mIoU is not a number"),
    ],
)
def test_a_challenger_needs_the_gain_that_is_asked_for(
    challenger: float, champion: float | None, min_gain: float, is_promoted: bool, reason: str
) -> None:
    decision = decide_promotion(
        scores(challenger), None if champion is None else scores(champion), min_gain=min_gain
    )
    assert (decision.promote, decision.reason) == (is_promoted, reason)


@pytest.mark.parametrize(
    "change",
    [
        {"store_digest": "e"},
        {"split": "test"},
        {"flip": True},
        {"window": 713},
        {"scales": (1.0, 2.0)},
        {"precision": "bf16"},
    ],
)
def test_scores_of_different_protocols_are_never_compared(change: dict[str, object]) -> None:
    other = dataclasses.replace(PROTOCOL, **change)  # type: ignore[arg-type]
    decision = decide_promotion(scores(0.9, other), scores(0.1), min_gain=0.0)
    assert not decision.promote
    assert "only under one protocol" in decision.reason
    for name, value in change.items():
        assert f"{name} {value} and {getattr(PROTOCOL, name)}" in decision.reason


@pytest.mark.parametrize("min_gain", [-0.1, 1.5, math.nan])
def test_a_gain_that_is_no_difference_of_mious_is_refused(min_gain: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        decide_promotion(scores(0.5), None, min_gain=min_gain)


@pytest.fixture
def registered(
    local: TrackingConfig,
    write_checkpoint: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> str:
    """A model whose champion sees cars everywhere, and whose challenger sees road, of which there is more."""
    name = f"model-{abs(hash(request.node.name))}"
    for favourite in (1, 0):
        checkpoint = write_checkpoint(tmp_path / f"epoch_000{favourite}", favourite=favourite)
        register(local.tracking_uri, name, package_model(checkpoint, tmp_path / f"package_{favourite}"))
    assert aliases_of(local.tracking_uri, name) == {"champion": 1, "challenger": 2}
    return name


def test_a_better_challenger_becomes_champion_and_the_version_says_why(
    local: TrackingConfig, store: Store, registered: str
) -> None:
    uri = local.tracking_uri

    refused = promote(uri, registered, store=store, **HOW, min_gain=0.9, dry_run=False)
    assert (refused.promotion.promote, refused.is_executed) == (False, False)
    assert aliases_of(uri, registered)["champion"] == 1

    tried = promote(uri, registered, store=store, **HOW, min_gain=0.01, dry_run=True)
    assert (tried.promotion.promote, tried.is_executed) == (True, False)
    assert aliases_of(uri, registered)["champion"] == 1

    done = promote(uri, registered, store=store, **HOW, min_gain=0.01, dry_run=False)
    assert (done.promotion.promote, done.is_executed) == (True, True)
    assert aliases_of(uri, registered)["champion"] == 2
    # road is three quarters of the pixels or a little more; car and road are the classes that occur
    assert done.challenger.class_iou["car"] == 0.0
    assert done.champion is not None
    assert done.champion.class_iou["road"] == 0.0
    assert done.challenger.miou == pytest.approx(done.challenger.pixel_accuracy / 2)
    tags = tracking.client(uri).get_model_version(registered, "2").tags
    assert tags["promotion"] == "promoted"
    assert done.promotion.reason in tags["promotion_reason"]
    assert "split val" in tags["promotion_reason"]
    assert "road" in comparison_table(done)

    again = promote(uri, registered, store=store, **HOW, min_gain=0.01, dry_run=False)
    assert "already" in again.promotion.reason


def test_an_alias_that_somebody_moved_meanwhile_stops_the_promotion(
    local: TrackingConfig, store: Store, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def evaluate_slowly(*arguments: object) -> object:
        tracking.client(local.tracking_uri).set_registered_model_alias(registered, "champion", "2")
        return evaluate_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(promotion, "evaluate_model", evaluate_slowly)
    with pytest.raises(InputError, match="somebody moved one"):
        promote(local.tracking_uri, registered, store=store, **HOW, min_gain=0.0, dry_run=False)


def test_a_model_without_challenger_is_refused(local: TrackingConfig, store: Store, registered: str) -> None:
    tracking.client(local.tracking_uri).delete_registered_model_alias(registered, registry.CHALLENGER)
    with pytest.raises(InputError, match="no version or alias 'challenger'"):
        promote(local.tracking_uri, registered, store=store, **HOW, min_gain=0.0, dry_run=False)
