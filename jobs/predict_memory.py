"""Print what a training step of a configuration takes, for every number of images a worker can take at a time.

Nothing is trained. On a GPU a few steps are measured first, and the setting is printed that makes predictions what
torch's allocator reserves there; CUDA's context and NCCL come beside it, about 1 GiB.
"""

import torch

from pspnet.memory import GIB, measure_fit
from pspnet.store import Store
from segfleet.cli import parse_training, run_job
from segfleet.memory import fit_note, fitted, memory_table, network_of
from segfleet.override import override
from segfleet.presets import training_preset

NUM_CLASSES = 19
"""Taken where no store is named: those of Cityscapes."""


def main() -> None:
    """Predict, and say in how many parts a worker would take its images."""
    config = parse_training(training_preset, "cityscapes_semseg_r50", description=__doc__ or "")
    num_classes = Store.open(config.data.store).class_table.num_classes if config.data.store else NUM_CLASSES
    if config.workers.use_gpu and torch.cuda.is_available():
        fit = measure_fit(
            lambda: network_of(config.model, num_classes), "cuda", precision=config.workers.precision
        )
        config = override(config, {"workers.memory_fit": (fit.factor, fit.constant / GIB)})
        print(f"measured here: --workers.memory-fit {fit.factor:.3f} {fit.constant / GIB:.3f}")
    if note := fit_note(config):
        print(note)
    print(
        f"{config.model.backbone}, crop {config.data.crop_size}, {config.workers.precision}, "
        f"{config.schedule.global_batch_size} images on {config.workers.num_workers} workers"
    )
    print(memory_table(config, num_classes))
    if config.workers.memory_gib:
        chosen = fitted(config, num_classes)
        print(
            f"in {config.workers.memory_gib:g} GiB: {chosen.micro_batch_size} images at a time x "
            f"{chosen.schedule.accumulation_steps} steps x {chosen.workers.num_workers} workers"
        )


if __name__ == "__main__":
    run_job(main, goes_on=False)
