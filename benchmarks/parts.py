"""What are the pyramid, the auxiliary loss and ImageNet's weights worth? The same training with and without each.

Each row is the preset camvid_mobilenetv2 with one part left out, trained by the platform's own job for as many epochs,
and scored at its end on whole validation images, one scale, no flip. Trainings that are there already are not
repeated, and interrupted ones go on. The last line of output is JSON.

    python benchmarks/parts.py --store stores/camvid --storage-dir runs/parts --write benchmarks/README.md
"""

import json
from collections.abc import Sequence
from statistics import mean
from typing import Any

from reporting import parser_of, versions, write_between

from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.presets import camvid_mobilenetv2
from segfleet.trainer import run_folder, run_name, run_training

ROWS: dict[str, dict[str, Any]] = {
    "**whole**": {},
    "without pyramid pooling": {"model.bin_sizes": ()},
    "without auxiliary loss": {"model.has_aux_head": False},
    "from random weights": {"model.backbone_weights": ""},
}
NUM_SEEDS = (3, 3, 1, 1)
"""How often each row is trained, in the order of the rows."""


def main() -> None:
    """Train what is missing, print the table, and end with one line of JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--store", required=True, help="CamVid, ingested by jobs/ingest_folder.py")
    parser.add_argument("--storage-dir", default="runs/parts")
    parser.add_argument("--backbone-weights", default="imagenet", help="or a file")
    parser.add_argument("--seeds", type=int, nargs=len(ROWS), default=NUM_SEEDS)
    parser.add_argument("--epochs", type=int, default=camvid_mobilenetv2().schedule.num_epochs)
    options = parser.parse_args()
    base = override(
        camvid_mobilenetv2(),
        {
            "data.store": options.store,
            "model.backbone_weights": options.backbone_weights,
            "schedule.num_epochs": options.epochs,
            "tracking.storage_dir": options.storage_dir,
        },
    )
    mious: dict[str, list[float]] = {name: [] for name in ROWS}
    minutes: dict[str, list[float]] = {name: [] for name in ROWS}
    for seed in range(max(options.seeds)):
        for (name, changes), num_seeds in zip(ROWS.items(), options.seeds, strict=True):
            if seed >= num_seeds:
                continue
            config = override(base, {**changes, "schedule.seed": seed})
            result = run_training(config)
            if result.miou is None or result.reason != "complete":
                raise SystemExit(f"{name}, seed {seed}, ended: {result.reason} {result.message}")
            mious[name].append(result.miou)
            minutes[name].append(_minutes(config))
            print(f"{name}, seed {seed}: mIoU {result.miou:.4f} in {minutes[name][-1]:.1f} min", flush=True)
            text = _table(mious, minutes) + f"\n\n- {options.epochs} epochs, {versions()}"
            if options.write:
                write_between(options.write, "parts", text)
    print(text)
    print(json.dumps({name.strip("*"): round(mean(values), 4) for name, values in mious.items() if values}))


def _minutes(config: TrainingConfig) -> float:
    """Return the minutes of all epochs, evaluation included, as the log of the training has them."""
    log = run_folder(config, run_name(config)) / "progress.log"
    ends = [
        line.split(" done in ")[1].split()[0] for line in log.read_text().splitlines() if " done in " in line
    ]
    return sum(map(float, ends)) / 60


def _table(mious: dict[str, list[float]], minutes: dict[str, list[float]]) -> str:
    lines = ["| training | seeds | mIoU, mean (range) | minutes |", "| --- | --- | --- | --- |"]
    for name, values in mious.items():
        if values:
            lines.append(
                f"| {name} | {len(values)} | {_range(values, '.3f')} | {_range(minutes[name], '.0f')} |"
            )
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    text = format(mean(values), form)
    return f"{text} ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else text


if __name__ == "__main__":
    main()
