"""Laws of checkpoint.py: what was saved is what is loaded, and nothing damaged is ever loaded."""

import json
import math
from pathlib import Path

import pytest
import torch

from pspnet.errors import InputError
from segfleet import checkpoint
from segfleet.checkpoint import (
    DamagedCheckpointError,
    best_checkpoint,
    checkpoint_folders,
    checkpoint_path,
    load_checkpoint,
    newest_good,
    retain,
    save_checkpoint,
)


def trained() -> tuple[torch.nn.Module, torch.optim.SGD]:
    """A module with a parameter that has a momentum and one that has none, and a buffer."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(
        [{"params": module[0].parameters(), "lr": 0.1}, {"params": module[2].parameters(), "lr": 1.0}],
        momentum=0.9,
    )
    module[2].weight.requires_grad_(False)
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def saved(folder: Path, *, miou: float | None = 0.5) -> Path:
    module, optimizer = trained()
    state = {"epoch": 1, "metrics": {"miou": miou}, "config": {"optim": {"base_lr": 0.1}}}
    return save_checkpoint(
        folder, model_state=module.state_dict(), optimizer_state=optimizer.state_dict(), state=state
    )


def test_loading_returns_what_was_saved(tmp_path: Path) -> None:
    module, optimizer = trained()
    loaded = load_checkpoint(saved(tmp_path / "epoch_0001"))
    expected = module.state_dict()
    assert loaded.model_state.keys() == expected.keys()
    assert all(torch.equal(loaded.model_state[name], tensor) for name, tensor in expected.items())
    assert loaded.state == {"epoch": 1, "metrics": {"miou": 0.5}, "config": {"optim": {"base_lr": 0.1}}}

    _, fresh = trained()
    fresh.load_state_dict(loaded.optimizer_state)
    assert fresh.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for number, values in optimizer.state_dict()["state"].items():
        buffer = fresh.state_dict()["state"][number]["momentum_buffer"]
        assert torch.equal(buffer, values["momentum_buffer"])


def test_a_number_that_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "epoch_0001", miou=math.nan))
    assert loaded.state["metrics"]["miou"] is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped byte", "cut", "empty", "missing"])
def test_any_damage_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    path = saved(tmp_path / "epoch_0001") / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"flipped byte": bytes(content), "cut": bytes(content[:-1]), "empty": b""}[damage])
    with pytest.raises(DamagedCheckpointError, match=name):
        load_checkpoint(tmp_path / "epoch_0001")


def test_newest_good_passes_over_damaged_ones_and_says_so(tmp_path: Path) -> None:
    for epoch in (1, 2, 9, 10):
        saved(checkpoint_path(tmp_path, epoch))
    (tmp_path / "epoch_0010" / "manifest.json").write_text("{")
    (tmp_path / "epoch_0009" / "model.safetensors").write_bytes(b"")
    said: list[str] = []
    found = newest_good(tmp_path, say=said.append)
    assert found is not None
    assert found.path.name == "epoch_0002"
    assert len(said) == 2
    assert "epoch_0010" in said[0]
    assert "epoch_0009" in said[1]


def test_without_a_good_one_there_is_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "absent") is None
    with pytest.raises(InputError, match="must be a folder"):
        load_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("fatal_write", [1, 2, 3, 4])
def test_a_write_that_fails_leaves_the_older_checkpoint_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal_write: int
) -> None:
    before = load_checkpoint(saved(tmp_path / "epoch_0001")).model_state
    written, real = [], checkpoint._written

    def fails(path: Path, content: bytes) -> dict[str, object]:
        written.append(path)
        if len(written) == fatal_write:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(checkpoint, "_written", fails)
    with pytest.raises(OSError, match="No space"):
        saved(tmp_path / "epoch_0001")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0001"]
    after = load_checkpoint(tmp_path / "epoch_0001").model_state
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saving_again_replaces_the_older_one(tmp_path: Path) -> None:
    saved(tmp_path / "epoch_0001", miou=0.1)
    saved(tmp_path / "epoch_0001", miou=0.2)
    assert load_checkpoint(tmp_path / "epoch_0001").state["metrics"]["miou"] == 0.2
    assert len(list(tmp_path.iterdir())) == 1


def test_retain_keeps_the_two_newest_and_the_best(tmp_path: Path) -> None:
    for epoch, miou in enumerate([0.1, 0.7, 0.3, 0.7, 0.2, 0.6], start=1):
        saved(checkpoint_path(tmp_path, epoch), miou=miou)
        retain(tmp_path)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["epoch_0004", "epoch_0005", "epoch_0006"]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "epoch_0004"


def test_retain_clears_what_a_dead_writer_left(tmp_path: Path) -> None:
    saved(tmp_path / "epoch_0001")
    (tmp_path / ".aside-epoch_0002-12345678").mkdir()
    retain(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_0001"]


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    folder = saved(tmp_path / "epoch_0001")
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            header_size = int.from_bytes(content[:8], "little")
            assert json.loads(content[8 : 8 + header_size])
