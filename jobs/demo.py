"""The whole loop on this machine, as a cluster would run it: draw street scenes, ingest them, start a Ray head and an
MLflow server, submit the search, and say where its results are.

Run again, it uses what is there: images, store, servers that answer, a search that still runs, finished trials.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segfleet import services
from segfleet.cli import parse_options, run_job
from segfleet.interruption import heard
from segfleet.provenance import commit
from segfleet.services import Service

REPOSITORY = Path(__file__).resolve().parents[1]
JOBS = Path("jobs")
LEAST_CPUS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the demo lies. Its size is that of the preset `demo` and of jobs/draw_demo.py."""

    folder: Path = Path("demo")
    """Folder for the images, the store, the runs and the records of the servers."""

    num_trials: int = 6
    """Trials of the search, those of an earlier call counted in."""


def main() -> int:
    """Go through the steps; the exit code is that of the step that failed, else 0."""
    options = parse_options(Options, description=__doc__ or "")
    folder = options.folder.absolute()
    os.chdir(REPOSITORY)
    began_s = time.monotonic()
    with services.exclusive(folder):
        images, store = folder / "cityscapes", folder / "store"
        _step("drawing street scenes", ["python", JOBS / "draw_demo.py", "--root", images])
        _step(
            "ingesting them",
            [
                "python",
                JOBS / "ingest_cityscapes.py",
                "--root",
                images,
                "--store",
                store,
                "--overwrite",
                "True",
            ],
        )
        print("\n== starting a Ray head and an MLflow server on this machine", flush=True)
        ray = services.ensure_ray(folder, num_cpus=max(LEAST_CPUS, len(os.sched_getaffinity(0))))
        mlflow = services.ensure_mlflow(folder)
        print(f"Ray     {ray.url} (process {ray.pid}, log {folder / 'ray.log'})")
        print(f"MLflow  {mlflow.url} (process {mlflow.pid}, log {folder / 'mlflow.log'})")
        search = [
            *("python", JOBS / "tune_cityscapes.py", "--preset", "demo"),
            *("--num-trials", options.num_trials, "--data.store", store),
            *("--tracking.storage-dir", folder / "runs"),
        ]
        job_id, is_ours = _submit(folder, ray, mlflow, [str(word) for word in search])
    code = _follow(ray, job_id, end_on_interrupt=is_ours)
    print(f"\nThe demo {'is done' if code == 0 else 'failed'} after {time.monotonic() - began_s:.0f} s.")
    print(f"Every run, curve, picture and model version:  {mlflow.url}")
    print("End both servers:  make demo-stop")
    return code


def _step(title: str, command: Sequence[str | Path]) -> None:
    print(f"\n== {title}\n$ {' '.join(map(str, command))}", flush=True)
    code = subprocess.run(command, check=False, env=services.local_environment({})).returncode
    if code != 0:
        sys.exit(code)


def _submit(folder: Path, ray: Service, mlflow: Service, search: Sequence[str]) -> tuple[str, bool]:
    """Submit `search`; return the job's id and whether it was submitted now (not by a call that still follows it)."""
    record = folder / "job.json"
    job_id = json.loads(record.read_text())["job_id"] if record.exists() else ""
    if job_id and _status(ray, job_id) in ("PENDING", "RUNNING"):
        print(f"\n== following the search that still runs ({job_id})", flush=True)
        return job_id, False
    job_id = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    sha, is_dirty = commit()
    command = [
        *("ray", "job", "submit", "--no-wait", "--address", ray.url, "--submission-id", job_id),
        *("--runtime-env", "jobs/runtime_env.yaml", "--", "env", f"MLFLOW_TRACKING_URI={mlflow.url}"),
        *([f"SEGFLEET_COMMIT={sha}{'-dirty' if is_dirty else ''}"] if sha else []),
        *search,
    ]
    print(f"\n== searching\n$ {' '.join(command)}", flush=True)
    submitted = subprocess.run(
        command,
        check=False,
        env=_ray_client(ray),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if submitted.returncode != 0:
        sys.exit(f"error: Ray did not take the job:\n{submitted.stdout}\nIts log: {folder / 'ray.log'}")
    record.write_text(json.dumps({"job_id": job_id}) + "\n")
    return job_id, True


def _follow(ray: Service, job_id: str, *, end_on_interrupt: bool) -> int:
    """Show what the job prints until it ends; return 0 where it succeeded."""
    try:
        command = ["ray", "job", "logs", "--follow", "--address", ray.url, "--log-style", "record", job_id]
        subprocess.run(command, check=False, env=_ray_client(ray))
    except KeyboardInterrupt as interruption:
        heard(interruption)
        if end_on_interrupt:
            stop = ["ray", "job", "stop", "--no-wait", "--address", ray.url, job_id]
            subprocess.run(stop, check=False, env=_ray_client(ray), stdout=subprocess.DEVNULL)
        raise
    return 0 if _status(ray, job_id) == "SUCCEEDED" else 1


def _ray_client(ray: Service) -> dict[str, str]:
    return services.local_environment(
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray.token, "RAY_LOGGER_LEVEL": "error"}
    )


def _status(ray: Service, job_id: str) -> str:
    """Return what Ray says of the job, "" where it knows none of that name."""
    text = services.read(f"{ray.url}/api/jobs/{job_id}", token=ray.token)
    return str(json.loads(text)["status"]) if text else ""


if __name__ == "__main__":
    run_job(main)
