"""Rows D6, D7, D8: whoever dies or collides in the registry, one model is champion, whole and recorded."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pspnet.errors import InputError
from segfleet import promotion, registry, tracking_server
from segfleet.config import TrackingConfig
from segfleet.gate import Limits
from segfleet.package import package_model
from segfleet.promotion import promote, roll_back
from segfleet.promotion_record import PromotionEntry, alone, history, record
from segfleet.protocol import ViewOptions
from segfleet.registry import aliases_of, fetch, register
from tests.faults.processes import run

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
    ),
    pytest.mark.slow,
]

Recorded = Callable[[str, object], None]


@pytest.fixture(scope="module")
def packages(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One that sees cars everywhere, and one that sees road, of which there is more."""
    folder = tmp_path_factory.mktemp("packages")
    return [
        package_model(write_checkpoint(folder / f"epoch_000{favourite}", favourite=favourite), folder / name)
        for favourite, name in ((1, "car"), (0, "road"))
    ]


def num_models(uri: str, name: str) -> int:
    client = tracking_server.client(uri)
    return len(client.search_model_versions(f"name='{name}'"))


@pytest.mark.fault("D7", "SIGKILL while a version is registered")
@pytest.mark.parametrize("point", ["uploaded", "named", "version", "challenger"])
def test_the_same_command_completes_a_registration(
    local: TrackingConfig, packages: list[Path], record_property: Recorded, point: str
) -> None:
    uri, name = local.tracking_uri, f"register-{point}"
    register(uri, name, packages[0])
    assert run(register, uri, name, packages[1], fault=f"registry.{point}:kill") == -9
    aliases = aliases_of(uri, name)
    assert aliases["champion"] == 1
    for alias in aliases:
        fetch(f"models:/{name}@{alias}", tracking_uri=uri)
    started = time.monotonic()
    assert register(uri, name, packages[1]) == 2
    record_property("recovery_s", time.monotonic() - started)
    assert aliases_of(uri, name) == {"champion": 1, "challenger": 2}
    assert num_models(uri, name) == 2
    assert register(uri, name, packages[0]) == 1
    assert aliases_of(uri, name)["challenger"] == 2, "what is registered already does not challenge again"


@pytest.mark.fault("D7", "SIGKILL while a promotion is recorded")
@pytest.mark.parametrize("point", ["held", "tagged", "moved", "recorded"])
def test_the_same_command_completes_a_promotion(
    local: TrackingConfig,
    packages: list[Path],
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Recorded,
    point: str,
) -> None:
    uri, name = local.tracking_uri, f"promote-{point}"
    for package in packages:
        register(uri, name, package)
    # The command's own end, in a process that dies there; what it decided beforehand is the same each time.
    assert run(_decide, uri, name, fault=f"promotion.{point}:kill") == -9
    fetch(f"models:/{name}@champion", tracking_uri=uri)
    monkeypatch.setattr(promotion, "check_clean_load", lambda *_, **__: None)
    started = time.monotonic()
    limits = Limits(class_floors={"car": 1.0})
    promote(uri, name, store=store, split="val", views=ViewOptions(), limits=limits, dry_run=False)
    record_property("recovery_s", time.monotonic() - started)
    assert aliases_of(uri, name) == {"champion": 2, "challenger": 2}
    assert [(entry.decision, entry.champion_after) for entry in history(uri, name)] == [("promoted", 2)]


@pytest.mark.fault("D7", "SIGKILL while a promotion is taken back")
@pytest.mark.parametrize("point", ["held", "tagged", "moved"])
def test_the_same_command_completes_the_way_back(
    local: TrackingConfig,
    packages: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Recorded,
    point: str,
) -> None:
    uri, name = local.tracking_uri, f"back-{point}"
    for package in packages:
        register(uri, name, package)
    _decide(uri, name)
    monkeypatch.setattr(promotion, "check_clean_load", lambda *_, **__: None)
    assert run(_take_back, uri, name, fault=f"promotion.{point}:kill") == -9
    started = time.monotonic()
    assert roll_back(uri, name, dry_run=False).champion_after == 1
    record_property("recovery_s", time.monotonic() - started)
    assert aliases_of(uri, name)["champion"] == 1
    assert [entry.decision for entry in history(uri, name)] == ["promoted", "rolled back"]


@pytest.mark.fault("D6", "two promotions at once")
@pytest.mark.parametrize(
    "num_rounds", [5, pytest.param(50, marks=pytest.mark.faults_long, id="fifty rounds")]
)
def test_of_two_promotions_at_once_exactly_one_wins(
    local: TrackingConfig, packages: list[Path], num_rounds: int
) -> None:
    uri, name = local.tracking_uri, f"both-{num_rounds}"
    for package in packages:
        register(uri, name, package)
    context = multiprocessing.get_context("forkserver")
    for number in range(num_rounds):
        before, outcomes = len(history(uri, name)), context.SimpleQueue()
        start = context.Barrier(2)
        target = 2 - number % 2
        rivals = [context.Process(target=_compete, args=(uri, name, target, start, outcomes)) for _ in "ab"]
        for rival in rivals:
            rival.start()
        for rival in rivals:
            rival.join()
        assert sorted(outcomes.get() for _ in rivals) == ["refused", "won"]
        assert len(history(uri, name)) == before + 1
        assert aliases_of(uri, name)["champion"] == target


@pytest.mark.fault("D8", "an artifact of a registered version altered")
@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
def test_an_altered_artifact_is_not_loaded(local: TrackingConfig, packages: list[Path], file: str) -> None:
    uri, name = local.tracking_uri, f"altered-{file.partition('.')[2]}"
    register(uri, name, packages[0])
    client = tracking_server.client(uri)
    model = client.get_logged_model(client.get_model_version(name, "1").tags[registry.MODEL_ID_TAG])
    (stored,) = Path(model.artifact_location.removeprefix("file://")).rglob(file)
    content = stored.read_bytes()
    assert content.count(b"0") > 0
    stored.write_bytes(content.replace(b"0", b"1", 1))
    with pytest.raises(InputError, match=r"differ|must be"):
        fetch(f"models:/{name}/1", tracking_uri=uri)
    stored.write_bytes(content)
    fetch(f"models:/{name}/1", tracking_uri=uri)


def _decide(uri: str, name: str) -> None:
    entry = PromotionEntry(
        decision="promoted", version=2, champion_before=1, champion_after=2, reasons=["better"]
    )
    with alone(uri, name):
        record(uri, name, entry)


def _take_back(uri: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotion, "check_clean_load", lambda *_, **__: None)
        roll_back(uri, name, dry_run=False)


def _compete(uri: str, name: str, target: int, start: Any, outcomes: Any) -> None:
    """As `promote` does it: what was seen before must still be so once the right to decide is held."""
    before = aliases_of(uri, name)
    entry = PromotionEntry(
        decision="promoted",
        version=target,
        champion_before=before["champion"],
        champion_after=target,
        reasons=["a round"],
    )
    start.wait()
    try:
        promotion.execute(uri, name, entry, before=before)
    except InputError:
        outcomes.put("refused")
    else:
        outcomes.put("won")
