"""How much cheaper does a search reach what random search reaches? Replayed on recorded training curves.

Random search trains 16 points to their end; its best mIoU is the target and the pixels that it has seen are its cost.
Every other way proposes and prunes through the platform's own study, on the curve of the recorded point that is
nearest, four trials side by side, until a trial that was trained to its end has the target. The last line of output is
JSON.

    python benchmarks/search_efficiency.py --quick
    python benchmarks/search_efficiency.py --write benchmarks/README.md
"""

import argparse
import heapq
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from reporting import versions, write_between

from segfleet.config import SearchConfig, SpaceConfig, TrainingConfig, override
from segfleet.study import Study

NUM_RANDOM_TRIALS = 16
NUM_CONCURRENT = 4
MAX_TRIALS = 128
"""A way that has not reached the target after so many trials has not reached it: its ratio counts as 0."""
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Way:
    """How points are proposed and given up."""

    name: str
    sampler: str
    scheduler: str


RANDOM = Way("random, each trained to its end", "random", "none")
OURS = Way("**TPE and ASHA** (the default)", "tpe", "asha")
OTHERS = (
    Way("random and ASHA", "random", "asha"),
    Way("Gaussian process and ASHA", "gp", "asha"),
    Way("TPE and the median rule", "tpe", "median"),
    Way("TPE, each trained to its end", "tpe", "none"),
)


class Curves:
    """The recorded trainings."""

    def __init__(self, path: Path) -> None:
        values = json.loads(path.read_text())
        self.about: str = f"{values['about']}; recorded with {values['versions']}"
        self.curves: list[dict[str, Any]] = values["curves"]
        self.pixels_per_epoch = {int(side): pixels for side, pixels in values["pixels_per_epoch"].items()}
        self.num_epochs = max(len(curve["miou"]) for curve in self.curves)

    def nearest(self, changes: dict[str, Any]) -> dict[str, Any]:
        """Return the recorded curve of the same crop whose learning rate and auxiliary weight are nearest."""
        lr, weight = math.log(changes["optim.base_lr"]), changes["optim.aux_loss_weight"]
        spans = [self._span(name) for name in ("base_lr", "aux_loss_weight")]
        same_crop = [curve for curve in self.curves if curve["crop_size"] == changes["data.crop_size"]]

        def distance(curve: dict[str, Any]) -> float:
            by_lr = (math.log(curve["base_lr"]) - lr) / (math.log(spans[0][1]) - math.log(spans[0][0]))
            by_weight = (curve["aux_loss_weight"] - weight) / (spans[1][1] - spans[1][0])
            return by_lr**2 + by_weight**2

        return min(same_crop, key=distance)

    def space(self) -> SpaceConfig:
        """Return the part of the space that the recorded points span."""
        (min_lr, max_lr), (min_weight, max_weight) = self._span("base_lr"), self._span("aux_loss_weight")
        return SpaceConfig(
            min_base_lr=min_lr,
            max_base_lr=max_lr,
            min_aux_loss_weight=min_weight,
            max_aux_loss_weight=max_weight,
            crop_sizes=tuple(sorted({curve["crop_size"] for curve in self.curves})),
        )

    def _span(self, name: str) -> tuple[float, float]:
        values = [curve[name] for curve in self.curves]
        return min(values), max(values)


def main() -> None:
    """Replay, print the table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", type=Path, default=Path(__file__).with_name("curves.json"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="10 seeds, the default way only")
    parser.add_argument("--write", type=Path, help="file whose marked part is replaced")
    options = parser.parse_args()
    seeds = range(10 if options.quick else options.seeds)
    curves = Curves(options.curves)
    ways = (OURS,) if options.quick else (OURS, *OTHERS)
    random = [replay(curves, RANDOM, seed, num_trials=NUM_RANDOM_TRIALS) for seed in seeds]
    targets = [trace[-1][1] for trace in random]
    costs = {
        way.name: [
            first_at(replay(curves, way, seed, num_trials=MAX_TRIALS, target=target), target)
            for seed, target in zip(seeds, targets, strict=True)
        ]
        for way in ways
    }
    text = _table(random, targets, costs)
    text += f"\n\n- curves: {curves.about}\n- {len(seeds)} seeds, {versions()}"
    print(text)
    if options.write:
        write_between(options.write, "search_efficiency", text)
    ratios = [trace[-1][0] / cost for trace, cost in zip(random, costs[OURS.name], strict=True)]
    print(json.dumps({"cost_ratio_vs_random": round(median(ratios), 2), "seeds": len(seeds)}))


def replay(
    curves: Curves, way: Way, seed: int, *, num_trials: int, target: float = math.inf
) -> list[tuple[float, float]]:
    """Return (pixels seen by all trials, best mIoU of those trained to their end) after each such trial."""
    with tempfile.TemporaryDirectory(prefix="efficiency-") as folder:
        study = Study(_search(curves, way, seed, folder), store_digest="curves")
        waiting: list[tuple[float, int, int, dict[str, Any]]] = []  # when, trial, epoch, curve
        num_asked, cost, best = 0, 0.0, -math.inf
        trace: list[tuple[float, float]] = []
        now = 0.0
        while best < target:
            while len(waiting) < NUM_CONCURRENT and num_asked < num_trials:
                proposal = study.ask()
                curve = curves.nearest(proposal.changes)
                step = curves.pixels_per_epoch[curve["crop_size"]]
                heapq.heappush(waiting, (now + step, proposal.number, 1, curve))
                num_asked += 1
            if not waiting:
                break
            now, number, epoch, curve = heapq.heappop(waiting)
            step = curves.pixels_per_epoch[curve["crop_size"]]
            cost += step
            if epoch > len(curve["miou"]):
                study.finish(number, "diverged", "as recorded")
                continue
            decision = study.report(number, epoch=epoch, miou=curve["miou"][epoch - 1])
            if epoch == curves.num_epochs:
                study.finish(number, "complete", f"{epoch} epochs")
                best = max(best, *curve["miou"])
                trace.append((cost, best))
            elif decision.stop:
                study.finish(number, "pruned", decision.reason)
            else:
                heapq.heappush(waiting, (now + step, number, epoch + 1, curve))
        return [*trace, (cost, best)]


def first_at(trace: Sequence[tuple[float, float]], target: float) -> float:
    """Return the cost at which the target was reached; infinite where it was not."""
    return next((cost for cost, best in trace if best >= target), math.inf)


def _search(curves: Curves, way: Way, seed: int, folder: str) -> SearchConfig:
    training = override(
        TrainingConfig(),
        {"schedule.num_epochs": curves.num_epochs, "tracking.storage_dir": folder},
    )
    config = SearchConfig(training=training, space=curves.space(), num_trials=MAX_TRIALS, seed=seed)
    return override(config, {"sampler": way.sampler, "scheduler": way.scheduler})


def _table(
    random: Sequence[Sequence[tuple[float, float]]],
    targets: Sequence[float],
    costs: dict[str, list[float]],
) -> str:
    whole = [trace[-1][0] for trace in random]
    own = [first_at(trace, target) for trace, target in zip(random, targets, strict=True)]
    lines = [
        f"| way | pixels seen to reach the best of {NUM_RANDOM_TRIALS} random trainings | times cheaper than these "
        "| times cheaper than until that best one was there | not reached |",
        "| --- | --- | --- | --- | --- |",
        f"| {RANDOM.name} | {median(whole):.3g} | 1 | {_ratio(own, own)} | 0 |",
    ]
    for name, cost in costs.items():
        missed = sum(math.isinf(value) for value in cost)
        lines.append(
            f"| {name} | {median(cost):.3g} | {_ratio(whole, cost)} | {_ratio(own, cost)} | {missed} |"
        )
    return "\n".join(lines)


def _ratio(reference: Sequence[float], cost: Sequence[float]) -> str:
    """Return the median ratio over the seeds with its 95 % bootstrap interval."""
    ratios = np.array([a / b for a, b in zip(reference, cost, strict=True)])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (NUM_RESAMPLES, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"{np.median(ratios):.3g} ({low:.3g}–{high:.3g})"


if __name__ == "__main__":
    main()
