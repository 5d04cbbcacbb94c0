"""Laws of files that were cut short: set aside, named, and gone on without."""

from pathlib import Path

import pytest

from segfleet import tracking, trainer
from segfleet.config import TrackingConfig
from segfleet.outcome import Outcome, read_outcome, record_outcome
from segfleet.run_writer import RunWriter


def test_a_cut_outcome_is_none_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_outcome(tmp_path, Outcome(attempt="1", reason="complete"))
    path = tmp_path / "outcome.json"
    torso = path.read_bytes()[:20]
    for number in (1, 2):
        path.write_bytes(torso)
        assert read_outcome(tmp_path, "1") is None
        assert path.with_name(f"outcome.json.damaged-{number}").read_bytes() == torso
        assert f"set aside as outcome.json.damaged-{number}" in capsys.readouterr().out
    record_outcome(tmp_path, Outcome(attempt="1", reason="complete"))
    assert read_outcome(tmp_path, "1") == Outcome(attempt="1", reason="complete")


def test_a_cut_key_of_a_run_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "name"
    key = trainer._run_key(folder)
    assert trainer._run_key(folder) == key
    assert key.startswith("training/name/")
    (folder / "run_key").write_text(key[:-1])
    assert trainer._run_key(folder) not in (key, key[:-1])
    assert "run_key.damaged-1" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's with SQLAlchemy 2.1
@pytest.mark.parametrize("cut", ["points", "sent"])
def test_a_cut_spool_costs_no_later_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: str
) -> None:
    config = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", storage_dir=str(tmp_path))
    run_id = tracking.open_run(config, run_name="r", key="r", parent_run_id=None, tags={}, params={})
    uri, spool = config.tracking_uri, tmp_path / "spool"

    def log(step: int) -> None:
        writer = RunWriter(uri, run_id, spool)
        writer.log_metrics({"loss": 1.0 + step}, step=step)
        assert writer.flush(60)
        writer.close()

    for step in range(3):
        log(step)
    capsys.readouterr()
    path = next(spool.glob("*.points.jsonl" if cut == "points" else "*.points.sent"))
    path.write_bytes(path.read_bytes()[:-5] if cut == "points" else b"")
    log(2)  # as a training that is resumed, which the server knew already
    log(3)
    found = [(point.step, point.value) for point in tracking.points(uri, run_id)["loss"]]
    assert found == [(step, 1.0 + step) for step in range(4)]
    said = capsys.readouterr().out
    assert path.name in said
