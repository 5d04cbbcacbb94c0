"""Laws of the promotion: the decision on numbers, and its execution in a registry."""

import dataclasses
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet import promotion, registry, tracking_server
from segfleet.clean_load import check_clean_load
from segfleet.config import TrackingConfig
from segfleet.evaluation import evaluate_model
from segfleet.gate import Limits
from segfleet.package import package_model
from segfleet.promotion import comparison_table, promote, roll_back
from segfleet.promotion_record import PromotionEntry, alone, append, history, history_table
from segfleet.protocol import ViewOptions
from segfleet.registry import aliases_of, register
from tests.stores import write_store

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)

HOW: dict[str, Any] = {"split": "val", "views": ViewOptions()}


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the load in a process of its own, which takes seconds and has a test of its own."""
    monkeypatch.setattr(promotion, "check_clean_load", lambda *_, **__: None)


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


def test_a_better_challenger_becomes_champion_and_the_history_says_why(
    local: TrackingConfig, store: Store, registered: str, no_process: None
) -> None:
    uri = local.tracking_uri
    refused = promote(uri, registered, store=store, **HOW, limits=Limits(min_gain=0.9), dry_run=False)
    assert (refused.promote, refused.is_executed) == (False, False)
    assert "the gain in mIoU is +0." in refused.reasons[0]
    assert aliases_of(uri, registered)["champion"] == 1
    assert tracking_server.client(uri).get_model_version(registered, "2").tags["promotion"] == "refused"

    sacrificed = promote(uri, registered, store=store, **HOW, limits=Limits(), dry_run=False)
    assert not sacrificed.promote  # it sees no car, which the champion does
    assert [reason.split(" loses ")[0] for reason in sacrificed.reasons] == ["car"]

    limits = Limits(class_floors={"car": 1.0})
    tried = promote(uri, registered, store=store, **HOW, limits=limits, dry_run=True)
    assert (tried.promote, tried.is_executed) == (True, False)
    assert aliases_of(uri, registered)["champion"] == 1

    done = promote(uri, registered, store=store, **HOW, limits=limits, dry_run=False, why="more road")
    assert (done.promote, done.is_executed) == (True, True)
    assert aliases_of(uri, registered) == {"champion": 2, "challenger": 2}
    # road is three quarters of the pixels or a little more; car and road are the classes that occur
    assert done.challenger.class_iou["car"] == 0.0
    assert done.champion is not None
    assert done.champion.class_iou["road"] == 0.0
    assert done.challenger.miou == pytest.approx(done.challenger.pixel_accuracy / 2)
    tags = tracking_server.client(uri).get_model_version(registered, "2").tags
    assert tags["promotion"] == "promoted"
    assert done.reasons[0] in tags["promotion_reason"]
    assert (
        "version 2"
        in tracking_server.client(uri).get_model_version(registered, "1").tags["promotion_of_other"]
    )
    assert "road" in comparison_table(done)

    entries = history(uri, registered)
    assert [entry.decision for entry in entries] == ["refused", "refused", "promoted"]
    assert (entries[-1].champion_before, entries[-1].champion_after, entries[-1].why) == (1, 2, "more road")
    assert entries[-1].numbers["gain"] == pytest.approx(done.challenger.miou - done.champion.miou, abs=1e-6)
    assert "split val" in entries[-1].protocol
    assert "more road" in history_table(entries)

    again = promote(uri, registered, store=store, **HOW, limits=limits, dry_run=False)
    assert "already" in again.reasons[0]
    assert len(history(uri, registered)) == 3

    back = roll_back(uri, registered, dry_run=False)
    assert (back.champion_before, back.champion_after) == (2, 1)
    assert aliases_of(uri, registered)["champion"] == 1
    with pytest.raises(InputError, match="has none before version 1"):
        roll_back(uri, registered, dry_run=False)


def test_images_without_a_valid_pixel_change_no_decision(
    local: TrackingConfig, store: Store, registered: str, tmp_path: Path, no_process: None
) -> None:
    split = store.split("val")
    seen = [(split.name(index), split.image(index), split.label(index)) for index in range(3)]
    blank = [
        (f"blank_{number}", image, np.full(image.shape[:2], 255, np.uint8))
        for number, (_, image, _) in enumerate(2 * seen)
    ]
    limits = Limits(class_floors={"car": 1.0})
    reports = []
    for name, pictures in (("without", seen), ("with", [*blank, *seen])):
        other = write_store(tmp_path / name, store.class_table, {"val": pictures})
        reports.append(
            promote(local.tracking_uri, registered, store=other, **HOW, limits=limits, dry_run=name != "with")
        )
    without, ours = reports
    assert (without.promote, ours.promote) == (True, True)
    assert without.reasons == ours.reasons
    numbers = [dict(report.numbers, latency_ratio=0) for report in reports]
    assert numbers[0] == numbers[1]
    assert numbers[0]["num_images"] == 3
    (entry,) = history(local.tracking_uri, registered)
    assert entry.numbers["lower_gain"] == ours.numbers["lower_gain"] > 0


def test_a_decision_that_json_cannot_hold_is_not_kept(local: TrackingConfig, registered: str) -> None:
    entry = PromotionEntry(
        decision="refused",
        version=2,
        champion_before=1,
        champion_after=1,
        reasons=[""],
        numbers={"gain": math.nan},
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(local.tracking_uri, registered, entry)
    assert history(local.tracking_uri, registered) == []


def test_a_promotion_that_was_cut_off_before_its_history_is_completed(
    local: TrackingConfig, store: Store, registered: str, monkeypatch: pytest.MonkeyPatch, no_process: None
) -> None:
    limits = Limits(class_floors={"car": 1.0})

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("segfleet.promotion_record.append", cut_off)
        with pytest.raises(KeyboardInterrupt):
            promote(local.tracking_uri, registered, store=store, **HOW, limits=limits, dry_run=False)
    assert aliases_of(local.tracking_uri, registered)["champion"] == 2
    assert history(local.tracking_uri, registered) == []
    promote(local.tracking_uri, registered, store=store, **HOW, limits=limits, dry_run=False)
    (entry,) = history(local.tracking_uri, registered)
    assert (entry.decision, entry.version, entry.why) == ("promoted", 2, "completed after an interruption")


def test_of_many_who_decide_at_once_one_does_at_a_time(local: TrackingConfig, registered: str) -> None:
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def decide() -> None:
        nonlocal inside, most, refused
        try:
            with alone(local.tracking_uri, registered):
                with guard:
                    inside += 1
                    most = max(most, inside)
                with guard:
                    inside -= 1
        except InputError:
            with guard:
                refused += 1

    threads = [threading.Thread(target=decide) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 8
    with alone(local.tracking_uri, registered), pytest.raises(InputError, match="has been at it since"):  # noqa: SIM117
        with alone(local.tracking_uri, registered):
            pass
    with alone(local.tracking_uri, registered):
        pass


@pytest.mark.slow
def test_a_challenger_must_predict_the_same_in_a_process_of_its_own(
    local: TrackingConfig, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = registry.fetch(f"models:/{registered}/2", tracking_uri=local.tracking_uri)
    check_clean_load(model, tracking_uri=local.tracking_uri)
    monkeypatch.setattr("segfleet.clean_load.fingerprints", lambda _: ["something else"])
    with pytest.raises(InputError, match=r"predict the same in every process, but models:/.*/2 does not at"):
        check_clean_load(model, tracking_uri=local.tracking_uri)
    with pytest.raises(InputError, match=r"must load in a process of its own, but models:/none/1 did not"):
        check_clean_load(dataclasses.replace(model, source="models:/none/1"), tracking_uri=local.tracking_uri)


def test_what_a_killed_process_held_is_taken_over(local: TrackingConfig, registered: str) -> None:
    code = (
        "import os, sys\n"
        "from segfleet.promotion_record import alone\n"
        "with alone(sys.argv[1], sys.argv[2]):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(
        [sys.executable, "-c", code, local.tracking_uri, registered], env=environment, check=False
    )
    assert killed.returncode == -9
    held = tracking_server.client(local.tracking_uri).get_registered_model(f"{registered}.promoting")
    assert held.name == f"{registered}.promoting"
    with alone(local.tracking_uri, registered):
        pass


def test_an_alias_that_somebody_moved_meanwhile_stops_the_promotion(
    local: TrackingConfig, store: Store, registered: str, monkeypatch: pytest.MonkeyPatch, no_process: None
) -> None:

    def evaluate_slowly(*arguments: object) -> object:
        tracking_server.client(local.tracking_uri).set_registered_model_alias(registered, "champion", "2")
        return evaluate_model(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(promotion, "evaluate_model", evaluate_slowly)
    with pytest.raises(InputError, match="somebody moved one"):
        promote(local.tracking_uri, registered, store=store, **HOW, limits=Limits(), dry_run=False)


def test_a_model_without_challenger_is_refused(local: TrackingConfig, store: Store, registered: str) -> None:
    tracking_server.client(local.tracking_uri).delete_registered_model_alias(registered, registry.CHALLENGER)
    with pytest.raises(InputError, match="no version or alias 'challenger'"):
        promote(local.tracking_uri, registered, store=store, **HOW, limits=Limits(), dry_run=False)
