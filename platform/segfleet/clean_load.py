"""Whether a model loads and predicts in a process that has nothing but the package: `python -m segfleet.clean_load`."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np

from pspnet.errors import InputError
from segfleet.package import SegmentationModel
from segfleet.registry import fetch

SIZES = ((97, 129), (128, 96), (65, 65))
"""Heights and widths of the images that are predicted."""
TIMEOUT_S = 300.0


def fingerprints(model: SegmentationModel, sizes: Sequence[tuple[int, int]] = SIZES) -> list[str]:
    """Return a digest of the model's prediction of an image of each size, always the same images."""
    found = []
    for height, width in sizes:
        image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found.append(hashlib.sha256(model.predict(image).tobytes()).hexdigest())
    return found


def check_clean_load(model: SegmentationModel, *, tracking_uri: str) -> None:
    """Raise InputError where a process of its own cannot load the model, or predicts otherwise.

    It may not unpickle anything: MLFLOW_ALLOW_PICKLE_DESERIALIZATION is false there.
    """
    done = subprocess.run(
        [sys.executable, "-m", "segfleet.clean_load", model.source],
        env=os.environ
        | {
            "MLFLOW_TRACKING_URI": tracking_uri,  # not an argument: every user of the machine sees those
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"A model must load in a process of its own, but {model.source} did not: {last}")
    if json.loads(done.stdout.splitlines()[-1]) != fingerprints(model):
        raise InputError(
            f"A model must predict the same in every process, but {model.source} does not at the sizes "
            f"{', '.join(f'{height} x {width}' for height, width in SIZES)}. Register it again."
        )


if __name__ == "__main__":
    print(json.dumps(fingerprints(fetch(sys.argv[1]))))
