"""Measure @challenger and @champion of a registered model in the same way, and move @champion if that is earned.

The gain in mIoU must be above --min-gain even at the lower end of its interval (paired bootstrap over the images), no
class may lose more than its floor, and the challenger must load and predict in a process of its own. Every decision
is kept: --history True shows them, --rollback True makes the champion before the last promotion champion again.

Exit codes: 0 the challenger is the champion (with --dry-run: would be), 3 it is refused, 2 the input cannot be used.
"""

from dataclasses import dataclass, field

from pspnet.errors import InputError
from pspnet.store import Store
from segfleet.cli import parse_options, run_job
from segfleet.config import TrackingConfig
from segfleet.gate import Limits
from segfleet.promotion import comparison_table, promote, roll_back
from segfleet.promotion_record import history, history_table
from segfleet.protocol import ViewOptions
from segfleet.tracking_server import resolve_uri


@dataclass(frozen=True, kw_only=True)
class Options(ViewOptions):
    """Which model, measured on what, and what it must keep to."""

    name: str
    """Name of the registered model."""

    store: str = ""
    """Folder or address of the ingested data set that both are scored on."""

    split: str = "val"
    """Split of the store."""

    min_gain: float = 0.0
    """The gain in mIoU must be above this even at the lower end of its interval. Three repeats of one training differ
    by 0.013 on Cityscapes: the interval is over images, not over trainings."""

    confidence: float = 0.95
    """How sure the gain must be, one-sided."""

    max_class_loss: float = 0.03
    """No class may lose more IoU than this."""

    class_floors: dict[str, float] = field(default_factory=dict)
    """Other limits for single classes: --class-floors train 0.1 bus 0.05."""

    max_latency_ratio: float = 0.0
    """Longest time per image, as a multiple of the champion's; 0 for no limit."""

    max_size_mb: float = 0.0
    """Largest size of the weights in megabytes; 0 for no limit."""

    why: str = ""
    """What is kept in the history beside the numbers."""

    dry_run: bool = False
    """Compare and say, but change nothing."""

    rollback: bool = False
    """Return to the champion before the last promotion, without measuring."""

    history: bool = False
    """Show all decisions, and do nothing."""

    tracking_uri: str = ""
    """MLflow server or database of the registry; empty takes MLFLOW_TRACKING_URI, else runs/mlflow.db."""


def main() -> int:
    """Print both models' scores and the decision; 0 promoted, 3 refused."""
    options = parse_options(Options, description=__doc__ or "")
    uri = resolve_uri(TrackingConfig(tracking_uri=options.tracking_uri))
    if options.history:
        print(history_table(history(uri, options.name)) or f"nothing was decided on {options.name} yet")
        return 0
    if options.rollback:
        entry = roll_back(uri, options.name, dry_run=options.dry_run, why=options.why)
        verb = "would be" if options.dry_run else "is"
        print(f"{options.name} version {entry.champion_after} {verb} the champion again")
        return 0
    if not options.store:
        raise InputError("--store must name the data set that both models are scored on, but none was given.")
    report = promote(
        uri,
        options.name,
        store=Store.open(options.store),
        split=options.split,
        views=options,
        limits=Limits(
            min_gain=options.min_gain,
            confidence=options.confidence,
            max_class_loss=options.max_class_loss,
            class_floors=options.class_floors,
            max_latency_ratio=options.max_latency_ratio,
            max_size_bytes=int(options.max_size_mb * 1e6),
        ),
        dry_run=options.dry_run,
        why=options.why,
    )
    protocol = report.challenger.protocol
    if report.challenger_version == report.champion_version:
        verb = "stays"
    elif report.promote:
        verb = "promoted" if report.is_executed else "would be promoted"
    else:
        verb = "refused"
    print(f"\n{comparison_table(report)}\n\nprotocol  {protocol.digest}: {protocol}")
    print(f"{options.name} version {report.challenger_version} {verb}: {'; '.join(report.reasons)}")
    return 0 if report.promote else 3


if __name__ == "__main__":
    run_job(main)
