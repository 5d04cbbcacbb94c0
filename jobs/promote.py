"""Score @challenger and @champion of a registered model in the same way, and move @champion if that is
earned.

Exit codes: 0 the challenger is the champion (with --dry-run: would be), 3 it is refused, 2 the input cannot
be used.
"""

from dataclasses import dataclass

from pspnet.store import Store
from segfleet.cli import parse_options, run_job
from segfleet.config import TrackingConfig
from segfleet.promotion import comparison_table, promote
from segfleet.protocol import ViewOptions
from segfleet.tracking import resolve_uri


@dataclass(frozen=True, kw_only=True)
class Options(ViewOptions):
    """Which model, measured on what, and how much better it must be."""

    name: str
    """Name of the registered model."""

    store: str
    """Folder or address of the ingested data set that both are scored on."""

    split: str = "val"
    """Split of the store."""

    min_gain: float = 0.01
    """Least gain in mIoU; three repeats of one training differ by 0.013 on Cityscapes."""

    dry_run: bool = False
    """Compare and say, but change nothing."""

    tracking_uri: str = ""
    """MLflow server or database of the registry; empty takes MLFLOW_TRACKING_URI, else runs/mlflow.db."""


def main() -> int:
    """Print both models' scores and the decision; 0 promoted, 3 refused."""
    options = parse_options(Options, description=__doc__ or "")
    store = Store.open(options.store)
    report = promote(
        resolve_uri(TrackingConfig(tracking_uri=options.tracking_uri)),
        options.name,
        store=store,
        split=options.split,
        views=options,
        min_gain=options.min_gain,
        dry_run=options.dry_run,
    )
    decision, protocol = report.promotion, report.challenger.protocol
    if report.challenger_version == report.champion_version:
        verb = "stays"
    elif decision.promote:
        verb = "promoted" if report.is_executed else "would be promoted"
    else:
        verb = "refused"
    print(f"\n{comparison_table(report)}\n\nprotocol  {protocol.digest}: {protocol}")
    print(f"{options.name} version {report.challenger_version} {verb}: {decision.reason}")
    return 0 if decision.promote else 3


if __name__ == "__main__":
    run_job(main)
