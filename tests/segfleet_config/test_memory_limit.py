"""Laws of fitting: the global batch stays, what is chosen fits, what cannot fit is refused with the numbers."""

import pytest

from pspnet.errors import InputError
from pspnet.memory import GIB
from segfleet.config import TrainingConfig
from segfleet.config_json import from_json, to_json
from segfleet.memory import fit_note, fitted, memory_table, peak_bytes, predicted
from segfleet.override import override
from segfleet.presets import training_preset

NUM_CLASSES = 5


@pytest.fixture
def config() -> TrainingConfig:
    """Crops whose activations outweigh the gradients: of smaller ones no parts take less than all at once."""
    changes = {"schedule.global_batch_size": 24, "workers.num_workers": 2, "data.crop_size": 193}
    return override(training_preset("tiny"), changes)


def peak_gib(config: TrainingConfig, num_images: int) -> float:
    return peak_bytes(config, predicted(config, NUM_CLASSES, num_images)) / GIB


def test_without_a_limit_nothing_is_counted_and_nothing_changes(config: TrainingConfig) -> None:
    assert fitted(config, NUM_CLASSES) is config
    stored = (
        to_json(config)
        .replace('"memory_gib": 0.0,', "")
        .replace('"memory_fit": [\n      1.0,\n      0.0\n    ],', "")
    )
    assert "memory" not in stored
    assert from_json(TrainingConfig, stored) == config


@pytest.mark.parametrize("num_images", [12, 6, 4, 3, 2])
@pytest.mark.parametrize("own_steps", [1, 2])
def test_the_most_images_that_fit_are_taken_and_the_global_batch_stays(
    config: TrainingConfig, num_images: int, own_steps: int
) -> None:
    limit = peak_gib(config, num_images) * 1.0001
    changes = {"workers.memory_gib": limit, "schedule.accumulation_steps": own_steps}
    chosen = fitted(override(config, changes), NUM_CLASSES)
    assert chosen.micro_batch_size == min(num_images, 12 // own_steps)
    assert chosen.micro_batch_size * chosen.schedule.accumulation_steps * chosen.workers.num_workers == 24
    assert peak_gib(chosen, chosen.micro_batch_size) <= limit
    assert override(chosen, {"schedule.accumulation_steps": own_steps}) == override(config, changes)


def test_what_cannot_fit_is_refused_with_the_numbers_and_batch_norm_keeps_two_images(
    config: TrainingConfig,
) -> None:
    for norm, least in (("batch", 2), ("group", 1)):
        of_norm = override(config, {"model.norm": norm, "schedule.global_batch_size": 8})
        below = override(of_norm, {"workers.memory_gib": peak_gib(of_norm, least) * 0.999})
        with pytest.raises(
            InputError, match=rf"memory_gib .*{least} at a time [\d.]+ GiB\. Lower"
        ) as refused:
            fitted(below, NUM_CLASSES)
        assert f"4 at a time {peak_gib(of_norm, 4):.2f} GiB" in str(refused.value)


def test_what_a_device_takes_more_counts(config: TrainingConfig) -> None:
    once = peak_gib(config, 2)
    doubled = override(config, {"workers.memory_fit": (2.0, 0.5)})
    assert peak_gib(doubled, 2) == pytest.approx(2 * once + 0.5, abs=1e-6)
    averaged = override(config, {"optim.ema_decay": 0.9})
    assert peak_gib(averaged, 2) > once > peak_gib(override(config, {"workers.num_workers": 1}), 2)
    assert f"{once:.2f}" in memory_table(config, NUM_CLASSES)


def test_gradients_of_earlier_parts_and_the_images_of_all_are_counted(config: TrainingConfig) -> None:
    whole, parts = (
        predicted(override(config, {"schedule.global_batch_size": batch}), NUM_CLASSES, 2)
        for batch in (4, 24)
    )
    assert parts.peak - whole.peak > 10 * 193 * 193 * (3 * 4 + 8) + parts.gradients / 2
    hard = override(config, {"loss.ohem_threshold": 0.7, "loss.class_balance": "median"})
    assert predicted(hard, NUM_CLASSES, 2).peak >= parts.peak


def test_kernels_of_a_cpu_with_one_thread_are_counted(
    config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pspnet.kernels.multiplies_matrices_fast", lambda: True)
    wide = override(config, {"model.backbone": "resnet18", "model.head_channels": 512})
    one, two, gpu, compiled = (
        predicted(override(wide, {f"workers.{name}": value}), NUM_CLASSES, 2).peak
        for name, value in (
            ("cpus_per_worker", 1),
            ("cpus_per_worker", 2),
            ("use_gpu", True),
            ("compile", True),
        )
    )
    assert one > 1.1 * two
    assert two == gpu == compiled


def test_frozen_batch_norm_is_tried_with_a_single_image(config: TrainingConfig) -> None:
    frozen = override(config, {"model.freeze_batch_norm": "all"})
    assert memory_table(frozen, NUM_CLASSES).splitlines()[-1].split()[:2] == ["1", "12"]
    assert memory_table(config, NUM_CLASSES).splitlines()[-1].split()[:2] == ["2", "6"]
    limited = override(frozen, {"workers.memory_gib": peak_gib(frozen, 1) * 1.0001})
    assert fitted(limited, NUM_CLASSES).micro_batch_size == 1


def test_a_prediction_that_was_never_fitted_to_its_gpu_says_so(config: TrainingConfig) -> None:
    on_gpus = override(config, {"workers.use_gpu": True})
    assert "run jobs/predict_memory.py there" in fit_note(on_gpus)
    assert fit_note(config) == fit_note(override(on_gpus, {"workers.memory_fit": (1.1, 0.5)})) == ""
