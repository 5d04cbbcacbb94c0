"""What is written to an MLflow run while the training goes on: through the spool, never waiting for the server.

A thread sends the points and pictures of the spool on with the timestamps they got there. What could not be sent is
sent by the next writer of the run, by `ship_spool` or by jobs/sync_tracking.py.
"""

import contextlib
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from pspnet.errors import InputError
from segfleet.faults import fault
from segfleet.interruption import heard, known_interruption
from segfleet.secret import first_line, masked
from segfleet.spool import Channel, Status
from segfleet.tracking import MAX_BATCH_POINTS, Point, add_file, add_points, points, set_end
from segfleet.tracking_server import RETRY_S, client


class RunWriter:
    """Writes to a run without ever waiting for the server or raising: the spool first, a thread sends it on.

    A point is written once: where a resumed training comes to a (metric, step) that the spool has, the first
    stays.
    """

    def __init__(self, tracking_uri: str, run_id: str, spool_dir: str | Path) -> None:
        self._uri = tracking_uri
        self._run_id = run_id
        self._points = Channel(Path(spool_dir), run_id, "points")
        self._files = Channel(Path(spool_dir), run_id, "files")
        is_whole = self._points.mend()
        self._files.mend()
        self._seen = {
            (name, entry["step"]) for entry in self._points.entries() for name in entry.get("values", {})
        }
        if not is_whole:  # the server may have points that the spool lost
            with contextlib.suppress(InputError):
                curves = points(tracking_uri, run_id)
                self._seen |= {(name, point.step) for name, curve in curves.items() for point in curve}
        self._changed = threading.Condition()
        self._num_wanted, self._num_shipped = 1, 0  # the first: what an earlier writer could not send
        self._closed = False
        self._thread = threading.Thread(target=self._ship_for_ever, name="tracking", daemon=True)
        self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Add one point to each curve; a value that is not finite is left out."""
        values = {
            metric_name(name): float(value)
            for name, value in metrics.items()
            if math.isfinite(value) and (metric_name(name), step) not in self._seen
        }
        if not values:
            return
        self._seen |= {(name, step) for name in values}
        self._points.append({"step": int(step), "timestamp": _now_ms(), "values": values})
        self._wake()

    def log_artifact(self, path: str | Path, artifact_dir: str = "") -> None:
        """Add the file at `path`, as it is now, to the run's artifacts in `artifact_dir`."""
        self._files.append_file(Path(path), artifact_dir)
        self._wake()

    def log_text(self, text: str, artifact_file: str) -> None:
        """Add `text` to the run's artifacts under the name `artifact_file`."""
        folder, _, name = artifact_file.rpartition("/")
        self._files.append_text(text, name, folder)
        self._wake()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait at most `timeout_s` until the server has everything, and return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_shipped == self._num_wanted, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Flush and end the thread; say where what could not be sent is kept."""
        is_sent = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not is_sent:
            print(
                f"tracking: {masked(self._uri)} did not take all of run {self._run_id} yet; the rest is kept "
                "in "
                f"{self._points.folder} and sent by the next start or by jobs/sync_tracking.py",
                flush=True,
            )

    def _wake(self) -> None:
        with self._changed:
            self._num_wanted += 1
            self._changed.notify_all()

    def _ship_for_ever(self) -> None:
        num_failures, said = 0, ""
        while (num_wanted := self._next_wanted()) is not None:
            try:
                _ship(self._uri, self._run_id, self._points, self._files)
            except Exception as error:  # whatever the server's driver raises, training goes on
                if said != (said := first_line(error)):
                    print(f"tracking: waiting for {masked(self._uri)}: {said}", flush=True)
                with self._changed:
                    pause_s = RETRY_S[min(num_failures, len(RETRY_S) - 1)]
                    self._changed.wait_for(lambda: self._closed, pause_s)
                num_failures += 1
                continue
            num_failures, said = 0, ""
            with self._changed:
                self._num_shipped = num_wanted
                self._changed.notify_all()

    def _next_wanted(self) -> int | None:
        """Wait until there is something to ship and return how many calls it takes in; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._num_shipped != self._num_wanted)
            return None if self._closed else self._num_wanted


def end_run(
    uri: str, run_id: str, *, status: Status, tags: Mapping[str, str], spool_dir: str | Path | None = None
) -> bool:
    """Set the run's status and tags and return True; where the server is away say so and return False.

    With `spool_dir` the ending is kept there for `ship_spool` and jobs/sync_tracking.py. Never raises.
    """
    timestamp = _now_ms()
    if spool_dir is not None:
        entry = {"status": status, "tags": dict(tags), "timestamp": timestamp}
        Channel(Path(spool_dir), run_id, "points").append(entry)
        return ship_spool(uri, run_id, spool_dir)
    try:
        set_end(client(uri), run_id, status=status, tags=tags, timestamp=timestamp)
    except Exception as error:  # whatever the server's driver raises, training goes on
        print(f"tracking: the end of run {run_id} is not recorded: {first_line(error)}", flush=True)
        return False
    return True


@contextlib.contextmanager
def killed_when_interrupted(
    uri: str, run_id: str, nested: Callable[[], Iterable[str]] = tuple
) -> Iterator[None]:
    """Show a run, and those `nested` in it, as KILLED where a person ends this; who goes on opens them again."""
    try:
        with known_interruption():
            yield
    except KeyboardInterrupt as interruption:
        heard(interruption)
        with contextlib.suppress(InputError, ConnectionError):  # a server that is away hears of nothing
            for each in (*nested(), run_id):
                if not end_run(uri, each, status="KILLED", tags={}):
                    break
        raise


def ship_spool(uri: str, run_id: str, spool_dir: str | Path) -> bool:
    """Send what the spool of the run still holds; return whether the server has everything. Never raises."""
    folder = Path(spool_dir)
    try:
        _ship(uri, run_id, Channel(folder, run_id, "points"), Channel(folder, run_id, "files"))
    except Exception as error:  # whatever the server's driver raises, training goes on
        print(f"tracking: run {run_id} is kept in {folder}: {first_line(error)}", flush=True)
        return False
    return True


def metric_name(name: str) -> str:
    """Return `name` with each character that MLflow refuses replaced by an underscore."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)


def _ship(uri: str, run_id: str, points_channel: Channel, files_channel: Channel) -> None:
    """Send everything unsent, oldest first; raises what the server or the network raises."""
    mlflow_client = client(uri)
    waiting = points_channel.unsent()
    while waiting:
        batch: list[tuple[str, Point]] = []
        while waiting and "values" in waiting[0][0]:
            entry, after = waiting[0]
            if len(batch) + len(entry["values"]) > MAX_BATCH_POINTS and batch:
                break
            batch += [
                (name, Point(entry["step"], value, entry["timestamp"]))
                for name, value in entry["values"].items()
            ]
            position = after
            waiting.pop(0)
        add_points(mlflow_client, run_id, batch)
        if not batch:
            end, position = waiting.pop(0)
            set_end(mlflow_client, run_id, status=end["status"], tags=end["tags"], timestamp=end["timestamp"])
        fault("spool.sent")
        points_channel.mark_sent(position)
    for entry, position in files_channel.unsent():
        copy = files_channel.folder / entry["file"]
        add_file(mlflow_client, run_id, copy, entry["artifact_dir"])
        files_channel.mark_sent(position)
        shutil.rmtree(copy.parent, ignore_errors=True)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
