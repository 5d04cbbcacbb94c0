"""Which images a search looks at: trials train on `fit` and are scored on `selection`, both cut from train.

The official validation images are left alone until the search has its winner, which is scored on them once.
"""

from dataclasses import replace

from pspnet.manifest import FIT, SELECTION
from pspnet.store import Store
from segfleet import cluster
from segfleet.config import TrainingConfig
from segfleet.override import override
from segfleet.package import load_package
from segfleet.parallel_evaluation import evaluate_on_cluster
from segfleet.protocol import Protocol
from segfleet.scores import Scores
from segfleet.search_config import SearchConfig


def split_for_trials(config: SearchConfig, store: Store) -> SearchConfig:
    """Return the search whose trials train on `fit` and are scored on `selection`, if it is to be so and can be.

    It is as it was where `score_trials_on` is "val", where the user trains on another split than train, and, with
    a note, where the store has no cut.
    """
    data = config.training.data
    if config.score_trials_on == "val" or data.train_split != "train":
        return config
    if store.manifest.selection is None:
        print(
            f"note: {store.location.text} has no selection split, so that trials are scored on {data.val_split}, "
            "and the winner's score there is too good. Ingest the data anew to cut one.",
            flush=True,
        )
        return config
    changes = {"data.train_split": FIT, "data.val_split": SELECTION}
    return replace(config, training=override(config.training, changes))


def final_protocol(config: TrainingConfig, store: Store, split: str) -> Protocol:
    """Return how the winner is scored: whole images at one scale."""
    return Protocol(store_digest=store.digest, split=split, precision=config.workers.precision)


def final_scores(package: str, config: TrainingConfig, store: Store, split: str) -> Scores:
    """Score a model package on all labelled images of `split`: whole images, one scale, shared out to the cluster.

    As many workers take part as the cluster holds for the search's trials. Needs a connection to Ray.
    """
    num_workers = cluster.max_concurrent_trials(config) * config.workers.num_workers
    return evaluate_on_cluster(
        load_package(package),
        store,
        final_protocol(config, store, split),
        workers=replace(config.workers, num_workers=num_workers),
    ).scores
