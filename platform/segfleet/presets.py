"""Whole configurations as functions, each a note: where it is from, what it should reach, what it costs."""

from collections.abc import Callable
from dataclasses import replace

from pspnet.errors import InputError
from pspnet.sizes import notation, sides
from segfleet.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
    WorkersConfig,
)
from segfleet.search_config import SearchConfig, SpaceConfig


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


def folder_mobilenetv2() -> TrainingConfig:
    """MobileNetV2 (Sandler et al., CVPR 2018) from ImageNet weights on one's own folder of images and labels.

    Not tuned. Output stride 16: a quarter of the cells of 8. On CamVid: `camvid_mobilenetv2`.
    Published: nothing for a folder of one's own. For orientation, on Cityscapes val mmsegmentation has mIoU 70.23 at
    output stride 8 (mobilenet-v2-d8_pspnet_4xb2-80k_cityscapes-512x1024.py; whole image, single scale without flip).
    Cost: not measured here; `camvid_mobilenetv2` says what its 2.5 times as many epochs take. Not reproduced here.
    Other than there: output stride and dilations, crop, schedule and the head's channels. The weights are downloaded,
    or a file: --model.backbone-weights FILE.
    Command: python jobs/train_cityscapes.py --preset folder_mobilenetv2 --data.store STORE
    """
    return TrainingConfig(
        data=DataConfig(crop_size=257, min_scale=0.5, max_scale=1.5),
        model=ModelConfig(
            backbone="mobilenet_v2", backbone_weights="imagenet", output_stride=16, head_channels=128
        ),
        optim=OptimConfig(base_lr=0.01, head_lr_factor=10.0),
        schedule=ScheduleConfig(num_epochs=20, global_batch_size=8),
        workers=WorkersConfig(num_workers=2),
        tracking=TrackingConfig(experiment_name="folder"),
    )


def camvid_mobilenetv2() -> TrainingConfig:
    """MobileNetV2 (Sandler et al., CVPR 2018) from ImageNet weights on CamVid's 367 training images, 11 classes.

    Published: nothing that is known here for this network and split; the settings are our own.
    Reached here: val mIoU 0.627 (seeds 0 to 2: 0.618 to 0.638), whole image, single scale without flip. The
    validation split is one clip of alike pictures: scores on it are optimistic. What the pyramid, the auxiliary loss
    and the weights are worth: benchmarks/README.md (parts.py). Poles, a cell wide, are not found at all.
    Cost: 22 minutes with both of two CPU cores to itself, 54 and 78 beside other programs. The weights are downloaded,
    or a file: --model.backbone-weights FILE.
    Command: python jobs/train_cityscapes.py --preset camvid_mobilenetv2 --data.store STORE
    """
    base = folder_mobilenetv2()
    return replace(
        base,
        data=replace(base.data, crop_size=353, min_scale=0.75, max_scale=2.0),
        schedule=replace(base.schedule, num_epochs=50, evaluate_every_epochs=5),
        workers=replace(base.workers, precision="bf16"),
    )


def cityscapes_semseg_r50() -> TrainingConfig:
    """PSPNet50 on Cityscapes as github.com/hszhao/semseg trains it (config/cityscapes/cityscapes_pspnet50.yaml).

    Parameter groups, learning rates, ranges of the augmentation and the losses of 20 steps are semseg's (a test).
    Published: val mIoU 77.30 (sliding window 713, stride 2/3, single scale with flip), 78.38 (scales 0.5 to 1.75).
    Cost: 56 GPU hours in 2019 (7 h on 8 RTX 2080 Ti). Not reproduced here.
    Other than there: torchvision's ImageNet weights and plain stem, which can be downloaded. With theirs
    (initmodel/resnet50_v2.pth): --model.deep-stem True --model.backbone-weights FILE. Images are normalised with the
    store's own mean and deviation, not ImageNet's; bf16 instead of fp32. 185 iterations an epoch, 37,000 in all, theirs
    186 and 37,200, since one image more fills their last batch, so that our rates are up to 9.0e-5 (the heads' 9.0e-4)
    lower, at the end; the loss is divided by the valid pixels of all GPUs, theirs is the mean of eight GPUs' means.
    A crop is turned about its own centre and blurred with its border reflected, theirs is cut out of the whole image,
    turned about that one's centre and blurred; a scaled label takes the pixel nearest to each centre, theirs the one at
    or before it.
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


def cityscapes_semseg_r101() -> TrainingConfig:
    """PSPNet101 on Cityscapes as semseg trains it (config/cityscapes/cityscapes_pspnet101.yaml).

    Published: val mIoU 78.63 (sliding window 713, stride 2/3, single scale with flip), 79.29 (scales 0.5 to 1.75).
    Cost: 80 GPU hours in 2019 (10 h on 8 RTX 2080 Ti). Not reproduced here.
    Other than there: as `cityscapes_semseg_r50`; their weights are initmodel/resnet101_v2.pth.
    Command: python jobs/train_cityscapes.py --preset cityscapes_semseg_r101 --data.store STORE
    """
    base = cityscapes_semseg_r50()
    return replace(base, model=replace(base.model, backbone="resnet101"))


def cityscapes_mmseg_r50_769() -> TrainingConfig:
    """PSPNet50 on Cityscapes as mmsegmentation 1.2 trains it (pspnet_r50-d8_4xb2-80k_cityscapes-769x769.py).

    Settings, parameter groups, learning rates, ranges of the augmentation and losses of 20 steps are theirs (a test).
    Published: val mIoU 79.59 (sliding window 769, stride 513, single scale without flip), 80.69 (six scales, flip).
    Cost: published as 4 V100; their log has the hours. Not reproduced here.
    Other than there: 216 epochs of 371 iterations are 80,136 instead of 80,000, so that the last rates are up to 3.2e-5
    higher; each epoch leaves 7 other images out, theirs none. torchvision's weights in place of
    open-mmlab's resnet50_v1c, with which (resnet50_v1c-2cccc1ad.pth) it would be --model.deep-stem True
    --model.deep-stem-channels 64 --model.backbone-weights FILE. The loss is divided by the valid pixels, theirs by all
    (avg_non_ignore False); images are scaled from 2048x1024, theirs from 2049x1025, and normalised with the store's
    mean and deviation, theirs with ImageNet's; bf16 instead of fp32. A scaled image lower than the crop lies in its
    middle, theirs at its top; a scaled label takes the pixel nearest to each centre, theirs the one at or before it.
    The heads begin with torch's own random weights, theirs with normal ones: He's by the outputs, and of deviation 0.01
    in the classifiers, whose biases are 0.
    Command: python jobs/train_cityscapes.py --preset cityscapes_mmseg_r50_769 --data.store STORE
    """
    return TrainingConfig(
        data=DataConfig(crop_size=769, min_scale=0.5, max_scale=2.0, photometric=True, max_class_share=0.75),
        model=ModelConfig(backbone="resnet50", backbone_weights="imagenet", contract_dilation=True),
        optim=OptimConfig(base_lr=0.01, head_lr_factor=1.0, weight_decay=5e-4, min_lr=1e-4),
        schedule=ScheduleConfig(num_epochs=216, global_batch_size=8, evaluate_every_epochs=8),
        workers=WorkersConfig(num_workers=4, use_gpu=True, cpus_per_worker=4, precision="bf16"),
        tracking=TrackingConfig(experiment_name="cityscapes", registered_model_name="pspnet-cityscapes"),
    )


def cityscapes_mmseg_r50_512x1024() -> TrainingConfig:
    """PSPNet50 on Cityscapes as mmsegmentation 1.2 trains it (pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py).

    Settings, parameter groups, learning rates, ranges of the augmentation and losses of 20 steps are theirs (a test).
    Published: val mIoU 78.55 (whole image, single scale without flip), 79.79 (six scales, flip).
    Cost: published as 4 V100; their log has the hours. Not reproduced here.
    Other than there: as `cityscapes_mmseg_r50_769`, but that theirs, too, are scaled from 2048x1024, where no image is
    lower than the crop. As there, cells are spread evenly over the pixels (align_corners False), which keeps the logits
    of every pixel in memory.
    Command: python jobs/train_cityscapes.py --preset cityscapes_mmseg_r50_512x1024 --data.store STORE
    """
    base = cityscapes_mmseg_r50_769()
    return replace(
        base,
        data=replace(base.data, crop_size="512x1024"),
        model=replace(base.model, align_corners=False),
    )


def cityscapes_paddle_r101() -> TrainingConfig:
    """PSPNet101 on Cityscapes after PaddleSeg (pspnet_resnet101_os8_cityscapes_1024x512_80k.yml).

    Published: val mIoU 80.48 (whole image, single scale without flip), 81.04 (scales and flip). Their backbone was
    distilled (resnet101_vd_ssld), which no published weights for torch are: expect less.
    Cost: not published; about 80,000 iterations of 8 images of 1024x512. Not reproduced here.
    Other than there: any scale between 0.5 and 2 instead of steps of 0.25, mmsegmentation's
    photometric distortion instead of RandomDistort 0.4; 216 epochs are 80,136 iterations; images are normalised
    with the store's mean and deviation. ResNet-101-vd is timm's resnet101d (pip install 'segfleet[timm]'), where the
    first block of a dilated stage has half its dilation, theirs all of it, and the shortcut around that block averages
    2x2 cells first, theirs none. Dropout takes whole channels of the heads' features, theirs single values.
    Command: python jobs/train_cityscapes.py --preset cityscapes_paddle_r101 --data.store STORE
    """
    return TrainingConfig(
        data=DataConfig(crop_size="512x1024", min_scale=0.5, max_scale=2.0, photometric=True),
        model=ModelConfig(
            backbone="timm:resnet101d", backbone_weights="imagenet", align_corners=False, head_channels=1024
        ),
        optim=OptimConfig(base_lr=0.01, head_lr_factor=1.0, weight_decay=4e-5, min_lr=1e-5),
        schedule=ScheduleConfig(num_epochs=216, global_batch_size=8, evaluate_every_epochs=8),
        workers=WorkersConfig(num_workers=4, use_gpu=True, cpus_per_worker=4, precision="bf16"),
        tracking=TrackingConfig(experiment_name="cityscapes", registered_model_name="pspnet-cityscapes"),
    )


def nyuv2_r50() -> TrainingConfig:
    """PSPNet50 on the 795 training images of NYU Depth V2, 40 classes.

    Published: no PSPNet. For orientation, Light-Weight RefineNet has mIoU 41.7 with ResNet-50 and 44.4 with ResNet-152
    from RGB alone (Nekrasov et al., BMVC 2018; github.com/DrSleep/light-weight-refinenet; whole image, single scale).
    Cost: not measured here; 9,800 iterations of 16 crops of 473. Not reproduced here.
    Other than there: all but data and backbone; the settings are those of `cityscapes_semseg_r50` without its rotation
    and blur, with the crop that semseg takes for data other than Cityscapes.
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
    preset.__name__: preset
    for preset in (
        tiny,
        demo,
        folder_resnet18,
        folder_mobilenetv2,
        camvid_mobilenetv2,
        cityscapes_semseg_r50,
        cityscapes_semseg_r101,
        cityscapes_mmseg_r50_769,
        cityscapes_mmseg_r50_512x1024,
        cityscapes_paddle_r101,
        nyuv2_r50,
    )
}


def training_preset(name: str) -> TrainingConfig:
    """Return the training configuration of that name."""
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}. There are: {', '.join(PRESETS)}.")
    return PRESETS[name]()


def search_preset(name: str) -> SearchConfig:
    """Return the search around the training preset of that name."""
    training = training_preset(name)
    crop_size, stride = training.data.crop_size, training.model.output_stride
    smaller, middle = (
        notation((height, width))
        for height, width in (
            [side * share // 6 // stride * stride + side % stride for side in sides(crop_size)]
            for share in (4, 5)
        )
    )
    space = SpaceConfig(
        min_base_lr=training.optim.base_lr / 10,
        max_base_lr=training.optim.base_lr * 10,
        crop_sizes=tuple(size for size in (smaller, middle, crop_size) if min(sides(size)) >= 33),
    )
    if name in ("tiny", "demo"):
        return SearchConfig(
            training=training, space=space, study=name, num_trials=6, num_startup_trials=3, num_finalists=0
        )
    return SearchConfig(training=training, space=space, study=name)
