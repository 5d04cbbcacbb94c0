"""Pictures that the memory of the model's device does not hold: said in one sentence, with what takes less."""

import numpy as np

from pspnet.errors import InputError
from pspnet.exhaustion import is_out_of_memory
from segfleet.package import SegmentationModel
from segfleet.protocol import Views

SMALL_WINDOW = 713


def smaller(views: Views) -> str:
    """Return the flag that takes less memory than `views`."""
    return f"--window below {views.window}" if views.window else f"--window {SMALL_WINDOW} or less"


def predict_fitting(model: SegmentationModel, image: np.ndarray, views: Views, *, name: str) -> np.ndarray:
    """Return `model.predict_as`; InputError that names the image where the memory does not suffice."""
    try:
        return model.predict_as(image, views)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = image.shape[:2]
        raise InputError(
            f"Each image must fit into the memory of {model.device}, but {name} of {height} x {width} pixels does "
            f"not ({Views.__str__(views)}). {smaller(views)} takes less, under a protocol of its own."
        ) from error
