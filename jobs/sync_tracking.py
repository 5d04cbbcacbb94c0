"""Send what trainings recorded while the MLflow server was away: points, pictures and endings, each once."""

from dataclasses import dataclass
from pathlib import Path

from pspnet.errors import InputError
from segfleet.cli import parse_options, run_job
from segfleet.config import TrackingConfig
from segfleet.run_writer import ship_spool
from segfleet.secret import masked
from segfleet.spool import unsent_runs
from segfleet.tracking_server import check_server, resolve_uri


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the spools are, and where they go."""

    storage_dir: Path = Path("runs")
    """Folder of the trainings (tracking.storage_dir); every spool below it is sent."""

    tracking_uri: str = ""
    """MLflow server or database; empty takes MLFLOW_TRACKING_URI, else sqlite:///<storage_dir>/mlflow.db."""


def main() -> int:
    """Send all spools; 1 where a run could not be sent."""
    options = parse_options(Options, description=__doc__ or "")
    if not options.storage_dir.is_dir():
        raise InputError(
            f"--storage-dir must be the folder of the trainings, but there is none at {options.storage_dir}."
        )
    uri = resolve_uri(TrackingConfig(tracking_uri=options.tracking_uri, storage_dir=str(options.storage_dir)))
    check_server(uri)
    unsent = unsent_runs(options.storage_dir)
    num_sent = sum(ship_spool(uri, run_id, spool_dir) for run_id, spool_dir in unsent.items())
    print(f"{num_sent} of {len(unsent)} unsent runs sent to {masked(uri)}")
    return 0 if num_sent == len(unsent) else 1


if __name__ == "__main__":
    run_job(main)
