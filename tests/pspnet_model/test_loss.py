"""The loss is the paper's formula, by hand and by strips; shares of workers sum to the whole."""

import math

import pytest
import torch
from torch.nn import functional

from pspnet.labels import IGNORE_INDEX
from pspnet.loss import CELLS_PER_STRIP, segmentation_loss, summed_cross_entropy
from pspnet.model import PSPNetOutput, upsampled


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
