"""Whether a training fits on its devices, and in how many parts a worker takes its images so that it does."""

import functools
from dataclasses import replace

import torch

from pspnet.distributed import use_cpu_kernels
from pspnet.errors import InputError
from pspnet.freezing import freeze
from pspnet.loss import CrossEntropy
from pspnet.memory import GIB, Fit, StepMemory, step_memory
from pspnet.model import PSPNet, refuse_single_values
from pspnet.recomputation import recompute_blocks
from pspnet.sizes_alone import built_without_content
from segfleet.config import LossConfig, ModelConfig, Precision, TrainingConfig, WorkersConfig
from segfleet.override import override


def network_of(config: ModelConfig, num_classes: int) -> PSPNet:
    """Return the network that `config` describes, with random weights."""
    return PSPNet(
        num_classes,
        backbone=config.backbone,
        output_stride=config.output_stride,
        bin_sizes=config.bin_sizes,
        head_channels=config.head_channels,
        dropout=config.dropout,
        has_aux_head=config.has_aux_head,
        deep_stem=config.deep_stem,
        deep_stem_channels=config.deep_stem_channels,
        contract_dilation=config.contract_dilation,
        dilations=config.dilations,
        dilate_first_only=config.dilate_first_only,
        branch_channels=config.branch_channels,
        aux_channels=config.aux_channels,
        norm="group" if config.norm == "group" else "batch",
        align_corners=config.align_corners,
    )


def fitted(config: TrainingConfig, num_classes: int) -> TrainingConfig:
    """Return `config` with the fewest accumulation steps, its own at least, that fit in workers.memory_gib.

    The global batch stays: images at a time * accumulation steps * workers. InputError, with the numbers, where no
    number of steps fits. Without workers.memory_gib it is `config` itself.
    """
    share, allowed = config.per_worker_batch_size, config.workers.memory_gib * GIB
    if not allowed:
        return config
    tried: list[str] = []
    for steps in range(config.schedule.accumulation_steps, share + 1):
        if share % steps or (tried and not _can_train_on(config, num_classes, share // steps)):
            continue
        taken = peak_bytes(config, predicted(config, num_classes, share // steps))
        if taken <= allowed:
            return override(config, {"schedule.accumulation_steps": steps})
        tried.append(f"{share // steps} at a time {taken / GIB:.2f} GiB")
    raise InputError(
        f"A worker's training step must fit in workers.memory_gib {config.workers.memory_gib:g}, but the {share} "
        f"images of {config.model.backbone} with data.crop_size {config.data.crop_size} in {config.workers.precision} "
        f"are predicted to take: {', '.join(tried)}. Lower data.crop_size or schedule.global_batch_size, set "
        "workers.recompute, or train with more workers."
    )


def predicted(config: TrainingConfig, num_classes: int, num_images: int | None = None) -> StepMemory:
    """Return what a worker's tensors take where it takes its share of a batch `num_images` at a time.

    By default they are the configuration's.
    """
    num_images = num_images or config.micro_batch_size
    return _predicted(
        config.model,
        config.loss,
        config.data.crop_size,
        config.workers.precision,
        config.workers.recompute,
        None if config.workers.use_gpu else (config.workers.compile, config.workers.cpus_per_worker),
        num_classes,
        num_images,
        config.per_worker_batch_size // num_images,
    )


def peak_bytes(config: TrainingConfig, memory: StepMemory) -> int:
    """Return what a step is predicted to take on the device, with the buffers of DDP and the moving average."""
    beside = memory.gradients if config.workers.num_workers > 1 else 0
    beside += memory.weights if config.optim.ema_decay else 0
    factor, constant_gib = config.workers.memory_fit
    return Fit(factor, constant_gib * GIB).peak_bytes(memory) + round(factor * beside)


def fit_note(config: TrainingConfig) -> str:
    """Return what a prediction for GPUs lacks that was not fitted to one; "" for any other."""
    if not config.workers.use_gpu or config.workers.memory_fit != WorkersConfig().memory_fit:
        return ""
    return (
        "tensors only, not fitted to this device (workspaces, gaps between tensors): run jobs/predict_memory.py there "
        "and give the --workers.memory-fit that it prints; CUDA's context and NCCL come beside, leave about 1 GiB"
    )


def memory_table(config: TrainingConfig, num_classes: int) -> str:
    """Return the prediction for every number of images that a worker can take at a time, one a line."""
    share = config.per_worker_batch_size
    lines = [f"{'images':>6} {'steps':>6} {'weights':>9} {'activations':>12} {'peak':>9}   GiB of a worker"]
    for steps in range(1, share + 1):
        if share % steps == 0 and _can_train_on(config, num_classes, share // steps):
            memory = predicted(config, num_classes, share // steps)
            values = (memory.weights, memory.activations, peak_bytes(config, memory))
            weights, activations, peak = (f"{value / GIB:.2f}" for value in values)
            lines.append(f"{share // steps:>6} {steps:>6} {weights:>9} {activations:>12} {peak:>9}")
    return "\n".join(lines)


@functools.lru_cache(maxsize=256)
def _predicted(
    config: ModelConfig,
    loss: LossConfig,
    crop_size: int | str,
    precision: Precision,
    is_recomputed: bool,
    on_cpu: tuple[bool, int] | None,
    num_classes: int,
    num_images: int,
    accumulation_steps: int,
) -> StepMemory:
    def build() -> PSPNet:
        model = _frozen_network(config, num_classes)
        if is_recomputed:
            recompute_blocks(model)
        if on_cpu:
            compiled, num_threads = on_cpu
            use_cpu_kernels(model, compiled=compiled, num_threads=num_threads)
        return model

    has_weights = bool(loss.class_weights) or loss.class_balance != "none"
    step = functools.partial(
        step_memory,
        build,
        crop_size,
        precision=precision,
        accumulation_steps=accumulation_steps,
        cross_entropy=CrossEntropy(
            label_smoothing=loss.label_smoothing,
            class_weights=torch.ones(num_classes) if has_weights else None,
            ohem_threshold=loss.ohem_threshold,
        ),
    )
    if num_images > 1 or config.norm == "group" or config.freeze_batch_norm == "all":
        return step(num_images=num_images)
    # BatchNorm that is trained takes a single image only as SyncBatchNorm, which only GPUs have, or without the 1x1
    # bin: what three images take more than two is taken off two.
    two, three = step(num_images=2), step(num_images=3)
    return replace(two, activations=2 * two.activations - three.activations, peak=2 * two.peak - three.peak)


def _frozen_network(config: ModelConfig, num_classes: int) -> PSPNet:
    model = network_of(config, num_classes)
    freeze(model, num_stages=config.freeze_stages, batch_norm=config.freeze_batch_norm)
    return model


def _can_train_on(config: TrainingConfig, num_classes: int, num_images: int) -> bool:
    """Whether BatchNorm that is trained has more than one value where a worker takes so many images at a time."""
    workers = config.workers
    if workers.use_gpu and workers.num_workers > 1 and config.model.norm != "batch":
        return True
    model = built_without_content(lambda: _frozen_network(config.model, num_classes))
    try:
        refuse_single_values(model, num_images)
    except InputError:
        return False
    return True
