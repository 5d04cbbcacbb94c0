"""The loss is the paper's formula, by hand and by strips; shares of workers sum to the whole."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pspnet.class_weights import class_weights
from pspnet.cpu_loss import _exp, summed_loss_and_gradient
from pspnet.errors import InputError
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import (
    CELLS_PER_STRIP,
    STRIP_BYTES,
    CrossEntropy,
    cells_per_strip,
    segmentation_loss,
    summed_cross_entropy,
    valid_weight,
)
from pspnet.model import PSPNetOutput, upsampled
from pspnet.ohem import _smallest


def test_a_loss_worked_by_hand() -> None:
    """Pixel 1: p(right) = 3/4; pixel 2: 1/4; pixel 3 ignored. Auxiliary: 1/2 everywhere."""
    logits = torch.tensor([[[[math.log(3), math.log(3), 9.0]], [[0.0, 0.0, -9.0]]]])
    aux_logits = torch.zeros(1, 2, 1, 3)
    target = torch.tensor([[[0, 1, IGNORE_INDEX]]])
    loss = segmentation_loss(PSPNetOutput(logits, aux_logits), target, num_valid=2, aux_loss_weight=0.4)
    main = (math.log(4 / 3) + math.log(4)) / 2
    assert loss.main.item() == pytest.approx(main)
    assert loss.aux.item() == pytest.approx(math.log(2))
    assert loss.total.item() == pytest.approx(main + 0.4 * math.log(2))


def test_without_an_auxiliary_head_the_loss_is_the_main_one() -> None:
    output = PSPNetOutput(torch.randn(1, 3, 4, 4), None)
    loss = segmentation_loss(output, torch.zeros(1, 4, 4).long(), num_valid=16, aux_loss_weight=0.4)
    assert loss.aux.item() == 0
    assert loss.total.item() == loss.main.item() > 0


@pytest.mark.parametrize("num_cells", [1, 2, CELLS_PER_STRIP, CELLS_PER_STRIP + 1, 2 * CELLS_PER_STRIP + 4])
@pytest.mark.parametrize("cut", [0, 5])
def test_the_loss_by_strips_is_that_of_the_upsampled_logits_with_its_gradient(
    num_cells: int, cut: int
) -> None:
    torch.manual_seed(num_cells)
    logits = torch.randn(2, 4, num_cells, 3, dtype=torch.float64, requires_grad=True)
    height, width = max(1, (num_cells - 1) * 8 + 1 - cut), 17 - cut
    target = torch.randint(0, 4, (2, height, width))
    target[:, : height // 3, 2:5] = IGNORE_INDEX
    whole = functional.cross_entropy(
        upsampled(logits, 8)[:, :, :height, :width], target, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    strips = summed_cross_entropy(logits, target, 8)
    torch.testing.assert_close(strips, whole)
    torch.testing.assert_close(
        torch.autograd.grad(3 * strips, logits), torch.autograd.grad(3 * whole, logits)
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 2.0, 0.0, 3.0, 1.0])])
@pytest.mark.parametrize(("stride", "num_cells", "cut"), [(8, 13, 0), (8, 13, 5), (16, 7, 3), (8, 1, 0)])
def test_the_fused_loss_is_torchs_of_the_upsampled_logits_with_its_gradient(
    stride: int,
    num_cells: int,
    cut: int,
    class_weights: Tensor | None,
    label_smoothing: float,
    layout: torch.memory_format,
) -> None:
    """Against float64; the softmax of logits this far apart reaches from 1e-13 to 1."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(2, 5, num_cells, 6)).contiguous(memory_format=layout)
    height, width = max(1, (num_cells - 1) * stride + 1 - cut), 5 * stride + 1 - cut
    target = torch.randint(0, 5, (2, height, width))
    target[:, : height // 3, 2:9] = IGNORE_INDEX
    exact = logits.double().requires_grad_()
    whole = functional.cross_entropy(
        upsampled(exact, stride)[:, :, :height, :width],
        target,
        weight=None if class_weights is None else class_weights.double(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    expected = torch.autograd.grad(whole, exact)[0]
    total, gradient = summed_loss_and_gradient(logits, target, stride, class_weights, label_smoothing)
    torch.testing.assert_close(total, whole.detach(), rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item()
    )


def test_a_training_on_a_cpu_takes_the_fused_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, that is; its gradient has the factor of whatever follows."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    target = torch.randint(0, 5, (2, 25, 41))
    total, gradient = summed_loss_and_gradient(logits, target, 8)
    loss = summed_cross_entropy(logits, target, 8)
    assert loss == total.float()
    assert torch.autograd.grad(3 * loss, logits)[0].equal(3 * gradient)
    with torch.autocast("cpu", torch.bfloat16):
        assert summed_cross_entropy(logits, target, 8) == loss
    monkeypatch.setattr("pspnet.cpu_loss.summed_loss_and_gradient", None)
    with pytest.raises(TypeError):
        summed_cross_entropy(logits, target, 8)
    summed_cross_entropy(logits.double(), target, 8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_fused_loss_says_what_is_not_finite(value: float) -> None:
    logits = torch.zeros(1, 3, 3, 3)
    logits[0, 1, 1, 1] = value
    total, gradient = summed_loss_and_gradient(logits, torch.zeros(1, 17, 17).long(), 8)
    assert not total.isfinite()
    assert not gradient.isfinite().all()


def test_the_fused_loss_of_logits_far_apart_is_their_difference() -> None:
    """e**-1000 is nothing in float32, and -1000 must not become the power of a number that is none."""
    logits = torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1)
    total, gradient = summed_loss_and_gradient(logits, torch.zeros(1, 1, 1).long(), 8)
    assert total == 1000
    assert gradient.flatten().tolist() == [-1, 1]
    ignored = torch.full((1, 1, 1), IGNORE_INDEX)
    total, gradient = summed_loss_and_gradient(logits, ignored, 8)
    assert (total.item(), gradient.abs().sum().item()) == (0, 0)


def test_the_fused_loss_is_the_same_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3, 4, 6), torch.randint(0, 3, (5, 25, 41))
    total, gradient = summed_loss_and_gradient(logits, target, 8)
    for num_threads in (1, 2, 16):
        monkeypatch.setattr("torch.get_num_threads", lambda number=num_threads: number)
        others_total, others_gradient = summed_loss_and_gradient(logits, target, 8)
        assert others_total == total
        assert others_gradient.equal(gradient)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_fused_loss_is_the_same_in_inference_mode(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 3, 4, 6), torch.randint(0, 3, (3, 25, 41))
    total, gradient = summed_loss_and_gradient(logits, target, 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: num_threads)
    with torch.inference_mode():
        others_total, others_gradient = summed_loss_and_gradient(logits.clone(), target.clone(), 8)
    assert others_total == total
    assert others_gradient.equal(gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_fused_loss_of_a_logit_that_is_not_finite_is_nan_though_only_ignored_pixels_see_it(
    value: float,
) -> None:
    logits, target = torch.zeros(1, 3, 5, 5), torch.zeros(1, 33, 33).long()
    target[:, 16:] = IGNORE_INDEX
    logits[0, 1, 4, 4] = value
    assert summed_loss_and_gradient(logits, target, 8)[0].isnan()


def test_the_fused_losss_power_of_e_is_numpys() -> None:
    values = np.linspace(-86.9, 0, 10_001, dtype=np.float32)
    found = np.array([_exp(value) for value in values])
    np.testing.assert_allclose(found, np.exp(values.astype(np.float64)), rtol=1.2e-7)


@pytest.mark.parametrize("label", [-1, 2, 254])
def test_the_fused_loss_refuses_a_target_that_is_no_class(label: int) -> None:
    with pytest.raises(IndexError, match="no class"):
        summed_loss_and_gradient(torch.zeros(1, 2, 2, 2), torch.full((1, 9, 9), label), 8)


def test_strips_are_as_high_as_their_device_wants() -> None:
    """A row of cells of 16 crops of 713 is 8 x 720 pixels of 19 float32: 19 rows fit in 2**27 bytes."""
    crops = torch.empty(16, 19, 90, 90, device="meta", dtype=torch.bfloat16)
    assert cells_per_strip(crops, 8) == STRIP_BYTES // (16 * 19 * 8 * 720 * 4) == 19
    assert cells_per_strip(torch.empty(1, 19, 129, 257, device="meta"), 8) == 107
    assert cells_per_strip(torch.empty(10**4, 19, 90, 90, device="meta"), 8) == CELLS_PER_STRIP
    assert cells_per_strip(torch.empty(1, 19, 9, 9), 8) == CELLS_PER_STRIP


def test_shares_of_unequal_workers_sum_to_the_loss_and_gradient_of_one() -> None:
    """The second worker's image is nearly all ignored: a mean of means would weigh its few pixels up."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 17, 17))
    target[1, 1:] = IGNORE_INDEX
    num_valid = (target != IGNORE_INDEX).sum()

    def total(rows: slice) -> torch.Tensor:
        output = PSPNetOutput(logits[rows], 2 * logits[rows], 8)
        return segmentation_loss(output, target[rows], num_valid=num_valid, aux_loss_weight=0.4).total

    whole, shares = total(slice(0, 2)), total(slice(0, 1)) + total(slice(1, 2))
    torch.testing.assert_close(shares, whole)
    torch.testing.assert_close(torch.autograd.grad(shares, logits), torch.autograd.grad(whole, logits))


@pytest.mark.parametrize("output_stride", [1, 8])
def test_without_a_valid_pixel_loss_and_gradient_are_zero(output_stride: int) -> None:
    logits = torch.randn(1, 3, 1, 1, requires_grad=True)
    target = torch.full((1, 1, 1), IGNORE_INDEX)
    output = PSPNetOutput(logits, logits, output_stride)
    loss = segmentation_loss(output, target, num_valid=0, aux_loss_weight=0.4)
    assert [term.item() for term in loss] == [0, 0, 0]
    assert torch.autograd.grad(loss.total, logits)[0].abs().sum() == 0


def test_bf16_logits_are_upsampled_in_float32() -> None:
    logits = torch.randn(1, 3, 3, 3).bfloat16()
    target = torch.zeros(1, 17, 17).long()
    assert summed_cross_entropy(logits, target, 8) == summed_cross_entropy(logits.float(), target, 8)


WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 3.0])


@pytest.mark.parametrize("output_stride", [1, 8])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_smoothing_and_weights_are_those_of_torchs_cross_entropy(
    output_stride: int, label_smoothing: float, class_weights: Tensor | None
) -> None:
    """Mean over the valid pixels, weighted, of the whole upsampled logits, with its gradient."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 13, 3, dtype=torch.float64, requires_grad=True)
    whole = upsampled(logits, 8) if output_stride == 8 else logits
    target = torch.randint(0, 4, (2, *whole.shape[2:]))
    target[:, 3:6] = IGNORE_INDEX
    expected = functional.cross_entropy(
        whole,
        target,
        weight=None if class_weights is None else class_weights.double(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    loss = segmentation_loss(
        PSPNetOutput(logits, None, output_stride),
        target,
        num_valid=valid_weight(target, class_weights),
        aux_loss_weight=0.4,
        kind=CrossEntropy(label_smoothing=label_smoothing, class_weights=class_weights),
    )
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(torch.autograd.grad(loss.total, logits), torch.autograd.grad(expected, logits))


def kept_by_mmsegmentation(logits: Tensor, target: Tensor, threshold: float, min_kept: int) -> Tensor:
    """Return what mmseg/structures/sampler/ohem_pixel_sampler.py computes: the weight of each pixel, 0 or 1."""
    valid = target != IGNORE_INDEX
    probabilities = logits.softmax(1).gather(1, target.where(valid, 0)[:, None])[:, 0]
    ascending = probabilities[valid].sort().values
    if len(ascending):
        threshold = max(float(ascending[min(min_kept * len(target), len(ascending) - 1)]), threshold)
    return (valid & (probabilities < threshold)).to(logits.dtype)


@pytest.mark.parametrize("output_stride", [1, 8])
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize(
    ("threshold", "min_kept", "num_ignored_rows"),
    [(0.7, 10, 2), (0.2, 300, 2), (0.001, 500, 0), (0.7, 10**5, 2), (0.7, 10**5, 97), (0.3, 1, 96)],
)
def test_hard_pixels_are_those_of_mmsegmentation(
    threshold: float, min_kept: int, num_ignored_rows: int, scale: float, output_stride: int
) -> None:
    """Both where the threshold decides and where the number of pixels does; the loss is divided by all valid ones."""
    torch.manual_seed(0)
    logits = scale * torch.randn(2, 4, 13, 3, dtype=torch.float64)
    logits = (logits if output_stride == 8 else upsampled(logits, 8)).requires_grad_()
    aux_logits = torch.randn_like(logits)
    target = torch.randint(0, 4, (2, 97, 17))
    target[:, :num_ignored_rows] = IGNORE_INDEX
    whole, aux = (upsampled(it, 8) if output_stride == 8 else it for it in (logits, aux_logits))
    num_valid = int((target != IGNORE_INDEX).sum())
    kept = kept_by_mmsegmentation(whole.detach(), target, threshold, min_kept)
    each = functional.cross_entropy(whole, target, ignore_index=IGNORE_INDEX, reduction="none")
    expected = (each * kept).sum() / max(1, num_valid)
    expected_aux = functional.cross_entropy(aux, target, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = segmentation_loss(
        PSPNetOutput(logits, aux_logits, output_stride),
        target,
        num_valid=num_valid,
        aux_loss_weight=0.4,
        kind=CrossEntropy(ohem_threshold=threshold, ohem_min_kept=min_kept),
    )
    torch.testing.assert_close(loss.main, expected)
    torch.testing.assert_close(loss.aux, expected_aux / max(1, num_valid))
    torch.testing.assert_close(torch.autograd.grad(loss.total, logits), torch.autograd.grad(expected, logits))


def test_the_cases_of_hard_pixels_differ_from_each_other_and_from_all_pixels() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 97, 17)
    target = torch.randint(0, 4, (2, 97, 17))
    numbers = [int(kept_by_mmsegmentation(logits, target, *it).sum()) for it in ((0.7, 10), (0.001, 500))]
    assert numbers[1] == 1000
    assert 1000 < numbers[0] < target.numel()


def test_the_smallest_of_all_values_is_found_as_sorting_does() -> None:
    torch.manual_seed(0)
    values = torch.cat(
        [torch.rand(500), torch.rand(50) * 1e-30, torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 0.5])]
    )
    ascending = values.sort().values
    for rank in range(len(values)):
        assert _smallest(values, rank) == ascending[rank]


def test_a_probability_that_is_not_a_number_stays_in_the_loss() -> None:
    logits = torch.full((1, 2, 3, 3), 5.0)
    logits[0, 0, 1, 1] = torch.nan
    loss = segmentation_loss(
        PSPNetOutput(logits, None, 8),
        torch.zeros(1, 17, 17).long(),
        num_valid=17 * 17,
        aux_loss_weight=0.4,
        kind=CrossEntropy(ohem_threshold=0.1, ohem_min_kept=1),
    )
    assert loss.total.isnan()


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_kind_of_loss_holds_the_upsampled_logits() -> None:
    """Of 60 x 60 cells a strip is 8 rows: a seventh of the pixels. All pixels of one channel are much less."""
    logits = torch.randn(1, 19, 61, 61, requires_grad=True)
    target = torch.randint(0, 19, (1, 481, 481))
    whole = 19 * 481 * 481
    kind = CrossEntropy(label_smoothing=0.1, class_weights=torch.rand(19), ohem_threshold=0.7)
    with LargestTensor() as largest:
        loss = segmentation_loss(
            PSPNetOutput(logits, logits, 8), target, num_valid=100, aux_loss_weight=0.4, kind=kind
        )
        loss.total.backward()
    assert 0 < largest.numel < whole / 5


def test_weights_by_frequency_by_hand() -> None:
    """Pixels 60, 30, 10 and none: median 30, mean 100 / 3; each class then has the same share of the loss."""
    counts = [60, 30, 10, 0]
    assert class_weights(counts, "median") == pytest.approx([0.5, 1, 3, 0])
    balanced = class_weights(counts, "balanced")
    assert balanced == pytest.approx([100 / 180, 100 / 90, 100 / 30, 0])
    assert sum(weight * count for weight, count in zip(balanced, counts, strict=True)) == pytest.approx(100)
    with pytest.raises(InputError, match="none"):
        class_weights([0, 0], "median")
