"""Windows, mirror images and scales are semseg's own (github.com/hszhao/semseg, tool/test.py), on one network.

SEGFLEET_SEMSEG names a checkout; OpenCV is in the extra "bench".
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pspnet.inference import predict_logits
from pspnet.model import PSPNet

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
CROP = 33


@pytest.fixture
def semseg(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Their script as a module, on the CPU."""
    root = os.environ.get("SEGFLEET_SEMSEG", "")
    if not root:
        pytest.skip("needs a checkout of github.com/hszhao/semseg, which SEGFLEET_SEMSEG does not name")
    pytest.importorskip("cv2", reason="semseg needs OpenCV: install the extra bench")
    monkeypatch.syspath_prepend(root)
    spec = importlib.util.spec_from_file_location("semseg_test", Path(root) / "tool" / "test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in [name for name in sys.modules if name.split(".")[0] == "util"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    return module


def theirs(semseg: ModuleType, model: PSPNet, image: np.ndarray, scales: tuple[float, ...]) -> np.ndarray:
    """Return their probabilities; the loop over scales is that of their function `test`."""
    pixels, (h, w) = image.astype(np.float32), image.shape[:2]
    total = np.zeros((h, w, model.num_classes))
    for scale in scales:
        long_size = round(scale * max(h, w))
        new_h = new_w = long_size
        if h > w:
            new_w = round(long_size / float(h) * w)
        else:
            new_h = round(long_size / float(w) * h)
        scaled = semseg.cv2.resize(pixels, (new_w, new_h), interpolation=semseg.cv2.INTER_LINEAR)
        total += semseg.scale_process(
            lambda images: model(images).logits, scaled, model.num_classes, CROP, CROP, h, w, MEAN, STD
        )
    return total / len(scales)


@pytest.mark.parametrize("size", [(65, 97), (90, 71), (40, 57), (21, 50)])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)])
def test_windows_with_flip_are_semsegs(
    semseg: ModuleType, size: tuple[int, int], scales: tuple[float, ...]
) -> None:
    """At one scale and at six, for images of several windows, of unequal overlaps, and smaller than a window."""
    torch.manual_seed(0)
    model = PSPNet(5, backbone="resnet18", head_channels=16).eval()
    model.head.classifier.weight.data *= 20  # so that probabilities are far from equal
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    how: dict[str, Any] = {"mean": MEAN, "std": STD, "device": "cpu"}
    expected = theirs(semseg, model, image, scales)
    ours = predict_logits(model, image, **how, flip=True, scales=scales, crop_size=CROP).softmax(0)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=1e-5, rtol=0)
