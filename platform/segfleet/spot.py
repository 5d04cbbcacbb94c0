"""On a spot instance of AWS: when it is to be taken back, Ray is told, which tells its trainings.

AWS gives two minutes' notice in the instance's metadata (EC2 User Guide, "Spot Instance interruption notices"), and
Ray's launcher does not look there. `cluster.yaml` runs this beside `ray start`:

    python -m segfleet.spot --address HEAD:6379
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

METADATA = "http://169.254.169.254"
POLL_S = 5.0
TIMEOUT_S = 2.0
TOKEN_TTL_S = 21600
DRAIN_TIMEOUT_S = 90.0


class Metadata:
    """The instance's metadata service, version 2: every question carries a token that is asked for first."""

    def __init__(self, address: str = METADATA) -> None:
        self._address = address
        self._token = ""

    def taken_back_at(self) -> datetime | None:
        """Return when the instance is stopped or terminated; None where no notice is given.

        Raises OSError where the service does not answer: this is no instance of AWS, or not for the moment.
        """
        try:
            found = json.loads(self._asked("/latest/meta-data/spot/instance-action"))
            return datetime.fromisoformat(found["time"])
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token is too old
                self._token = ""
            elif error.code != 404:
                raise
            return None

    def _asked(self, path: str) -> str:
        if not self._token:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
            self._token = self._answer("/latest/api/token", header, method="PUT")
        return self._answer(path, {"X-aws-ec2-metadata-token": self._token})

    def _answer(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        request = urllib.request.Request(self._address + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return str(reply.read().decode())


def drain(address: str, seconds_left: int, *, node_id: str = "") -> None:
    """Tell the cluster at `address` that this node, or another one, is gone after so many seconds.

    Raises CalledProcessError where Ray does not take it, TimeoutExpired where no head answers.
    """
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address]
    command += [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "the spot instance is taken back",
    ]
    command += ["--deadline-remaining-seconds", str(max(0, seconds_left))]
    command += ["--node-id", node_id] if node_id else []
    subprocess.run(command, check=True, env=os.environ | {"RAY_ADDRESS": address}, timeout=DRAIN_TIMEOUT_S)


def watch(metadata: Metadata, *, poll_s: float = POLL_S) -> datetime:
    """Wait for the notice and return when the instance is taken back."""
    said = ""
    while True:
        try:
            if (at := metadata.taken_back_at()) is not None:
                return at
            said = ""
        except (OSError, ValueError, KeyError) as error:
            if said != (said := str(error)):
                print(f"waiting for the instance's metadata: {said}", flush=True)
        time.sleep(poll_s)


def main() -> None:
    """Wait for the notice and pass it on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True, help="host:port of the Ray head")
    parser.add_argument("--metadata", default=METADATA, help="where the instance's metadata are")
    options = parser.parse_args()
    at = watch(Metadata(options.metadata))
    seconds_left = int((at - datetime.now(UTC)).total_seconds())
    print(f"this instance is taken back at {at:%H:%M:%S} UTC, in {seconds_left} s", flush=True)
    try:
        drain(options.address, seconds_left)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        sys.exit(f"The cluster at {options.address} must be told, but took nothing: {error}")


if __name__ == "__main__":
    main()
