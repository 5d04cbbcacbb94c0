"""Laws of the proposals: how many are random, however many trials run side by side and are given up."""

from pathlib import Path

import pytest

from segfleet.override import override
from segfleet.presets import search_preset
from segfleet.search_config import SearchConfig
from segfleet.study import Study

NUM_STARTUP, NUM_TRIALS = 4, 24


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    changes = {
        "training.tracking.storage_dir": str(tmp_path),
        "training.schedule.num_epochs": 4,
        "min_epochs": 1,
        "reduction_factor": 2,
        "num_startup_trials": NUM_STARTUP,
        "num_trials": NUM_TRIALS,
        "fidelity": "epochs",
    }
    return override(search_preset("demo"), changes)


def proposals(config: SearchConfig, *, num_concurrent: int) -> tuple[list[dict[str, object]], list[str]]:
    """Search with so many trials side by side; return all points in their order, and how the trials ended."""
    study = Study(config, store_digest="d")
    points: list[dict[str, object]] = []
    alive: dict[int, int] = {}
    while len(points) < NUM_TRIALS or alive:
        while len(points) < NUM_TRIALS and len(alive) < num_concurrent:
            proposal = study.ask()
            points.append(proposal.changes)
            alive[proposal.number] = 0
        number = min(alive, key=lambda it: (alive[it], it))
        alive[number] += 1
        miou = 0.1 * alive[number] + 0.1 * points[number]["optim.aux_loss_weight"]  # type: ignore[operator]
        decision = study.report(number, epoch=alive[number], miou=miou)
        if decision.stop or alive[number] == 4:
            study.finish(number, "pruned" if decision.stop else "complete", decision.reason)
            del alive[number]
    return points, [trial.reason for trial in study.trials()]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
@pytest.mark.parametrize("num_concurrent", [1, 4, 8])
def test_random_trials_are_the_startup_and_those_beside_it(
    config: SearchConfig, sampler: str, num_concurrent: int
) -> None:
    random, _ = proposals(
        override(config, {"sampler": "random", "study": "r"}), num_concurrent=num_concurrent
    )
    points, reasons = proposals(override(config, {"sampler": sampler}), num_concurrent=num_concurrent)
    assert reasons.count("pruned") > NUM_TRIALS / 4, "a law about trials that are given up needs some"
    is_random = [point == other for point, other in zip(points, random, strict=True)]
    num_random = is_random.index(False)
    assert not any(is_random[num_random:]), "random once more after the start-up"
    assert 1 <= num_random <= NUM_STARTUP + num_concurrent - 1
