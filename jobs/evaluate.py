"""Score a model on a split of an ingested data set, under a protocol that is printed with the numbers."""

from dataclasses import dataclass
from pathlib import Path

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.cli import parse_options, run_job
from segfleet.comparison import earlier_scores, side_by_side
from segfleet.config import WorkersConfig
from segfleet.evaluation import check_output, scores_table, write_evaluation
from segfleet.parallel_evaluation import compute_as_one_worker, evaluate
from segfleet.protocol import ViewOptions
from segfleet.registry import fetch
from segfleet.submission import write_submission


@dataclass(frozen=True, kw_only=True)
class Options(ViewOptions):
    """What is scored on what, and how."""

    model: str
    """models:/name@champion, models:/name/3, or the folder of a model package."""

    store: str
    """Folder or address of the ingested data set (made by jobs/ingest_*.py)."""

    split: str = "val"
    """Split of the store; all of its labelled images are scored."""

    boundaries: bool = False
    """Also score how well the outlines of the classes are met (boundary F-score): a tenth of a second an image."""

    num_workers: int = 1
    """Processes that share the images, on the cluster of RAY_ADDRESS or this machine; 1 needs no Ray. However many,
    they count the same, if all compute on processors of one kind: see --use-gpu."""

    cpus_per_worker: int = 1
    """Threads of each worker on CPUs, reserved for it where there are several. Other kernels compute with one than
    with more, and round otherwise: bf16 may see another class in one of some thousand pixels."""

    use_gpu: bool = False
    """One GPU for each of several workers, which compute on CPUs without this flag. A single one, and --submission,
    takes the first GPU that is there, also without this flag, and is refused with it where there is none."""

    compare_with: Path | None = None
    """scores.json of an earlier evaluation: both scores side by side, and the difference. Refused, before anything is
    computed, where it was made under another protocol."""

    submission: Path | None = None
    """Folder for what the Cityscapes server takes, PNGs of ids and submission.zip, predicted as a single worker does
    whose scores are asked for; nothing is scored then, and the split needs no labels."""

    output: Path = Path("evaluation")
    """Folder for scores.json, image_counts.npz, confusion_matrix.png, worst.png and best.png."""

    num_examples: int = 4
    """Images in each of the two panels."""

    tracking_uri: str = ""
    """MLflow server or database of the registry; empty takes MLFLOW_TRACKING_URI, else runs/mlflow.db."""


def main() -> None:
    """Print the IoU of each class, the means and the protocol, and where the pictures are."""
    options = parse_options(Options, description=__doc__ or "")
    store = Store.open(options.store)
    model = fetch(options.model, tracking_uri=options.tracking_uri)
    protocol = options.protocol_on(store.digest, options.split, crop_size=model.crop_size)
    workers = WorkersConfig(
        num_workers=options.num_workers, cpus_per_worker=options.cpus_per_worker, use_gpu=options.use_gpu
    )
    if options.submission is not None:
        if options.num_workers != 1 or options.boundaries or options.compare_with:
            raise InputError(
                "--submission must come without --num-workers, --boundaries and --compare-with: one process segments, "
                "and nothing is scored. Leave them out."
            )
        compute_as_one_worker(model, workers)
        paths = write_submission(model, store, protocol, options.submission)
        print(f"{len(paths) - 1} images segmented by {model.source}, {protocol}\nwritten  {paths[-1]}")
        return
    earlier = None
    if options.compare_with is not None:
        earlier = earlier_scores(options.compare_with, protocol, store.class_table.class_names)
    check_output(options.output, options.num_examples, compared_with=options.compare_with)
    evaluation = evaluate(
        model,
        store,
        protocol,
        workers=workers,
        storage_dir=options.output,
        has_boundaries=options.boundaries,
        num_examples=options.num_examples,
    )
    print(f"\n{model.source} on {options.store}\n\n{scores_table(evaluation.scores)}\n")
    if earlier is not None:
        model_before, scores_before = earlier
        table = side_by_side([("", "now", "earlier", "difference")], evaluation.scores, scores_before)
        print(f"earlier: {model_before}, {options.compare_with}, under the same protocol\n\n{table}\n")
    paths = write_evaluation(evaluation, model, store, options.output, num_examples=options.num_examples)
    print("\n".join(f"written  {path}" for path in paths))


if __name__ == "__main__":
    run_job(main, goes_on=False)
