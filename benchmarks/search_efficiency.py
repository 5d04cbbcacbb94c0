"""How much cheaper does a search reach what random search reaches? Replayed on recorded training curves.

Random search trains 64 points to their end (--trials); its best mIoU is the target and the pixels that it has seen are
its cost.
Every other way proposes and prunes through the platform's own study, on the curve of the recorded point that is
nearest, four trials side by side, until a trial that was trained to its end has the target. Time is counted in pixels:
one unit is an epoch of the base configuration. The last line of output is JSON.

    python benchmarks/search_efficiency.py --quick
    python benchmarks/search_efficiency.py --write benchmarks/README.md
"""

import heapq
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from reporting import parser_of, record, versions

from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.pruning import epoch_weight
from segfleet.search_config import SearchConfig, SpaceConfig
from segfleet.study import Study

NUM_RANDOM_TRIALS = 64
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
    Way("TPE and the median rule", "tpe", "median"),
    Way("TPE, each trained to its end", "tpe", "none"),
)


class Curves:
    """The recorded trainings."""

    def __init__(self, path: Path) -> None:
        values = json.loads(path.read_text())
        self.about: str = f"{values['about']}; recorded with {values['versions']}"
        self.training: dict[str, Any] = values["training"]
        self.curves: list[dict[str, Any]] = values["curves"]

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
    parser = parser_of(__doc__, quick="10 seeds, the default way only")
    parser.add_argument("--curves", type=Path, default=Path(__file__).with_name("curves.json"))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--trials", type=int, default=NUM_RANDOM_TRIALS, help="that random search trains")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    seeds = range(10 if options.quick else options.seeds)
    curves = Curves(options.curves)
    ways = (OURS,) if options.quick else (OURS, *OTHERS)
    with ProcessPoolExecutor(options.processes) as pool:
        random = list(pool.map(partial(replay, curves, RANDOM, num_trials=options.trials), seeds))
        targets = [trace[-1][1] for trace in random]
        costs = {}
        for way in ways:
            traces = pool.map(partial(replay, curves, way, num_trials=MAX_TRIALS), seeds, targets)
            costs[way.name] = [first_at(trace, target) for trace, target in zip(traces, targets, strict=True)]
            print(
                f"{way.name}: {sum(map(math.isfinite, costs[way.name]))} of {len(seeds)} got there",
                file=sys.stderr,
            )
    text = _table(options.trials, random, targets, costs)
    text += f"\n\n- curves: {curves.about}\n- {len(seeds)} seeds, {versions()}"
    record(text, "search_efficiency", options.write)
    ratios = [trace[-1][0] / cost for trace, cost in zip(random, costs[OURS.name], strict=True)]
    print(json.dumps({"cost_ratio_vs_random": round(median(ratios), 2), "seeds": len(seeds)}))


def replay(
    curves: Curves, way: Way, seed: int, target: float = math.inf, *, num_trials: int
) -> list[tuple[float, float]]:
    """Return (epochs' pixels seen by all trials, best mIoU of those trained to their end) after each such trial."""
    with tempfile.TemporaryDirectory(prefix="efficiency-") as folder:
        study = Study(_search(curves, way, seed, folder), store_digest="curves")
        base = study.config.training
        waiting: list[tuple[float, int, int, dict[str, Any]]] = []  # when, trial, evaluation, curve

        def units(curve: dict[str, Any], index: int) -> float:
            """Return what an evaluation costs since the one before, or, after the last, a divergence at once."""
            epochs = [0, *curve["epochs"], curve["epochs"][-1] + 1 if curve["epochs"] else 1]
            weight = epoch_weight(base, {"data.crop_size": curve["crop_size"]})
            return weight * (epochs[index + 1] - epochs[index])

        num_asked, cost, best = 0, 0.0, -math.inf
        trace: list[tuple[float, float]] = []
        now = 0.0
        while best < target:
            while len(waiting) < NUM_CONCURRENT and num_asked < num_trials:
                proposal = study.ask()
                curve = curves.nearest(proposal.changes)
                heapq.heappush(waiting, (now + units(curve, 0), proposal.number, 0, curve))
                num_asked += 1
            if not waiting:
                break
            now, number, index, curve = heapq.heappop(waiting)
            cost += units(curve, index)
            if index == len(curve["miou"]):
                study.finish(number, "diverged", "as recorded")
                continue
            epoch = curve["epochs"][index]
            decision = study.report(number, epoch=epoch, miou=curve["miou"][index])
            if epoch == curve["num_epochs"]:
                study.finish(number, "complete", f"{epoch} epochs")
                best = max(best, *curve["miou"])
                trace.append((cost, best))
            elif decision.stop:
                study.finish(number, "pruned", decision.reason)
            else:
                heapq.heappush(waiting, (now + units(curve, index + 1), number, index + 1, curve))
        return [*trace, (cost, best)]


def first_at(trace: Sequence[tuple[float, float]], target: float) -> float:
    """Return the cost at which the target was reached; infinite where it was not."""
    return next((cost for cost, best in trace if best >= target), math.inf)


def _search(curves: Curves, way: Way, seed: int, folder: str) -> SearchConfig:
    training = override(TrainingConfig(), curves.training | {"tracking.storage_dir": folder})
    config = SearchConfig(training=training, space=curves.space(), num_trials=MAX_TRIALS, seed=seed)
    return override(config, {"sampler": way.sampler, "scheduler": way.scheduler})


def _table(
    num_random: int,
    random: Sequence[Sequence[tuple[float, float]]],
    targets: Sequence[float],
    costs: dict[str, list[float]],
) -> str:
    whole = [trace[-1][0] for trace in random]
    own = [first_at(trace, target) for trace, target in zip(random, targets, strict=True)]
    lines = [
        f"| way | epochs' pixels to reach the best of {num_random} random trainings | times cheaper than these "
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
