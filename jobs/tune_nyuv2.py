"""Search learning rate, auxiliary-loss weight and crop size for NYU Depth V2, and register the best model."""

from segfleet.cli import parse_search, run_job
from segfleet.presets import search_preset
from segfleet.search import print_search, run_search


def main() -> int:
    """Run or continue the search that the flags name; 1 where no trial completed."""
    config = parse_search(search_preset, "nyuv2_r50", description=__doc__)
    return print_search(run_search(config))


if __name__ == "__main__":
    run_job(main)
