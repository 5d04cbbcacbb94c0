"""Laws of the tracking on a database of its own; test_tracking_server.py has those that need a server."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pspnet.errors import InputError
from segfleet import provenance, tracking, tracking_server
from segfleet.config import TrackingConfig
from segfleet.run_writer import RunWriter, end_run, metric_name, ship_spool
from segfleet.secret import masked
from segfleet.spool import unsent_runs

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> TrackingConfig:
    folder = tmp_path_factory.mktemp("tracking")
    shutil.copy(empty_database, folder)
    return TrackingConfig(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", storage_dir=str(folder))


@pytest.fixture
def run_id(config: TrackingConfig, request: pytest.FixtureRequest) -> str:
    return open_run(config, key=request.node.name)


def open_run(config: TrackingConfig, *, key: str, **params: object) -> str:
    return tracking.open_run(
        config, run_name="a name", key=key, parent_run_id=None, tags={"segfleet.kind": "trial"}, params=params
    )


def values(config: TrackingConfig, run_id: str) -> dict[str, list[tuple[int, float]]]:
    found = tracking.points(config.tracking_uri, run_id)
    return {name: [(point.step, point.value) for point in curve] for name, curve in found.items()}


def test_a_key_has_one_run_for_ever(config: TrackingConfig) -> None:
    first = open_run(config, key="one key", base_lr=0.1)
    end_run(config.tracking_uri, first, status="FINISHED", tags={})
    again = open_run(config, key="one key", base_lr=0.1)
    assert again == first
    assert tracking_server.client(config.tracking_uri).get_run(first).info.status == "RUNNING"
    assert open_run(config, key="another key") != first


def test_of_twins_the_oldest_stays(config: TrackingConfig) -> None:
    """urllib sends a create_run again when its answer is lost."""
    first = open_run(config, key="twins")
    client = tracking_server.client(config.tracking_uri)
    experiment_id = client.get_run(first).info.experiment_id
    twin = client.create_run(experiment_id, tags={tracking.KEY_TAG: "twins"}).info.run_id
    assert open_run(config, key="twins") == first
    assert client.get_run(twin).info.lifecycle_stage == "deleted"


def test_a_changed_parameter_becomes_a_tag_and_a_new_one_is_added(config: TrackingConfig) -> None:
    run_id = open_run(config, key="params", num_trials=6)
    assert open_run(config, key="params", num_trials=8, study="x") == run_id
    data = tracking_server.client(config.tracking_uri).get_run(run_id).data
    assert data.params == {"num_trials": "6", "study": "x"}
    assert data.tags["segfleet.changed.num_trials"] == "8"


def test_an_ended_run_is_named_by_its_outcome_until_it_goes_on_and_the_users_name_stays(
    config: TrackingConfig,
) -> None:
    named = open_run(config, key="named")
    client = tracking_server.client(config.tracking_uri)
    tags = tracking.outcome_name("a name", "0.5000 complete")
    assert end_run(config.tracking_uri, named, status="FINISHED", tags=tags)
    assert client.get_run(named).info.run_name == "a name: 0.5000 complete"
    open_run(config, key="named")
    assert client.get_run(named).info.run_name == "a name"
    client.set_tag(named, "mlflow.runName", "my best one")
    open_run(config, key="named")
    assert client.get_run(named).info.run_name == "my best one"


def test_a_run_says_which_code_and_versions_it_is_of(
    config: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGFLEET_COMMIT", "0123abcd-dirty")
    run_id = open_run(config, key="origin")
    client = tracking_server.client(config.tracking_uri)
    tags = client.get_run(run_id).data.tags
    assert (tags["segfleet.commit"], tags["segfleet.dirty"]) == ("0123abcd", "true")
    assert tags["version.torch"].startswith("2.")
    assert "environment.txt" in [item.path for item in client.list_artifacts(run_id)]
    assert "commit==0123abcd-dirty\n" in provenance.environment_text()
    monkeypatch.setattr(provenance, "commit", lambda: ("", False))  # continued from where nobody knows it
    assert open_run(config, key="origin") == run_id
    tags = client.get_run(run_id).data.tags
    assert (tags["segfleet.commit"], tags["segfleet.dirty"]) == ("0123abcd", "true")


def test_the_data_set_of_a_run_is_its_store_digest(config: TrackingConfig, run_id: str) -> None:
    digest = "d" * 64
    tracking.log_dataset(
        config.tracking_uri, run_id, name="demo", digest=digest, source="stores/demo", splits={"train": 3}
    )
    inputs = tracking_server.client(config.tracking_uri).get_run(run_id).inputs
    assert inputs is not None
    [used] = inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("demo", digest[:36])
    assert json.loads(used.dataset.profile or "") == {"digest": digest, "splits": {"train": 3}}


def test_points_texts_and_files_arrive(config: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    picture = tmp_path / "panel.png"
    picture.write_bytes(b"first")
    writer = RunWriter(config.tracking_uri, run_id, tmp_path / "spool")
    writer.log_metrics({"loss": 1.5, "class_iou/traffic light": 0.25}, step=1)
    writer.log_metrics({"loss": 1.25}, step=2)
    writer.log_artifact(picture, "pictures")
    picture.write_bytes(b"written over before it was sent")
    writer.log_text("a note", "notes/one.txt")
    assert writer.flush(30)
    writer.close()
    assert values(config, run_id) == {
        "loss": [(1, 1.5), (2, 1.25)],
        "class_iou/traffic light": [(1, 0.25)],
    }
    client = tracking_server.client(config.tracking_uri)
    sent = Path(client.download_artifacts(run_id, "pictures/panel.png", str(tmp_path)))
    assert sent.read_bytes() == b"first"
    assert Path(client.download_artifacts(run_id, "notes/one.txt", str(tmp_path))).read_text() == "a note"
    assert list((tmp_path / "spool/files").iterdir()) == []


def test_a_file_that_another_sender_has_just_sent_is_no_failure(
    config: TrackingConfig,
    run_id: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A worker's thread and the search that ends its run send the same spool at once."""
    send = MlflowClient.log_artifact

    def sent_by_both(client: MlflowClient, run_id: str, path: str, folder: str | None = None) -> None:
        send(client, run_id, path, folder)
        shutil.rmtree(Path(path).parent)  # the other one is done with it
        send(client, run_id, path, folder)

    (tmp_path / "panel.png").write_bytes(b"a picture")
    writer = RunWriter(config.tracking_uri, run_id, tmp_path / "spool")
    monkeypatch.setattr(MlflowClient, "log_artifact", sent_by_both)
    writer.log_artifact(tmp_path / "panel.png", "pictures")
    assert writer.flush(5)
    writer.close()
    assert "tracking: waiting" not in capsys.readouterr().out
    assert [
        item.path for item in tracking_server.client(config.tracking_uri).list_artifacts(run_id, "pictures")
    ] == ["pictures/panel.png"]


def test_values_that_are_not_finite_are_left_out(config: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    writer = RunWriter(config.tracking_uri, run_id, tmp_path)
    writer.log_metrics({"loss": float("nan"), "lr": 0.1, "grad": float("inf")}, step=1)
    assert writer.flush(30)
    writer.close()
    assert values(config, run_id) == {"lr": [(1, 0.1)]}


def test_a_resumed_training_writes_each_point_once(
    config: TrackingConfig, run_id: str, tmp_path: Path
) -> None:
    """It trains epoch 2 again: the first value stays, and nothing is doubled."""
    first = RunWriter(config.tracking_uri, run_id, tmp_path)
    first.log_metrics({"loss": 3.0}, step=1)
    first.log_metrics({"loss": 2.0}, step=2)
    assert first.flush(30)
    first.close()
    second = RunWriter(config.tracking_uri, run_id, tmp_path)
    second.log_metrics({"loss": 2.5}, step=2)
    second.log_metrics({"loss": 1.0}, step=3)
    assert second.flush(30)
    second.close()
    assert values(config, run_id) == {"loss": [(1, 3.0), (2, 2.0), (3, 1.0)]}


def test_what_was_sent_but_not_noted_is_not_doubled(
    config: TrackingConfig, run_id: str, tmp_path: Path
) -> None:
    """A writer that dies between the server's answer and its own note sends the same points again."""
    writer = RunWriter(config.tracking_uri, run_id, tmp_path)
    writer.log_metrics({"loss": 1.0}, step=1)
    assert writer.flush(30)
    writer.close()
    (tmp_path / f"{run_id}.points.sent").unlink()
    assert unsent_runs(tmp_path) == {run_id: tmp_path}
    assert ship_spool(config.tracking_uri, run_id, tmp_path)
    assert values(config, run_id) == {"loss": [(1, 1.0)]}
    assert unsent_runs(tmp_path) == {}


def test_the_torn_line_of_a_dead_writer_costs_no_other_line(
    config: TrackingConfig, run_id: str, tmp_path: Path
) -> None:
    spool = tmp_path / f"{run_id}.points.jsonl"
    whole = json.dumps({"step": 1, "timestamp": 1, "values": {"loss": 1.0}})
    spool.write_text(whole + '\n{"step": 2, "timest')
    writer = RunWriter(config.tracking_uri, run_id, tmp_path)
    writer.log_metrics({"loss": 0.5}, step=3)
    assert writer.flush(30)
    writer.close()
    assert values(config, run_id) == {"loss": [(1, 1.0), (3, 0.5)]}


def test_more_points_than_a_request_may_hold_all_arrive(
    config: TrackingConfig, run_id: str, tmp_path: Path
) -> None:
    writer = RunWriter(config.tracking_uri, run_id, tmp_path)
    for step in range(7):
        writer.log_metrics({f"metric/{index}": index + step for index in range(300)}, step=step)
    assert writer.flush(60)
    writer.close()
    found = values(config, run_id)
    assert len(found) == 300
    assert found["metric/299"] == [(step, 299.0 + step) for step in range(7)]


def test_an_absent_server_costs_no_time_and_no_point(
    config: TrackingConfig, run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    writer = RunWriter(dead_uri(), run_id, tmp_path)
    for step in range(20):
        writer.log_metrics({"loss": 1 / (step + 1)}, step=step)
    assert time.monotonic() - started < 2
    writer.close(timeout_s=0.5)
    assert "jobs/sync_tracking.py" in capsys.readouterr().out
    assert not end_run(dead_uri(), run_id, status="FAILED", tags={"why": "x"}, spool_dir=tmp_path)
    assert unsent_runs(tmp_path) == {run_id: tmp_path}
    assert ship_spool(config.tracking_uri, run_id, tmp_path)
    assert values(config, run_id) == {"loss": [(step, 1 / (step + 1)) for step in range(20)]}
    run = tracking_server.client(config.tracking_uri).get_run(run_id)
    assert (run.info.status, run.data.tags["why"]) == ("FAILED", "x")


def test_a_spool_that_cannot_be_written_is_said_and_training_goes_on(
    config: TrackingConfig, run_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the folder should be")
    writer = RunWriter(config.tracking_uri, run_id, blocked)
    writer.log_metrics({"loss": 1.0}, step=1)
    assert "cannot be written" in capsys.readouterr().out
    blocked.unlink()
    writer.log_metrics({"loss": 0.5}, step=2)
    assert writer.flush(30)
    writer.close()
    assert values(config, run_id) == {"loss": [(1, 1.0), (2, 0.5)]}


def test_a_server_that_does_not_answer_is_one_plain_error_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=r"must answer.*Connection refused.*Start it"):
        tracking_server.check_server(dead_uri())
    assert time.monotonic() - started < 5


def test_a_server_that_hangs_is_a_plain_error_within_ten_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        started = time.monotonic()
        with pytest.raises(InputError, match="must answer"):
            tracking_server.check_server(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("uri", ["file:///tmp/x", "mlruns", "sqlite://", "ftp://host/x"])
def test_an_address_that_is_no_server_and_no_database_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="tracking_uri must"):
        tracking_server.resolve_uri(TrackingConfig(tracking_uri=uri))


def test_the_address_is_the_setting_then_the_environment_then_the_storage_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_server.resolve_uri(TrackingConfig(tracking_uri="http://h:1")) == "http://h:1"
    assert tracking_server.resolve_uri(TrackingConfig()) == "http://127.0.0.1:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    uri = tracking_server.resolve_uri(TrackingConfig(storage_dir=str(tmp_path)))
    assert uri == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_password_is_not_shown() -> None:
    assert masked("https://ann:secret@host/x") == "https://ann:***@host/x"


def test_names_that_mlflow_refuses_are_made_fit() -> None:
    assert metric_name("class_iou/car (parked)") == "class_iou/car _parked_"
    assert metric_name("class_iou/traffic light") == "class_iou/traffic light"


def dead_uri() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_server_that_is_away_is_asked_again_and_what_is_refused_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking_server, "RETRY_S", (0.01, 0.02))
    errors: list[Exception] = [tracking_server.AwayError("away")] * 3

    def call() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert tracking_server.patiently(call) == "done"
    assert capsys.readouterr().out.count("away") == 1
    errors.append(InputError("refused"))
    with pytest.raises(InputError, match="refused"):
        tracking_server.patiently(call)
    errors += [tracking_server.AwayError("away")] * 99
    with pytest.raises(tracking_server.AwayError):
        tracking_server.patiently(call, limit_s=0.1)
    assert 0 < len(errors) < 99
