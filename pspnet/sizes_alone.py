"""Networks that have sizes but no content, to count what a step takes without computing it."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pspnet.initialisation import WithoutDraws
from pspnet.model import PSPNet


def built_without_content(build: Callable[[], PSPNet]) -> PSPNet:
    """Return the network that `build` makes, on the device "meta"; random numbers stay as they are."""
    random_state = torch.get_rng_state()
    try:
        with WithoutDraws(), torch.device("meta"):
            return build()
    finally:
        torch.set_rng_state(random_state)


@contextlib.contextmanager
def sizes_alone(build: Callable[[], PSPNet]) -> Iterator[PSPNet]:
    """Yield the network that `build` makes, on a CPU; neither it nor what is made within has content.

    It is built on the device "meta": what timm asks of tensors while it builds (`.tolist()`, `.item()`), a tensor that
    the mode makes cannot answer. Random numbers stay as they are.
    """
    random_state = torch.get_rng_state()
    model = built_without_content(build)
    try:
        with WithoutDraws(), FakeTensorMode(allow_non_fake_inputs=True):  # such as the loss's class weights
            yield model.to_empty(device="cpu")
    finally:
        torch.set_rng_state(random_state)
