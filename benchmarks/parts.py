"""What are the pyramid, the auxiliary loss and ImageNet's weights worth? The same training with and without each.

Each row is the preset camvid_mobilenetv2 with one part left out, trained by the platform's own job for as many epochs,
and scored at its end on whole validation images, one scale, no flip. It takes hours: what is trained is recorded in
parts.json and not trained again, and an interrupted training goes on. The last line of output is JSON.

    python benchmarks/parts.py --store stores/camvid --storage-dir runs/parts --write benchmarks/README.md
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from reporting import parser_of, versions, write_between

from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.presets import camvid_mobilenetv2
from segfleet.trainer import resolve, run_folder, run_name, run_training

ROWS: dict[str, dict[str, Any]] = {
    "**whole**": {},
    "without pyramid pooling": {"model.bin_sizes": ()},
    "without auxiliary loss": {"model.has_aux_head": False},
    "from random weights": {"model.backbone_weights": ""},
}
NUM_SEEDS = (3, 3, 1, 1)
"""How often each row is trained, in the order of the rows."""
RESULTS = Path(__file__).with_name("parts.json")


@dataclass(frozen=True)
class Trained:
    """A training that is done; minutes are those of all epochs, evaluation included."""

    row: str
    seed: int
    epochs: int
    miou: float
    minutes: float
    versions: str


def main() -> None:
    """Train what is missing, print the table, and end with one line of JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--store", required=True, help="CamVid, ingested by jobs/ingest_folder.py")
    parser.add_argument("--storage-dir", default="runs/parts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what is trained already")
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
    trained = _recorded(options.results)
    wanted = [
        (name, seed)
        for seed in range(max(options.seeds))
        for name, num_seeds in zip(ROWS, options.seeds, strict=True)
        if seed < num_seeds
    ]
    for name, seed in wanted:
        if (name, seed, options.epochs) not in {(one.row, one.seed, one.epochs) for one in trained}:
            trained.append(_train(name, override(base, {**ROWS[name], "schedule.seed": seed})))
            options.results.write_text(json.dumps([asdict(one) for one in trained], indent=1) + "\n")
    shown = [one for one in trained if (one.row, one.seed) in wanted and one.epochs == options.epochs]
    text = _table(shown)
    print(text)
    if options.write:
        write_between(options.write, "parts", text)
    mious = {name.strip("*"): [one.miou for one in shown if one.row == name] for name in ROWS}
    print(json.dumps({name: round(mean(values), 4) for name, values in mious.items() if values}))


def _recorded(path: Path) -> list[Trained]:
    return [Trained(**one) for one in json.loads(path.read_text())] if path.exists() else []


def _train(name: str, config: TrainingConfig) -> Trained:
    result, seed = run_training(config), config.schedule.seed
    if result.miou is None or result.reason != "complete":
        raise SystemExit(f"{name}, seed {seed}, ended: {result.reason} {result.message}")
    one = Trained(name, seed, config.schedule.num_epochs, result.miou, round(_minutes(config), 1), versions())
    print(f"{name}, seed {seed}: mIoU {one.miou:.4f} in {one.minutes:.1f} min", flush=True)
    return one


def _minutes(config: TrainingConfig) -> float:
    """Return the minutes of all epochs, evaluation included, as the log of the training has them."""
    config = resolve(config)  # as the training does; its name is made of absolute paths
    log = run_folder(config, run_name(config)) / "progress.log"
    ends = [
        line.split(" done in ")[1].split()[0] for line in log.read_text().splitlines() if " done in " in line
    ]
    return sum(map(float, ends)) / 60


def _table(trained: list[Trained]) -> str:
    lines = ["| training | seeds | mIoU, mean (range) | minutes |", "| --- | --- | --- | --- |"]
    for name in ROWS:
        if ours := [one for one in trained if one.row == name]:
            mious, minutes = [one.miou for one in ours], [one.minutes for one in ours]
            lines.append(f"| {name} | {len(ours)} | {_range(mious, '.3f')} | {_range(minutes, '.0f')} |")
    conditions = sorted({f"- {one.epochs} epochs, {one.versions}" for one in trained})
    return "\n".join([*lines, "", *conditions])


def _range(values: Sequence[float], form: str) -> str:
    text = format(mean(values), form)
    return f"{text} ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else text


if __name__ == "__main__":
    main()
