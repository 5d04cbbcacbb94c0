"""Which images a search looks at: trials train on `fit` and are scored on `selection`, both cut from train.

The official validation images are left alone until the search has its winner, which is scored on them once.
"""

from dataclasses import replace

import ray

from pspnet.manifest import FIT, SELECTION
from pspnet.metrics import ConfusionMatrix
from pspnet.store import Store
from segfleet import cluster
from segfleet.config import SearchConfig, TrainingConfig, WorkersConfig, override
from segfleet.evaluation import confusion_of, scores_of
from segfleet.protocol import Protocol
from segfleet.registry import load_package
from segfleet.scores import Scores


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
            f"note: {store.path} has no selection split, so that trials are scored on {data.val_split}, and the "
            "winner's score there is too good. Ingest the data anew to cut one.",
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

    The counts are whole numbers, so that the scores do not depend on how many share them. The package must lie
    where every node sees it. Needs a connection to Ray.
    """
    protocol = final_protocol(config, store, split)
    workers = config.workers
    num_shares = cluster.max_concurrent_trials(config) * workers.num_workers
    count = ray.remote(
        num_cpus=workers.cpus_per_worker,
        num_gpus=1 if workers.use_gpu else 0,
        runtime_env={"env_vars": cluster.worker_environment(config)},
    )(_count)
    futures = [
        count.remote(package, config.data.store, protocol, workers, rank, num_shares)
        for rank in range(num_shares)
    ]
    total = ConfusionMatrix(store.class_table.num_classes)
    for share in ray.get(futures):
        total.counts += share.counts
    return scores_of(total, store.class_table, protocol)


def _count(
    package: str, store_path: str, protocol: Protocol, workers: WorkersConfig, rank: int, num_shares: int
) -> ConfusionMatrix:
    """Return the confusion counts of one worker's share of the split."""
    import torch

    torch.set_num_threads(workers.cpus_per_worker)
    split = Store.open(store_path).split(protocol.split)
    return confusion_of(load_package(package), split, protocol, split.labelled()[rank::num_shares])
