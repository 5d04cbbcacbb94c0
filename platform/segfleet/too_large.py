"""Pictures that the memory of the model's device does not hold: said in one sentence, with what takes less."""

from collections.abc import Sequence

import numpy as np

from pspnet.errors import InputError
from pspnet.exhaustion import is_out_of_memory
from segfleet.package import SegmentationModel
from segfleet.protocol import Views

SMALL_WINDOW = 713


def predict_if_it_fits(
    model: SegmentationModel, images: Sequence[np.ndarray], views: Views
) -> list[np.ndarray] | None:
    """Return `model.predict_batch`, or None, with the memory given back, where it does not suffice."""
    try:
        return model.predict_batch(images, views)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def predict_or_refuse(model: SegmentationModel, image: np.ndarray, views: Views, *, name: str) -> np.ndarray:
    """Return `model.predict_as`; InputError that names the image where the memory does not suffice."""
    found = predict_if_it_fits(model, [image], views)
    if found is None:
        height, width = image.shape[:2]
        raise InputError(
            f"Each image must fit into the memory of {model.device}, but {name} of {height} x {width} pixels does "
            f"not ({Views.__str__(views)}). {smaller(views)} takes less, under a protocol of its own."
        )
    return found[0]


def smaller(views: Views) -> str:
    """Return the flag that takes less memory than `views`."""
    return f"--window below {views.window}" if views.window else f"--window {SMALL_WINDOW} or less"
