"""Search learning rate, auxiliary-loss weight and crop size for NYU Depth V2, and register the best model.

Trials that are no better than others at the same epoch are stopped early. The study is kept in the storage folder:
the same command continues it, and trains nothing where it is finished. Runs on the Ray cluster at RAY_ADDRESS, else
on this machine. Exit code 1 where no trial completed, 2 for input that cannot be used, 4 where
another process works on the study.
"""

from segfleet.cli import parse_search, run_job
from segfleet.cluster import joined
from segfleet.presets import search_preset


def main() -> int:
    """Run or continue the search that the flags name."""
    config = parse_search(search_preset, "nyuv2_r50", description=__doc__ or "")
    # After the flags and what the cluster lacks: neither need wait for torch and MLflow.
    with joined(config.training):
        from segfleet.search import print_search, run_search

        return print_search(run_search(config))


if __name__ == "__main__":
    run_job(main)
