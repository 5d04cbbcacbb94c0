"""A model as one file for other programs: ONNX, or PyTorch's exported program, for images of any size and batch.

The file holds everything between a decoded picture and its labels: uint8 RGB images (n, h, w, 3) come in, train ids,
uint8 (n, h, w), come out, and its metadata say what these mean. It is run beside the model before it is kept.
"""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pspnet.errors import InputError
from pspnet.model import upsampled
from pspnet.transforms import normalise
from segfleet.package import SegmentationModel

ENDINGS: dict[str, Literal["onnx", "pt2"]] = {".onnx": "onnx", ".pt2": "pt2"}
CHECKED_SIZES = ((1, 97, 130), (2, 64, 64), (3, 130, 97))
"""Images, height, width of what the file is tried on; none of them is the size that it was traced with."""
MAX_DISAGREEMENT = 1e-3
"""Share of the pixels that may have another class: where two are as likely, rounding decides."""
_TRACED_SIZE = (2, 73, 105)
_OPSET = 20


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    path: Path
    disagreement: float
    """The largest share of pixels, over `CHECKED_SIZES`, to which the file gives another class than the model."""


class EndToEnd(nn.Module):
    """From uint8 RGB images (n, h, w, 3) to train ids, uint8 (n, h, w)."""

    def __init__(self, model: SegmentationModel) -> None:
        super().__init__()
        self.network = model.network
        self.mean, self.std = model.mean, model.std

    def forward(self, images: Tensor) -> Tensor:
        """Return the train id of each pixel."""
        height, width = images.shape[1:3]
        output = self.network(normalise(images.permute(0, 3, 1, 2), self.mean, self.std), upsample=False)
        logits = output.logits
        if self.network.align_corners:
            logits = upsampled(logits, output.output_stride)
            # Not a slice: a view's strides would tie the program to the sizes that it is traced with.
            logits = logits.index_select(2, torch.arange(height)).index_select(3, torch.arange(width))
        return logits.argmax(1).to(torch.uint8)


def export_model(model: SegmentationModel, path: str | Path) -> Exported:
    """Write `model` to `path`, a file that ends with .onnx or .pt2, whole or not at all.

    Raises InputError for another ending, where the libraries of ONNX are absent, and where what was written does not
    give what the model gives.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise InputError(f"--output must end with {' or '.join(ENDINGS)}, but got {path}.")
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    program = _traced(model)
    try:
        if ENDINGS[path.suffix] == "onnx":
            _save_onnx(program, aside, _metadata(model))
            run = _onnx_runner(aside)
        else:
            torch.export.save(program, aside, extra_files={"segfleet.json": json.dumps(_metadata(model))})
            run = _program_runner(aside)
        disagreement = max(_disagreement(model, run, *size) for size in CHECKED_SIZES)
        if disagreement > MAX_DISAGREEMENT:
            raise InputError(
                f"An exported model must give what the model gives, but {disagreement:.2%} of the pixels have another "
                f"class, more than {MAX_DISAGREEMENT:.2%}. Nothing was written; try the other format."
            )
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return Exported(path, disagreement)


def _traced(model: SegmentationModel) -> torch.export.ExportedProgram:
    """Return the network as a program in which number and size of the images are free."""
    number, height, width = _TRACED_SIZE
    images = torch.zeros(number, height, width, 3, dtype=torch.uint8)
    free = torch.export.Dim.AUTO
    module = EndToEnd(model).eval().cpu()
    with torch.no_grad():
        return torch.export.export(
            module, (images,), dynamic_shapes=({0: free, 1: free, 2: free},), strict=False
        )


def _metadata(model: SegmentationModel) -> dict[str, Any]:
    return {
        "source": model.source,
        "input": "images: uint8 RGB (n, h, w, 3)",
        "output": "train_ids: uint8 (n, h, w), indices of class_names",
        "class_names": list(model.class_table.class_names),
        "class_table": model.class_table.to_dict(),
        "weights_sha256": model.info["weights"]["sha256"],
    }


def _save_onnx(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            "ONNX needs libraries that are not installed. Install them: pip install -c constraints.txt -e '.[onnx]', "
            "or give a file that ends with .pt2."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        onnx_program = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["train_ids"],
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert onnx_program is not None
    for name, value in metadata.items():
        onnx_program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    onnx_program.save(path)


def _onnx_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["train_ids"], {"images": images})[0])


def _program_runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    module = torch.export.load(path).module()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(images)))

    return run


def _disagreement(
    model: SegmentationModel, run: Callable[[np.ndarray], np.ndarray], number: int, height: int, width: int
) -> float:
    """Return to which share of the pixels the file and the model give another class, on noise with patches."""
    rng = np.random.default_rng([number, height, width])
    patches = rng.integers(0, 256, (number, height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    images = patches.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    images = np.clip(images.astype(np.int16) + rng.integers(-20, 21, images.shape), 0, 255).astype(np.uint8)
    found = run(images)
    if found.shape != images.shape[:3] or found.dtype != np.uint8:
        return 1.0
    return float(np.mean(found != np.stack(model.predict_batch(list(images)))))
