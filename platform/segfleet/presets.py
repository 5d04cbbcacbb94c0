"""Whole configurations as functions, each a note: where it is from, what it should reach, what it costs."""

from collections.abc import Callable

from pspnet.errors import InputError
from segfleet.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    SearchConfig,
    SpaceConfig,
    TrackingConfig,
    TrainingConfig,
    WorkersConfig,
)


def tiny() -> TrainingConfig:
    """Seconds on two cores: two workers, two epochs of two iterations. For tests and for a first look."""
    return TrainingConfig(
        data=DataConfig(crop_size=65, min_scale=0.5, max_scale=1.0),
        model=ModelConfig(backbone="resnet18", head_channels=32),
        schedule=ScheduleConfig(num_epochs=2, global_batch_size=4, max_iterations_per_epoch=2),
        workers=WorkersConfig(num_workers=2),
        tracking=TrackingConfig(experiment_name="tiny"),
    )


def demo() -> TrainingConfig:
    """The drawn street scenes of `make demo`: ResNet-18 from random weights, two workers, a minute on two cores."""
    return TrainingConfig(
        data=DataConfig(store="demo/store", crop_size=129, min_scale=0.5, max_scale=1.25),
        model=ModelConfig(backbone="resnet18", head_channels=128),
        optim=OptimConfig(base_lr=0.02, head_lr_factor=2.0),
        schedule=ScheduleConfig(num_epochs=9, global_batch_size=8),
        workers=WorkersConfig(num_workers=2),
        tracking=TrackingConfig(
            experiment_name="demo", registered_model_name="pspnet-demo", storage_dir="demo/runs"
        ),
    )


def folder_resnet18() -> TrainingConfig:
    """A first model of one's own folder of images and labels on two cores; not tuned, no published score."""
    return TrainingConfig(
        data=DataConfig(crop_size=257, min_scale=0.5, max_scale=1.5),
        model=ModelConfig(backbone="resnet18", head_channels=128),
        optim=OptimConfig(base_lr=0.02, head_lr_factor=2.0),
        schedule=ScheduleConfig(num_epochs=20, global_batch_size=8),
        workers=WorkersConfig(num_workers=2),
        tracking=TrackingConfig(experiment_name="folder"),
    )


def cityscapes_semseg_r50() -> TrainingConfig:
    """PSPNet50 on Cityscapes as github.com/hszhao/semseg trains it (config/cityscapes/cityscapes_pspnet50.yaml).

    Published: val mIoU 77.30 (sliding window 2/3, single scale with flip), 78.38 (multi-scale).
    Cost: 56 GPU hours in 2019 (8 GPUs). Not yet reproduced here.
    Command: python jobs/train_cityscapes.py --preset cityscapes_semseg_r50 --data.store STORE
    """
    return TrainingConfig(
        data=DataConfig(
            crop_size=713, min_scale=0.5, max_scale=2.0, rotate_degrees=10.0, blur_probability=0.5
        ),
        model=ModelConfig(backbone="resnet50", backbone_weights="imagenet"),
        optim=OptimConfig(base_lr=0.01, head_lr_factor=10.0, weight_decay=1e-4),
        schedule=ScheduleConfig(num_epochs=200, global_batch_size=16),
        workers=WorkersConfig(num_workers=8, use_gpu=True, cpus_per_worker=4, precision="bf16"),
        tracking=TrackingConfig(experiment_name="cityscapes", registered_model_name="pspnet-cityscapes"),
    )


def nyuv2_r50() -> TrainingConfig:
    """PSPNet50 on the 795 training images of NYU Depth V2, 40 classes.

    Nobody publishes a PSPNet; RGB neighbours are 41.7 to 44.4 mIoU. Not yet reproduced here.
    Command: python jobs/train_cityscapes.py --preset nyuv2_r50 --data.store STORE
    """
    return TrainingConfig(
        data=DataConfig(crop_size=473, min_scale=0.5, max_scale=2.0),
        model=ModelConfig(backbone="resnet50", backbone_weights="imagenet"),
        optim=OptimConfig(base_lr=0.01, head_lr_factor=10.0, weight_decay=1e-4),
        schedule=ScheduleConfig(num_epochs=200, global_batch_size=16),
        workers=WorkersConfig(num_workers=4, use_gpu=True, cpus_per_worker=4, precision="bf16"),
        tracking=TrackingConfig(experiment_name="nyuv2", registered_model_name="pspnet-nyuv2"),
    )


PRESETS: dict[str, Callable[[], TrainingConfig]] = {
    preset.__name__: preset for preset in (tiny, demo, folder_resnet18, cityscapes_semseg_r50, nyuv2_r50)
}


def training_preset(name: str) -> TrainingConfig:
    """Return the training configuration of that name."""
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}. There are: {', '.join(PRESETS)}.")
    return PRESETS[name]()


def search_preset(name: str) -> SearchConfig:
    """Return the search around the training preset of that name."""
    training = training_preset(name)
    crop_size = training.data.crop_size
    smaller = (crop_size * 2 // 3) // 8 * 8 + 1
    middle = (crop_size * 5 // 6) // 8 * 8 + 1
    space = SpaceConfig(
        min_base_lr=training.optim.base_lr / 10,
        max_base_lr=training.optim.base_lr * 10,
        crop_sizes=tuple(size for size in (smaller, middle, crop_size) if size >= 33),
    )
    if name in ("tiny", "demo"):
        return SearchConfig(training=training, space=space, study=name, num_trials=6, num_startup_trials=3)
    return SearchConfig(training=training, space=space, study=name)
