"""What a configuration describes, built: the network with its initial weights, the loss, what a step costs."""

import torch

from pspnet.class_weights import class_weights
from pspnet.errors import InputError
from pspnet.flops import Arithmetic, peak_flops, training_flops
from pspnet.freezing import freeze
from pspnet.loss import CrossEntropy
from pspnet.model import PSPNet
from pspnet.published import load_network_weights
from pspnet.sizes_alone import built_without_content
from pspnet.store import Store
from pspnet.weights import load_backbone_weights
from segfleet.config import TrainingConfig
from segfleet.memory import network_of


def new_model(config: TrainingConfig, num_classes: int) -> PSPNet:
    """Return the network that `config.model` describes, with its initial weights, parts of it frozen."""
    return _prepared(network_of(config.model, num_classes), config)


def sizes_of_model(config: TrainingConfig, num_classes: int) -> PSPNet:
    """Return the network of `new_model` on the device "meta": files of weights are checked, no memory is taken.

    A network that does not fit here may fit where it is trained; where it does not, the training ends as oom.
    """
    return _prepared(built_without_content(lambda: network_of(config.model, num_classes)), config)


def _prepared(model: PSPNet, config: TrainingConfig) -> PSPNet:
    load_backbone_weights(model, config.model.backbone_weights)
    load_network_weights(model, config.model.weights)
    freeze(model, num_stages=config.model.freeze_stages, batch_norm=config.model.freeze_batch_norm)
    return model


def arithmetic_of(
    config: TrainingConfig, model: PSPNet, device: torch.device, num_workers: int
) -> Arithmetic:
    """Return what a training image costs and what the devices of all workers, taken to be alike, could do."""
    peak = config.workers.peak_tflops * 1e12 or None
    if peak is None and device.type == "cuda":
        peak = peak_flops(
            torch.cuda.get_device_name(device),
            config.workers.precision,
            is_tf32=torch.backends.cudnn.allow_tf32,
        )
    flops = training_flops(
        model,
        config.data.crop_size,
        num_frozen_stages=config.model.freeze_stages,
        frozen_batch_norm=config.model.freeze_batch_norm,
    )
    return Arithmetic(flops_per_image=flops, peak_flops=None if peak is None else peak * num_workers)


def new_cross_entropy(
    config: TrainingConfig, store: Store, device: torch.device | str = "cpu"
) -> CrossEntropy:
    """Return the loss that `config.loss` describes; InputError where its weights do not fit the store's classes."""
    loss, names = config.loss, store.class_table.class_names
    weights = list(loss.class_weights)
    if loss.class_balance != "none":
        counts = store.manifest.class_counts(config.data.train_split)[:-1]
        weights = class_weights(counts, loss.class_balance)
    if weights and len(weights) != len(names):
        raise InputError(
            f"loss.class_weights must have one weight for each of the {len(names)} classes of the store, but got "
            f"{len(weights)}. The classes are, in this order: {', '.join(names)}."
        )
    return CrossEntropy(
        label_smoothing=loss.label_smoothing,
        class_weights=torch.tensor(weights, device=device) if weights else None,
        ohem_threshold=loss.ohem_threshold,
        ohem_min_kept=loss.ohem_min_kept,
    )
