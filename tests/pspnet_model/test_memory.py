"""Laws of the memory model: what is predicted without computing is what a real step keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pspnet.data import Batch
from pspnet.distributed import use_cpu_kernels
from pspnet.inference import Precision, autocast
from pspnet.loss import PLAIN, CrossEntropy
from pspnet.memory import Fit, LiveBytes, count_step, fit_line, measure_fit, step_memory
from pspnet.model import PSPNet
from pspnet.recomputation import recompute_blocks
from pspnet.sizes import Size, sides
from pspnet.transforms import Window
from tests.pspnet_model import engine_workers

AS_MMSEGMENTATION: dict[str, dict[str, Any]] = {
    "mobilenet_v2": {"dilate_first_only": True, "branch_channels": 512, "aux_channels": 256},
    "resnet18": {"dilate_first_only": True, "contract_dilation": True},
    "resnet50": {"output_stride": 32, "dilations": (1, 1, 2, 4), "contract_dilation": True},
}
CASES: list[tuple[str, Size, int, Precision]] = [
    ("resnet18", 65, 2, "fp32"),
    ("resnet18", "65x97", 3, "bf16"),
    ("resnet50", 65, 2, "bf16"),
    ("resnet50", 97, 2, "fp32"),
    ("mobilenet_v2", 97, 2, "fp32"),
    ("mmsegmentation's resnet18", 65, 2, "fp32"),
    ("mmsegmentation's mobilenet_v2", 97, 2, "fp32"),
    ("mmsegmentation's resnet50", 161, 2, "bf16"),
]


def builder(backbone: str) -> Callable[[], PSPNet]:
    name = backbone.split()[-1]
    options = AS_MMSEGMENTATION[name] if name != backbone else {}
    return lambda: PSPNet(19, backbone=name, head_channels=64, **options)


def saved_bytes(model: PSPNet, crop_size: Size, num_images: int, precision: Precision) -> int:
    """Return the bytes of all storages that a real forward pass saves for the backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    images = torch.randn(num_images, 3, *sides(crop_size)).contiguous(memory_format=torch.channels_last)
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast("cpu", precision):
        output = model.train()(images, upsample=False)
    assert output.aux_logits is not None
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize(("backbone", "crop_size", "num_images", "precision"), CASES)
def test_predicted_activations_are_the_bytes_that_a_real_pass_saves(
    backbone: str, crop_size: Size, num_images: int, precision: Precision
) -> None:
    """Within 3 %: images, target, logits and the loss's gradient are counted, but not saved by the network."""
    predicted = step_memory(builder(backbone), crop_size, num_images, precision=precision)
    saved = saved_bytes(builder(backbone)(), crop_size, num_images, precision)
    assert predicted.activations == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize(("backbone", "crop_size", "num_images", "precision"), CASES)
def test_a_step_on_sizes_alone_is_a_real_step(
    backbone: str, crop_size: Size, num_images: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the loss that a GPU takes; a CPU's, which takes no more, has no kernels for sizes alone."""
    predicted = step_memory(builder(backbone), crop_size, num_images, precision=precision)
    on_cpu = count_step(builder(backbone)(), crop_size, num_images, precision=precision)
    assert on_cpu.peak <= 1.002 * predicted.peak
    monkeypatch.setattr("pspnet.loss._HAS_NUMBA", False)
    real = count_step(builder(backbone)(), crop_size, num_images, precision=precision)
    assert (predicted.weights, predicted.gradients) == (real.weights, real.gradients)
    assert predicted.activations == pytest.approx(real.activations, rel=0.002)
    assert predicted.peak == pytest.approx(real.peak, rel=0.002)


def engines_peak(
    model: PSPNet, side: int, num_images: int, accumulation_steps: int, cross_entropy: CrossEntropy
) -> int:
    """Return the most bytes that live in the second iteration of a real training on so many images at a time."""
    share = num_images * accumulation_steps
    optimizer = engine_workers.new_optimizer(model)
    batch = Batch(
        torch.zeros(4 * share, dtype=torch.uint8), [Window(0, 0, 1, 1)] * share, [], ["image"] * share
    )

    def prepare(batch: Batch) -> tuple[Tensor, Tensor]:
        images = torch.randn(share, 3, side, side).contiguous(memory_format=torch.channels_last)
        return images, torch.zeros(share, side, side, dtype=torch.int64)

    def iterate() -> None:
        engine_workers.train(
            model,
            [batch],
            optimizer=optimizer,
            prepare=prepare,
            accumulation_steps=accumulation_steps,
            cross_entropy=cross_entropy,
        )

    iterate()
    model.zero_grad()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    known = [*model.parameters(), *model.buffers(), *momentum]
    live = LiveBytes(known)
    with live:
        iterate()
    return live.peak + sum(tensor.nbytes for tensor in known)


@pytest.mark.parametrize(
    ("cross_entropy", "accumulation_steps", "align_corners"),
    [
        (PLAIN, 1, True),
        (PLAIN, 3, False),
        # no pixel is hard, so that all are sorted
        (CrossEntropy(ohem_threshold=1e-9, ohem_min_kept=10**6), 3, True),
        (CrossEntropy(label_smoothing=0.1, class_weights=torch.rand(19)), 1, False),
    ],
    ids=["plain", "three parts", "hard pixels", "weighted"],
)
def test_a_step_is_predicted_as_the_engine_takes_it(
    cross_entropy: CrossEntropy, accumulation_steps: int, align_corners: bool
) -> None:
    """In several parts the gradients of the first live beside the second, and the images of all."""

    def build() -> PSPNet:
        return PSPNet(19, backbone="resnet18", head_channels=64, align_corners=align_corners)

    predicted = step_memory(build, 161, 2, accumulation_steps=accumulation_steps, cross_entropy=cross_entropy)
    taken = engines_peak(build(), 161, 2, accumulation_steps, cross_entropy)
    assert predicted.peak == pytest.approx(taken, rel=0.002)


def test_what_a_cpus_own_kernels_take_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and kernels of 3x3 convolutions, which live at the peak of a small crop."""
    monkeypatch.setattr("pspnet.kernels.multiplies_matrices_fast", lambda: True)

    def build() -> PSPNet:
        return PSPNet(19, backbone="resnet18")

    def on_cpu() -> PSPNet:
        model = build()
        use_cpu_kernels(model, num_threads=1)
        return model

    predicted = step_memory(on_cpu, 129, 2)
    assert predicted.peak > 1.2 * step_memory(build, 129, 2).peak
    assert predicted.peak == pytest.approx(engines_peak(on_cpu(), 129, 2, 1, PLAIN), rel=0.01)
    assert predicted.peak == pytest.approx(count_step(on_cpu(), 129, 2).peak, rel=0.002)


def test_activations_grow_with_the_images_and_shrink_when_they_are_computed_again() -> None:
    def recomputed() -> PSPNet:
        model = builder("resnet50")()
        recompute_blocks(model)
        return model

    state = torch.get_rng_state()
    two, four = (step_memory(builder("resnet50"), 97, number) for number in (2, 4))
    less = step_memory(recomputed, 97, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert four.weights == two.weights
    assert four.activations == pytest.approx(2 * two.activations, rel=0.05)
    assert less.activations < 0.6 * two.activations
    assert less.peak < two.peak
    assert two.peak > two.weights + two.gradients + two.activations


def test_a_fit_is_the_line_through_what_was_measured_and_no_measured_step_is_above_it() -> None:
    counted = [10, 20, 40]
    exact = fit_line(counted, [25, 45, 85])
    assert (exact.factor, exact.constant) == pytest.approx((2, 5))
    for taken in ([25, 47, 85], [11, 30, 70], [12, 22, 39]):
        fit = fit_line(counted, taken)
        assert fit.constant >= 0
        assert all(fit.factor * a + fit.constant >= b - 1e-9 for a, b in zip(counted, taken, strict=True))
    assert measure_fit(builder("resnet18"), "cpu", precision="fp32") == Fit()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_fitted_prediction_is_close_to_what_is_reserved() -> None:
    build = builder("resnet50")
    fit = measure_fit(build, "cuda", precision="bf16")
    model = build().to("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    count_step(model, 473, 4, precision="bf16")
    predicted = fit.peak_bytes(step_memory(build, 473, 4, precision="bf16"))
    assert predicted == pytest.approx(torch.cuda.max_memory_reserved(), rel=0.15)
