"""Model packages: what a training leaves for others, and what the registry holds.

A package is data, no code and no pickle:
  model.safetensors   weights and buffers
  model.json          architecture, class table, mean, std, scores with their protocol, origin, sha256
  README.md           the model card, for people
"""

import functools
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pspnet.errors import InputError, MissingPackageError
from pspnet.folding import for_prediction
from pspnet.inference import Average, Precision, predict, predict_batch
from pspnet.initialisation import WithoutDraws
from pspnet.json_values import parse_json, shown, typed
from pspnet.labels import ClassTable
from pspnet.model import PSPNet
from pspnet.sizes import notation
from pspnet.sizes_alone import built_without_content
from pspnet.weights import key_differences
from segfleet.checkpoint import finite, load_checkpoint
from segfleet.protocol import Protocol, Views
from segfleet.scores import Scores

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
MODEL_FILE = "model.json"
CARD_FILE = "README.md"
_INFO = {
    "architecture": dict[str, Any],
    "class_table": dict[str, Any],
    "mean": list[float],
    "std": list[float],
    "scores": dict[str, Any] | None,
    "store_digest": str,
    "run_id": str,
    "config": dict[str, Any],
    "weights": dict[str, Any],
}


class DamagedPackageError(InputError):
    """A package's files are not what its model.json, or the registry, says."""


@dataclass(frozen=True)
class SegmentationModel:
    """A verified model, ready to segment images of any size."""

    network: PSPNet
    class_table: ClassTable
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    info: dict[str, Any]
    """What model.json says."""
    source: str
    """models:/name/version, or the folder."""

    @property
    def scores(self) -> Scores | None:
        """The scores it was packaged with."""
        return Scores.from_dict(self.info["scores"]) if self.info["scores"] else None

    def predict(
        self,
        image: np.ndarray,
        *,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        window: int | str = 0,
        stride: int | str = 0,
        average: Average = "probabilities",
        precision: Precision = "fp32",
    ) -> np.ndarray:
        """Return the train id of each pixel of a uint8 image (h, w, 3); the options are those of `Views`."""
        _check_image(image)
        return predict(
            self._predictor,
            image,
            mean=self.mean,
            std=self.std,
            device=self.device,
            flip=flip,
            scales=tuple(scales),
            crop_size=window or None,
            stride=stride or None,
            average=average,
            precision=precision,
        )

    def predict_as(self, image: np.ndarray, views: Views) -> np.ndarray:
        """Return what `predict` does with the options of `views`."""
        return self.predict(
            image,
            flip=views.flip,
            scales=views.scales,
            window=views.window,
            stride=views.stride,
            average=views.average,
            precision=views.precision,
        )

    def predict_batch(self, images: Sequence[np.ndarray], views: Views | None = None) -> list[np.ndarray]:
        """Return what `predict_as` does for each image; whole images of one size go through the network together."""
        views = views or Views()
        is_whole = not views.flip and views.scales == (1.0,) and not views.window
        sizes = [image.shape for image in images]
        if not is_whole or len(set(sizes)) == len(sizes):
            return [self.predict_as(image, views) for image in images]
        found: dict[int, np.ndarray] = {}
        for size in dict.fromkeys(sizes):
            members = [index for index, other in enumerate(sizes) if other == size]
            for image in (images[index] for index in members):
                _check_image(image)
            train_ids = predict_batch(
                self._predictor,
                np.stack([images[index] for index in members]),
                mean=self.mean,
                std=self.std,
                device=self.device,
                precision=views.precision,
            )
            found |= dict(zip(members, train_ids, strict=True))
        return [found[index] for index in range(len(images))]

    @functools.cached_property
    def _predictor(self) -> PSPNet:
        """The network as it predicts fastest on this device."""
        return for_prediction(self.network, self.device)

    @property
    def crop_size(self) -> int | str:
        """Size of the crops that it was trained on, which is what a sliding window should be."""
        return notation(self.info["config"]["data"]["crop_size"])


def package_model(
    checkpoint_path: str | Path, out_dir: str | Path, *, run_id: str = "", scores: Scores | None = None
) -> Path:
    """Write the package of a checkpoint to `out_dir`, whole or not at all, and return that folder.

    Without `scores` it carries those of the checkpoint's own validation. The same arguments give the same
    bytes.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    state = checkpoint.state
    scores = scores or _validation_scores(state)
    return write_package(
        out_dir,
        checkpoint.model_state,
        {
            "architecture": state["architecture"],
            "class_table": state["class_table"],
            "mean": state["mean"],
            "std": state["std"],
            "scores": scores.to_dict() if scores else None,
            "store_digest": state["store_digest"],
            "run_id": run_id,
            "epoch": state["epoch"],
            "config": state["config"],
        },
    )


def write_package(out_dir: str | Path, model_state: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
    """Write the package of these weights to `out_dir`, whole or not at all, and return that folder.

    `info` is what model.json says, but for the format and the weights' digest. An older package there is replaced;
    InputError, and nothing is touched, where the folder holds anything else.
    """
    out_dir = Path(out_dir)
    _check_replaceable(out_dir)
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in model_state.items()})
    described = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    info = {"format": FORMAT, **info, "weights": described}
    text = json.dumps(finite(info), indent=1, allow_nan=False) + "\n"
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = out_dir.parent / f".aside-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        (aside / WEIGHTS_FILE).write_bytes(weights)
        (aside / MODEL_FILE).write_text(text)
        (aside / CARD_FILE).write_text(model_card(info))
        _build(info, weights, aside, device="cpu")
        old = aside.with_name(aside.name + "-old")
        if out_dir.exists():
            os.rename(out_dir, old)
        os.rename(aside, out_dir)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return out_dir


def _check_replaceable(out_dir: Path) -> None:
    """Raise InputError where a package cannot take the place of what is there."""
    if out_dir.is_dir():
        others = sorted({path.name for path in out_dir.iterdir()} - {WEIGHTS_FILE, MODEL_FILE, CARD_FILE})
        fault = f"it also holds {', '.join(others[:5])}{', …' if others[5:] else ''}" if others else ""
    else:
        fault = "it is a file" if out_dir.exists() else ""
    if fault:
        raise InputError(
            f"A model package must go into a folder of its own, which it replaces as a whole, but got {out_dir}, and "
            f"{fault}. Give a new folder, such as {out_dir / 'package'}."
        )


def load_package(folder: str | Path, *, device: str | torch.device | None = None) -> SegmentationModel:
    """Return the model in `folder`, every byte checked; on the first GPU or the CPU unless said otherwise."""
    folder = Path(folder)
    info = read_info(folder)
    try:
        weights = (folder / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise DamagedPackageError(
            f"A model package must hold {WEIGHTS_FILE}, but {folder} has none to read ({error.strerror}). "
            "Download or package the model again."
        ) from error
    if hashlib.sha256(weights).hexdigest() != info["weights"]["sha256"]:
        raise DamagedPackageError(
            f"{folder / WEIGHTS_FILE} must have the sha256 that {MODEL_FILE} says, but its {len(weights)} "
            "bytes "
            "differ. Download or package the model again."
        )
    return _build(info, weights, folder, device=device)


def read_info(folder: str | Path) -> dict[str, Any]:
    """Return what the model.json of a package says."""
    folder = Path(folder)
    if not (folder / MODEL_FILE).is_file():
        raise InputError(
            "A model must be models:/name@alias, models:/name/version or the folder of a package, but there "
            "is no "
            f"{MODEL_FILE} in {folder}."
        )
    try:
        info = typed(dict[str, Any], parse_json((folder / MODEL_FILE).read_bytes(), "It"), "It")
        version = info["format"]
        if version == FORMAT:
            _check_info(info)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedPackageError(
            f"{folder / MODEL_FILE} must be the JSON of a model package, but cannot be read as one "
            f"({shown(error)}). "
            "Download or package the model again."
        ) from error
    if version != FORMAT:
        raise InputError(
            f"A model package must be of format {FORMAT}, but {folder} is of format {shown(version)}. Use the "
            "version of "
            "segfleet that wrote it."
        )
    return info


def digest(package_dir: str | Path) -> str:
    """Return the sha256 of the package's model.json, which holds that of the weights."""
    try:
        return hashlib.sha256((Path(package_dir) / MODEL_FILE).read_bytes()).hexdigest()
    except OSError as error:
        raise DamagedPackageError(
            f"A model package must hold {MODEL_FILE}, but {package_dir} has none to read. It is another kind "
            "of "
            "model, or damaged: register it again."
        ) from error


def model_card(info: Mapping[str, Any]) -> str:
    """Return the model card in Markdown."""
    architecture, scores = info["architecture"], info["scores"]
    lines = [
        "# PSPNet for semantic segmentation",
        "",
        f"{architecture['backbone']}, output stride {architecture['output_stride']}, "
        f"{architecture['num_classes']} classes, {_origin(info)}.",
        "",
    ]
    if scores:
        protocol = Scores.from_dict(scores).protocol
        lines += [
            f"mIoU {scores['miou']:.4f}, mean accuracy {scores['mean_accuracy']:.4f}, pixel accuracy "
            f"{scores['pixel_accuracy']:.4f} (protocol {protocol.digest}: {protocol}).",
            "",
            "| class | IoU |",
            "| --- | --- |",
            *(
                f"| {name} | {'does not occur' if iou is None else f'{iou:.4f}'} |"
                for name, iou in scores["class_iou"].items()
            ),
            "",
        ]
    lines += [
        "Use, where segfleet is installed:",
        "",
        "    python jobs/predict.py --model models:/NAME@champion --input PICTURES --output OUT",
        "",
        'or `segfleet.registry.fetch("models:/NAME@champion").predict(image)` for a uint8 RGB array of any '
        "size; it",
        "returns train ids. Values outside the kind of pictures it was trained on are not to be relied on.",
        "",
    ]
    return "\n".join(lines)


def _origin(info: Mapping[str, Any]) -> str:
    if "origin" in info:
        origin = info["origin"]
        return f"from {origin['file']} of {origin['of']} (sha256 {origin['sha256']})"
    where = f" in MLflow run {info['run_id']}" if info["run_id"] else ""
    return f"trained for {info['epoch']} epochs on store {info['store_digest'][:12]}{where}"


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"An image must be uint8 of shape (height, width, 3), but got {image.dtype} of shape {image.shape}. "
            "Convert it to RGB."
        )


def _validation_scores(state: Mapping[str, Any]) -> Scores | None:
    """Return the scores of the checkpoint's own validation: whole images at one scale."""
    metrics, config = state["metrics"], state["config"]
    if metrics.get("miou") is None:
        return None
    protocol = Protocol(
        store_digest=state["store_digest"],
        split=config["data"]["val_split"],
        precision=config["workers"]["precision"],
    )
    names = ("miou", "mean_accuracy", "pixel_accuracy", "class_iou")
    return Scores(protocol=protocol, **{name: metrics[name] for name in names})


def _check_info(info: Mapping[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError where a part that `_build` does not look at has another form."""
    for name, hint in _INFO.items():
        typed(hint, info[name], name)
    typed(str, info["weights"]["sha256"], "weights, sha256,")
    notation(info["config"]["data"]["crop_size"])
    if info["scores"] is not None:
        Scores.from_dict(info["scores"])


def _build(
    info: Mapping[str, Any], weights: bytes, folder: Path, *, device: str | torch.device | None
) -> SegmentationModel:
    """Return the model that the JSON describes with exactly the given weights."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        class_table = ClassTable.from_dict(info["class_table"])
        # Without memory first: a description may be of any size.
        shapes = built_without_content(lambda: PSPNet.from_architecture(info["architecture"])).state_dict()
        tensors = safetensors.torch.load(weights)
        if problems := key_differences(shapes, tensors):
            raise ValueError(f"{problems[:1000]}.")
        with WithoutDraws():
            network = PSPNet.from_architecture(info["architecture"])
        network.load_state_dict(tensors)
        mean, std = tuple(map(float, info["mean"])), tuple(map(float, info["std"]))
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise ValueError("mean and std must be three numbers, and std positive.")
    except MissingPackageError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise DamagedPackageError(
            f"{MODEL_FILE} and {WEIGHTS_FILE} in {folder} must describe one network, but do not fit "
            "together: "
            f"{_first_line(error)} Package the model again."
        ) from error
    if class_table.num_classes != network.num_classes:
        raise DamagedPackageError(
            f"{MODEL_FILE} in {folder} must have as many classes as its network, but got "
            f"{class_table.num_classes} "
            f"and {network.num_classes}. Package the model again."
        )
    return SegmentationModel(
        network=network.to(device).eval(),
        class_table=class_table,
        mean=mean,
        std=std,
        device=device,
        info=dict(info),
        source=str(folder),
    )


def _first_line(error: Exception) -> str:
    """Return what a library says, without its stack, and not at the length of what it says it about."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:1000]
