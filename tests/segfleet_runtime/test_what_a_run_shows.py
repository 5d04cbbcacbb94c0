"""Law: a training's MLflow run holds the curves, pictures and tables that people compare runs by."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from segfleet import tracking
from segfleet.config import TrainingConfig
from segfleet.config_json import to_json
from segfleet.override import override
from segfleet.place import Place
from segfleet.run_pictures import TABLE_TAG
from segfleet.worker import Task, train

pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SADeprecationWarning"  # MLflow 3.17 uses what SQLAlchemy 2.1 deprecates
)


def test_curves_system_metrics_panels_and_the_table_of_classes(
    config: TrainingConfig, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = override(config, {"schedule.evaluate_every_epochs": 2, "tracking.tracking_uri": uri})
    run_id = tracking.open_run(
        config.tracking, run_name="r", key="k", parent_run_id=None, tags=TABLE_TAG, params={}
    )
    train(
        Task(
            config_json=to_json(config),
            run_dir=str(tmp_path / "r"),
            run_id=run_id,
            tracking_uri=uri,
            attempt="1",
        ),
        Place(),
        report=lambda metrics: None,
    )
    client = MlflowClient(tracking_uri=uri)
    keys = client.get_run(run_id).data.metrics
    trained = {"train/loss", "train/main_loss", "train/aux_loss", "lr", "images_per_s", "data_wait_s"}
    system = {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"}
    for key in trained | system:
        assert [point.step for point in client.get_metric_history(run_id, key)] == [1, 2, 3], key
    evaluated = {"val/miou", "class_iou/dark", "class_iou/grey", "class_iou/light"}
    for key in evaluated:
        assert [point.step for point in client.get_metric_history(run_id, key)] == [2, 3], key
    assert trained | system | evaluated <= set(keys)

    def fetched(path: str) -> Path:
        return Path(client.download_artifacts(run_id, path, str(tmp_path)))

    for picture in (
        "panels/epoch_0002.jpg",
        "panels/epoch_0003.jpg",
        "panel.png",
        "confusion_matrix.png",
    ):
        with Image.open(fetched(f"pictures/{picture}")) as opened:
            assert opened.width > 100
    table = json.loads(fetched("class_iou.json").read_text())
    assert table["columns"] == ["class", "IoU"]
    values = dict(table["data"])
    assert values["dark"] == keys["class_iou/dark"]
    assert values["never seen"] is None
    assert {entry["path"] for entry in json.loads(TABLE_TAG["mlflow.loggedArtifacts"])} == {"class_iou.json"}
