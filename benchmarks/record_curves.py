"""Record the training curves that search_efficiency.py replays: a small PSPNet on drawn street scenes, 64 times.

Each point of a grid of learning rates, auxiliary-loss weights and crop sizes is trained to its end by the platform's
own training loop, in one process, and scored after every epoch. What is there already is not trained again.

    python benchmarks/record_curves.py --curves benchmarks/curves.json --processes 2
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
from segfleet.config import TrainingConfig, differences, override, to_json
from segfleet.ingest import ingest
from segfleet.presets import tiny
from segfleet.sources.cityscapes import cityscapes_source
from segfleet.sources.demo import draw_demo
from segfleet.worker import Place, Task, train

BASE_LRS = [1e-3 * 2000 ** (step / 7) for step in range(8)]
AUX_LOSS_WEIGHTS = [0.1, 0.7]
CROP_SIZES = [49, 65, 81, 97]
NUM_TRAIN, NUM_VAL, SIZE = 48, 16, (192, 96)


def base_config(store: str) -> TrainingConfig:
    """Return what all trainings have in common."""
    return override(
        tiny(),
        {
            "data.store": store,
            "data.max_scale": 1.5,
            "model.output_stride": 16,
            "model.head_channels": 64,
            "optim.head_lr_factor": 1.0,
            "schedule.num_epochs": 27,
            "schedule.global_batch_size": 8,
            "schedule.max_iterations_per_epoch": 0,
            "workers.num_workers": 1,
        },
    )


def main() -> None:
    """Train what is missing and keep it after each training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, default=Path(__file__).with_name("curves.json"))
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curves-") as folder:
        store = _store(Path(folder))
        config = base_config(str(store))
        told = {
            "about": f"PSPNet on {NUM_TRAIN} drawn street scenes of {SIZE[0]}x{SIZE[1]}, scored on {NUM_VAL} others",
            "changes": {
                path: value
                for path, value in differences(TrainingConfig(), config).items()
                if path != "data.store"
            },
            "versions": versions(),
            "pixels_per_epoch": {str(side): side**2 * NUM_TRAIN for side in CROP_SIZES},
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


def _store(folder: Path) -> Path:
    logging.disable()
    draw_demo(folder / "scenes", num_train=NUM_TRAIN, num_val=NUM_VAL, size=SIZE)
    ingest(cityscapes_source(str(folder / "scenes")), folder / "store", selection_fraction=0.0)
    return folder / "store"


def _key(point: dict[str, Any]) -> str:
    return f"crop{point['crop_size']:03d}_lr{point['base_lr']:.5f}_aux{point['aux_loss_weight']:.2f}"


def _curve(config: TrainingConfig, point: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Train one point and return its mIoU after each epoch; fewer of them where it diverged."""
    torch.set_num_threads(1)
    changes = {
        "optim.base_lr": point["base_lr"],
        "optim.aux_loss_weight": point["aux_loss_weight"],
        "data.crop_size": point["crop_size"],
    }
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
    mious = [round(report["miou"], 5) for report in reports]
    return point | {"reason": reason, "miou": mious, "seconds": round(time.perf_counter() - begun, 1)}


def _write(path: Path, values: dict[str, Any]) -> None:
    aside = path.with_suffix(".aside")
    curves = ",\n".join(json.dumps(curve) for curve in values["curves"])
    head = json.dumps({name: value for name, value in values.items() if name != "curves"}, indent=1)
    aside.write_text(f'{head[:-2]},\n "curves": [\n{curves}\n ]\n}}\n')
    os.replace(aside, path)


if __name__ == "__main__":
    main()
