"""Averaging, recomputing and compiling change what they say and nothing else."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pspnet.averaging import new_average
from pspnet.compilation import require_compiler
from pspnet.distributed import parallelise, unwrapped
from pspnet.errors import InputError
from pspnet.freezing import Frozen, freeze, train_mode
from pspnet.model import PSPNet
from pspnet.recomputation import recompute_blocks
from pspnet.training_stats import IterationStats
from tests.pspnet_model import engine_workers


def train(model: nn.Module, **changes: Any) -> list[float]:
    """Train three iterations and return the losses."""
    steps: list[IterationStats] = []
    arguments = {"on_iteration": steps.append} | changes
    engine_workers.train(model, engine_workers.batches(0, 1), **arguments)
    return [step.loss for step in steps]


def test_the_average_is_the_formula_by_hand() -> None:
    """e1 = w1, e2 = 0.9 e1 + 0.1 w2, e3 = 0.9 e2 + 0.1 w3: of weights and running statistics."""
    model = engine_workers.new_model().double()
    average = new_average(model, 0.9)
    expected: dict[str, Tensor] = {}

    def by_hand(_: object) -> None:
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.9 * expected[name] + 0.1 * value if name in expected else value.clone()

    train(model, average=average, on_iteration=by_hand)
    averaged = unwrapped(average.module).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-12, atol=1e-14)
    assert not averaged["backbone.conv1.weight"].equal(model.state_dict()["backbone.conv1.weight"])
    assert "backbone.bn1.running_mean" in expected


@pytest.mark.parametrize("batch_norm", ["none", "backbone"])
def test_recomputing_gives_the_same_bits(batch_norm: Frozen) -> None:
    """Weights, running statistics and losses of three steps, under the same names."""
    results = []
    for is_recomputed in (False, True):
        model = engine_workers.new_model().double()
        freeze(model, batch_norm=batch_norm)
        if is_recomputed:
            recompute_blocks(model)
        results.append((train(model), model.state_dict()))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def saved_bytes(model: PSPNet) -> int:
    """Return the bytes that a forward pass leaves for the backward pass, parameters left out."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def count_input(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        count(inputs[0])

    for stage in model.backbone.children():
        if isinstance(stage, nn.Sequential):
            for block in stage.children():  # recomputed blocks keep their inputs aside from autograd
                block.register_forward_pre_hook(count_input)
    train_mode(model)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = model(torch.randn(2, 3, 97, 97), upsample=False)
    kept = sum(sizes.values())
    del output
    return kept


def test_recomputing_keeps_less() -> None:
    plain, recomputed = (
        PSPNet(engine_workers.NUM_CLASSES, backbone="resnet50", head_channels=8) for _ in range(2)
    )
    recompute_blocks(recomputed)
    assert saved_bytes(recomputed) < saved_bytes(plain) / 2


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_step_is_close_to_an_eager_one() -> None:
    try:
        require_compiler("cpu")
    except InputError as error:
        pytest.skip(str(error))
    results = []
    for compiled in (False, True):
        model = engine_workers.new_model().double()
        group_model = parallelise(model, "cpu", compiled=compiled)
        results.append((train(group_model), model.state_dict()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9)
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_however_many_networks_a_process_trains_each_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one network of a code; Dynamo traces, and no compiler is asked."""
    dynamo = importlib.import_module("torch._dynamo")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for head_channels in (8, 16):
            model = PSPNet(engine_workers.NUM_CLASSES, backbone="resnet18", head_channels=head_channels)
            parallelise(model, "cpu", compiled=True)(torch.randn(2, 3, 33, 33), upsample=False)


def test_without_a_compiler_compiling_is_refused_with_a_remedy(tmp_path: Path) -> None:
    code = """
from pspnet.compilation import require_compiler
from pspnet.errors import InputError
try:
    require_compiler("cpu")
except InputError as error:
    print(error)
"""
    environment = os.environ | {"PATH": "", "CXX": str(tmp_path / "no-compiler")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "Install g++, or set workers.compile to False" in shown.stdout
