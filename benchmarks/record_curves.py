"""Record the training curves that search_efficiency.py replays: PSPNet with MobileNetV2 on CamVid, 64 times.

Each point of a grid of learning rates, auxiliary-loss weights and crop sizes is trained to its end by the platform's
own training loop, in one process, as a trial of a search is: on `fit`, scored on `selection`, for as many pixels
whatever the crop. What is there already is not trained again.

    python benchmarks/record_curves.py --store stores/camvid --processes 2
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from reporting import versions

from pspnet.training_stats import DivergedError
from segfleet.config import TrainingConfig
from segfleet.config_json import to_json
from segfleet.override import differences, override
from segfleet.place import Place
from segfleet.presets import camvid_mobilenetv2
from segfleet.pruning import epoch_weight, schedule_of
from segfleet.worker import Task, train

BASE_LRS = [1e-4 * 10 ** (step / 2) for step in range(8)]
AUX_LOSS_WEIGHTS = [0.1, 0.7]
CROP_SIZES = [97, 129, 161, 193]


def base_config(store: str, backbone_weights: str) -> TrainingConfig:
    """Return what all trainings have in common: 27 epochs of 12 iterations."""
    return override(
        camvid_mobilenetv2(),
        {
            "data.store": store,
            "data.train_split": "fit",
            "data.val_split": "selection",
            "data.crop_size": 129,
            "data.max_scale": 1.5,
            "model.backbone_weights": backbone_weights,
            "schedule.num_epochs": 27,
            "schedule.evaluate_every_epochs": 1,
            "schedule.max_iterations_per_epoch": 12,
            "workers.num_workers": 1,
        },
    )


def main() -> None:
    """Train what is missing and keep it after each training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="CamVid, ingested with a selection split")
    parser.add_argument("--backbone-weights", default="imagenet", help="or a file")
    parser.add_argument("--curves", type=Path, default=Path(__file__).with_name("curves.json"))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        config = base_config(options.store, options.backbone_weights)
        told = {
            "about": "PSPNet with MobileNetV2 on CamVid, 27 epochs of 12 batches of 8 crops of 129 or as many pixels",
            "training": {
                path: value
                for path, value in differences(TrainingConfig(), config).items()
                if path not in ("data.store", "model.backbone_weights")
            },
            "versions": versions(),
        }
        recorded = json.loads(options.curves.read_text())["curves"] if options.curves.exists() else []
        done = {_key(curve) for curve in recorded}
        points = [
            {"base_lr": base_lr, "aux_loss_weight": weight, "crop_size": crop_size}
            for crop_size, base_lr, weight in itertools.product(CROP_SIZES, BASE_LRS, AUX_LOSS_WEIGHTS)
        ]
        missing = [point for point in points if _key(point) not in done]
        with ProcessPoolExecutor(options.processes) as pool:
            futures = [pool.submit(_curve, config, point, f"{folder}/{_key(point)}") for point in missing]
            for future in as_completed(futures):
                recorded = sorted([*recorded, future.result()], key=_key)
                _write(options.curves, told | {"curves": recorded})
                newest = future.result()
                best = max((value for value in newest["miou"]), default=float("nan"))
                print(
                    f"{len(recorded)} of {len(points)}: {_key(newest)} mIoU {best:.4f} in {newest['seconds']:.0f} s",
                    flush=True,
                )


def _key(point: dict[str, Any]) -> str:
    return f"crop{point['crop_size']:03d}_lr{point['base_lr']:.5f}_aux{point['aux_loss_weight']:.2f}"


def _curve(config: TrainingConfig, point: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Train one point and return its mIoU after each evaluation; fewer of them where it diverged."""
    logging.disable()
    torch.set_num_threads(1)
    changes = {
        "optim.base_lr": point["base_lr"],
        "optim.aux_loss_weight": point["aux_loss_weight"],
        "data.crop_size": point["crop_size"],
    }
    weight = epoch_weight(config, changes)
    changes |= schedule_of(config, weight)
    reports: list[dict[str, Any]] = []
    task = Task(
        config_json=to_json(override(config, changes)),
        run_dir=run_dir,
        run_id="",
        tracking_uri="",
        attempt="1",
    )
    begun = time.perf_counter()
    reason = "complete"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            train(task, Place(), report=reports.append)
        except DivergedError:
            reason = "diverged"
    scored = [report for report in reports if "miou" in report]
    return point | {
        "reason": reason,
        "num_epochs": override(config, changes).schedule.num_epochs,
        "epochs": [report["epoch"] for report in scored],
        "miou": [round(report["miou"], 5) for report in scored],
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    aside = path.with_suffix(".aside")
    curves = ",\n".join(json.dumps(curve) for curve in values["curves"])
    head = json.dumps({name: value for name, value in values.items() if name != "curves"}, indent=1)
    aside.write_text(f'{head[:-2]},\n "curves": [\n{curves}\n ]\n}}\n')
    os.replace(aside, path)


if __name__ == "__main__":
    main()
