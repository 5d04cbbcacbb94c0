"""Workers of a group compute what one process computes; a training falls, diverges and is timed as it says."""

import contextlib
import copy
import itertools
import math
import pickle
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pspnet import engine
from pspnet.data import Batch
from pspnet.distributed import parallelise
from pspnet.engine import evaluate, seed_everything
from pspnet.errors import InputError
from pspnet.inference import predict_logits
from pspnet.labels import IGNORE_INDEX
from pspnet.loss import segmentation_loss
from pspnet.model import PSPNet
from pspnet.optim import build_optimizer, poly_factor
from pspnet.training_stats import DivergedError, IterationStats
from tests.pspnet_model import engine_workers
from tests.pspnet_model.engine_workers import MEAN, NUM_CLASSES, STD, Pictures


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    return engine_workers.run_group(tmp_path_factory.mktemp("group"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return engine_workers.trained(rank=0, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
def test_workers_train_the_weights_of_one(group: dict, alone: dict[str, Any], num_workers: int) -> None:
    """With BatchNorm on its running statistics (else each CPU worker has its own), in float64, over three steps.

    The workers' shares of valid pixels differ ten to one, so that gradients averaged per worker would show. Three have
    two, one and one of the four images.
    """
    initial = engine_workers.new_model().double().state_dict()
    for rank in range(num_workers):
        theirs = group[num_workers, rank]["trained"]
        assert theirs["losses"] == pytest.approx(alone["losses"], rel=1e-12)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(theirs["weights"][name], weight, rtol=1e-9, atol=1e-12)
    moved = (alone["weights"]["backbone.conv1.weight"] - initial["backbone.conv1.weight"]).abs().max()
    assert moved > 1e-3


@pytest.mark.parametrize("steps", [2, 4])
def test_a_batch_in_parts_trains_the_weights_of_the_whole(alone: dict[str, Any], steps: int) -> None:
    """BatchNorm on its running statistics, float64; the parts' shares of valid pixels differ ten to one."""
    parts = engine_workers.trained(0, 1, accumulation_steps=steps)
    assert parts["losses"] == pytest.approx(alone["losses"], rel=1e-12)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(parts["weights"][name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_two_workers_with_parts_train_the_weights_of_one_and_talk_once_a_step(
    group: dict, alone: dict[str, Any]
) -> None:
    for rank in (0, 1):
        theirs = group[2, rank]["accumulated"]
        assert theirs["losses"] == pytest.approx(alone["losses"], rel=1e-12)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(theirs["weights"][name], weight, rtol=1e-9, atol=1e-12)
        assert theirs["exchanges"] == group[2, rank]["trained"]["exchanges"] > 0


@pytest.mark.slow
def test_two_workers_choose_the_hard_pixels_and_weights_of_one(group: dict, alone: dict[str, Any]) -> None:
    whole = engine_workers.trained(0, 1, cross_entropy=engine_workers.KIND)
    assert whole["losses"] != pytest.approx(alone["losses"], rel=1e-2)
    for rank in (0, 1):
        theirs = group[2, rank]["hard"]
        assert theirs["losses"] == pytest.approx(whole["losses"], rel=1e-12)
        for name, weight in whole["weights"].items():
            torch.testing.assert_close(theirs["weights"][name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_all_workers_report_the_same_losses_and_end_with_the_same_bits(group: dict) -> None:
    first, second = (group[2, rank]["trained"] for rank in (0, 1))
    assert first["losses"] == second["losses"]
    assert first["loss"] == second["loss"] == pytest.approx(np.mean(first["losses"]))
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [5, 2])
def test_one_two_and_three_workers_count_the_same_confusion(group: dict, num_images: int) -> None:
    """Also where a worker of the three has no image."""
    expected = engine_workers.counted(rank=0, world_size=1, num_images=num_images)
    pictures = Pictures(num_images)
    valid = sum(int((label != IGNORE_INDEX).sum()) for _, label in pictures.pairs if label is not None)
    assert int(expected.sum()) == valid
    for results in group.values():
        assert torch.equal(results[f"counts{num_images}"], expected)


@pytest.mark.slow
def test_all_workers_raise_when_the_loss_of_one_is_not_finite(group: dict) -> None:
    """Image 5 is in the second worker's share of iteration 1 (3 from the start): images 5 and 7."""
    untouched = engine_workers.trained(rank=0, world_size=1, prepare=engine_workers.prepare_with_a_nan)
    assert untouched["error"] == (3, ["image4", "image5", "image6", "image7"])
    for rank in (0, 1):
        assert group[2, rank]["diverged"]["error"] == (3, ["image5", "image7"])
        for weight in group[2, rank]["diverged"]["weights"].values():
            assert weight.isfinite().all()


@pytest.mark.slow
def test_all_workers_raise_when_the_last_step_of_one_overflows(group: dict) -> None:
    for rank in (0, 1):
        assert group[2, rank]["overflown"]["error"] == (4, ["image8", "image10", "image9", "image11"])
        assert len(group[2, rank]["overflown"]["losses"]) == engine_workers.NUM_ITERATIONS


def test_a_diverged_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(DivergedError(7, ["a", "b"], "gradient")))  # noqa: S301
    assert (error.iteration, error.names, error.what) == (7, ["a", "b"], "gradient")
    assert "gradient of iteration 8 " in str(error)


def test_the_learning_rate_follows_poly_over_the_whole_training(alone: dict[str, Any]) -> None:
    assert alone["lr"] == pytest.approx(0.02 * poly_factor(2 + engine_workers.NUM_ITERATIONS - 1, 10, 0.9))


@pytest.mark.parametrize(("limit", "is_limited"), [(0.1, True), (1e6, False)])
def test_a_limited_gradient_is_that_of_clip_grad_norm(limit: float, is_limited: bool) -> None:
    steps: list[IterationStats] = []
    model, by_hand = (engine_workers.new_model().double() for _ in range(2))
    batch = next(engine_workers.batches(0, 1))
    engine_workers.train(model, [batch], max_gradient_norm=limit, on_iteration=steps.append)

    optimizer = engine_workers.new_optimizer(by_hand)
    images, target = engine_workers.prepare(batch)
    num_valid = (target != IGNORE_INDEX).sum()
    output = by_hand.train()(images, upsample=False)
    segmentation_loss(output, target, num_valid=num_valid, aux_loss_weight=0.4).total.backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), limit)
    optimizer.step()
    assert steps[0].gradient_norm == pytest.approx(float(norm), rel=1e-12)
    assert (float(norm) > limit) == is_limited
    for name, weight in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-12, atol=1e-14)


def test_a_limit_is_for_the_gradient_without_the_scale_of_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    # On CPUs a convolution in fp16 takes seconds.
    monkeypatch.setattr(engine, "autocast", lambda *_: contextlib.nullcontext())
    weights = []
    for precision in ("fp32", "fp16"):
        model = engine_workers.new_model()
        arguments: dict[str, Any] = {"prepare": prepare_in_float32, "precision": precision}
        engine_workers.train(model, engine_workers.batches(0, 1), **arguments, max_gradient_norm=0.1)
        weights.append(model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_a_warm_up_is_linear_lr_chained_with_poly() -> None:
    rates: list[float] = []
    batch = next(engine_workers.batches(0, 1))
    engine_workers.train(
        engine_workers.new_model().double(),
        [batch] * 5,
        max_iterations=8,
        warm_up_iterations=3,
        warm_up_start=0.25,
        on_iteration=lambda step: rates.append(step.lr),
    )
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    linear = torch.optim.lr_scheduler.LinearLR(reference, start_factor=0.25, total_iters=3)
    poly = torch.optim.lr_scheduler.PolynomialLR(reference, total_iters=8, power=0.9)
    expected = []
    for _ in rates:
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        linear.step()
        poly.step()
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[0] == 0.02 * 0.25


def test_a_warm_up_begins_at_its_share_of_the_scheduled_rate_also_where_that_falls_to_a_least_one() -> None:
    model = engine_workers.new_model().double()
    optimizer = build_optimizer(
        model, base_lr=0.02, head_lr_factor=10.0, momentum=0.9, weight_decay=0.0, min_lr=0.01
    )
    engine_workers.train(
        model,
        [next(engine_workers.batches(0, 1))],
        optimizer=optimizer,
        warm_up_iterations=3,
        warm_up_start=0.25,
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 / 4, 0.2 / 4])


def test_a_gradient_that_is_not_finite_ends_the_training_before_the_weights_change() -> None:
    """The loss itself is finite: only the gradient of one parameter in the second iteration is infinite."""
    model = engine_workers.new_model().double()
    seen: list[dict[str, Tensor]] = []
    calls = itertools.count()
    model.backbone.conv1.weight.register_hook(
        lambda gradient: gradient * torch.inf if next(calls) == 1 else gradient
    )
    with pytest.raises(DivergedError, match="gradient of iteration 2 is not finite, on image4") as caught:
        engine_workers.train(
            model,
            engine_workers.batches(0, 1),
            on_iteration=lambda _: seen.append(copy.deepcopy(dict(model.named_parameters()))),
        )
    assert (caught.value.iteration, caught.value.what) == (1, "gradient")
    assert caught.value.names == ["image4", "image5", "image6", "image7"]
    assert all(torch.equal(weight, seen[-1][name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("name", ["head.classifier.weight", "backbone.bn1.running_var"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_the_last_step_of_an_epoch_leaves_is_looked_at(name: str, value: float) -> None:
    """Loss and gradient of all three steps are finite."""
    model = engine_workers.new_model().double()
    optimizer = engine_workers.new_optimizer(model)
    steps = itertools.count(1)

    def overflow(*_: object) -> None:
        if next(steps) == engine_workers.NUM_ITERATIONS:
            model.state_dict()[name].flatten()[0] = value

    optimizer.register_step_post_hook(overflow)
    with pytest.raises(
        DivergedError, match="Weights or statistics after iteration 3 are not finite, on image8"
    ) as caught:
        engine_workers.train(model, engine_workers.batches(0, 1), optimizer=optimizer)
    assert (caught.value.iteration, caught.value.what) == (2, "state")


def test_large_weights_are_finite() -> None:
    """Their squares are not."""
    model = engine_workers.new_model()
    with torch.no_grad():
        model.head.classifier.bias.fill_(1e30)
    assert engine._has_finite_state(model)


@pytest.mark.parametrize(("lost", "left"), [(17, 0), (16, 3)])
def test_fp16_leaves_out_steps_until_the_scale_is_below_one(
    lost: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale, 2**16 at first, is halved by each step that is left out; the 17th is without any scaling."""
    # On CPUs a convolution in fp16 takes seconds.
    monkeypatch.setattr(engine, "autocast", lambda *_: contextlib.nullcontext())
    model = engine_workers.new_model()
    before = copy.deepcopy(dict(model.named_parameters()))
    calls = itertools.count()
    model.backbone.conv1.weight.register_hook(
        lambda gradient: gradient * torch.inf if next(calls) < lost else gradient
    )
    batches = [next(engine_workers.batches(0, 1))] * (lost + left)
    arguments: dict[str, Any] = {"prepare": prepare_in_float32, "precision": "fp16", "max_iterations": 20}
    if left:
        stats = engine_workers.train(model, batches, **arguments)
        assert (stats.scaler["scale"], stats.scaler["_growth_tracker"]) == (1, left)
        assert not model.backbone.conv1.weight.equal(before["backbone.conv1.weight"])
        stats = engine_workers.train(model, batches[:2], **arguments, scaler_state=stats.scaler)
        assert (stats.scaler["scale"], stats.scaler["_growth_tracker"]) == (1, left + 2)
        return
    with pytest.raises(DivergedError, match="gradient") as caught:
        engine_workers.train(model, batches, **arguments)
    assert (caught.value.iteration, caught.value.what) == (lost - 1, "gradient")
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_training_again_from_the_same_seed_is_equal_bit_by_bit() -> None:
    weights = []
    for _ in range(2):
        seed_everything(3)
        model = PSPNet(NUM_CLASSES, backbone="resnet18", head_channels=8, dropout=0.5).double()
        assert parallelise(model, "cpu") is model
        stats = engine_workers.train(model, engine_workers.batches(0, 1))
        weights.append((stats.loss, copy.deepcopy(model.state_dict())))
    assert weights[0][0] == weights[1][0]
    assert all(torch.equal(weights[0][1][name], weights[1][1][name]) for name in weights[0][1])


def test_four_images_are_learnt_by_heart() -> None:
    """Thirty steps on the same images, whose colour tells the class: the loss falls to a third."""
    torch.manual_seed(0)
    target = torch.zeros(4, 33, 33).long()
    target[:, :, 16:] = 1
    target[2:, 16:] = 2
    images = torch.stack([(target == train_id).float() for train_id in range(3)], dim=1)
    steps: list[IterationStats] = []
    engine_workers.train(
        engine_workers.new_model(),
        itertools.repeat(next(engine_workers.batches(0, 1)), 30),
        prepare=lambda _: (images, target),
        max_iterations=30,
        on_iteration=steps.append,
    )
    assert steps[-1].loss < steps[0].loss / 3
    assert steps[0].loss == pytest.approx(steps[0].main_loss + 0.4 * steps[0].aux_loss)
    assert [step.iteration for step in steps] == list(range(30))


def prepare_in_float32(batch: Batch) -> tuple[Tensor, Tensor]:
    images, target = engine_workers.prepare(batch)
    return images.float(), target


def test_bf16_trains_close_to_fp32() -> None:
    stats = []
    for precision in ("fp32", "bf16"):
        model = engine_workers.new_model()
        stats.append(
            engine_workers.train(
                model,
                engine_workers.batches(0, 1),
                prepare=prepare_in_float32,
                precision=precision,
            )
        )
    assert stats[1].loss == pytest.approx(stats[0].loss, rel=0.05)
    assert stats[1].loss != stats[0].loss


def test_the_wait_for_data_is_measured() -> None:
    def slow() -> Iterator[Batch]:
        for batch in engine_workers.batches(0, 1):
            time.sleep(0.05)
            yield batch

    stats = engine_workers.train(engine_workers.new_model().double(), slow())
    assert stats.iterations == engine_workers.NUM_ITERATIONS
    assert 0.05 * stats.iterations <= stats.data_wait_s
    assert 0 < stats.images_per_s < 4 / 0.05


def test_one_image_per_worker_is_refused_with_a_remedy_before_the_first_step() -> None:
    model = engine_workers.new_model().double()
    before = copy.deepcopy(model.state_dict())
    batches = engine_workers.batches(0, engine_workers.GLOBAL_BATCH_SIZE)
    with pytest.raises(InputError, match="at least 2 images at a time"):
        engine_workers.train(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_is_the_argmax_of_the_whole_images_and_leaves_the_model_as_it_was() -> None:
    model = engine_workers.new_model().train()
    pictures = Pictures(2)
    confusion = evaluate(model, pictures, indices=[1], mean=MEAN, std=STD, device="cpu")
    assert model.training
    image, label = pictures.pairs[1]
    assert label is not None
    prediction = predict_logits(model, image, mean=MEAN, std=STD, device="cpu").argmax(0).numpy()
    valid = label != IGNORE_INDEX
    for wanted in range(NUM_CLASSES):
        for predicted in range(NUM_CLASSES):
            expected = int(((label == wanted) & (prediction == predicted) & valid).sum())
            assert int(confusion.counts[wanted, predicted]) == expected
    assert math.isfinite(confusion.miou)


def test_an_image_without_label_is_not_evaluated_silently() -> None:
    pictures = Pictures(1)
    pictures.pairs[0] = (pictures.pairs[0][0], None)
    with pytest.raises(ValueError, match="image0 has none"):
        evaluate(engine_workers.new_model(), pictures, indices=[0], mean=MEAN, std=STD, device="cpu")


def test_seeds_make_equal_weights() -> None:
    states = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        states.append(PSPNet(2, backbone="resnet18", head_channels=8).state_dict())
    assert torch.equal(states[0]["backbone.conv1.weight"], states[1]["backbone.conv1.weight"])
    assert not torch.equal(states[0]["backbone.conv1.weight"], states[2]["backbone.conv1.weight"])
