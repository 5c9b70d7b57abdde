"""Damaged checkpoints: each kind is found and named, an older whole one is resumed from, and is never lost."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miniplm_udf.errors import CorpusError
from trainer.checkpoint import Checkpoints, SavedState


def parts(width: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def flip_one_byte(path: Path) -> None:
    raw = bytearray((path / "state.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (path / "state.pt").write_bytes(bytes(raw))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-7]),
    "empty": lambda path: (path / "state.pt").write_bytes(b""),
    "zeros": lambda path: (path / "state.pt").write_bytes(bytes((path / "state.pt").stat().st_size)),
    "one bit": flip_one_byte,
    "no tensors": lambda path: (path / "state.pt").unlink(),
    "no state": lambda path: (path / "state.json").unlink(),
    "state cut": lambda path: (path / "state.json").write_text('{"loss": '),
    "state garbage": lambda path: (path / "state.json").write_bytes(b"\xff\xfe\x00"),
    "state zeros": lambda path: (path / "state.json").write_bytes(bytes(100)),
    "state is a list": lambda path: (path / "state.json").write_text("[1]"),
    "no checksum": lambda path: (path / "state.json").write_text('{"fingerprint": "f", "steps_done": 4}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_checkpoint_is_stepped_back_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    model, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, "f", keep=2)
    checkpoints.save(SavedState(2, loss=1.0), model, optimizer)
    wanted = model.weight.detach().clone()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        model.weight.add_(1)  # type: ignore[union-attr,operator]
    checkpoints.save(SavedState(4, loss=0.5), model, optimizer)
    damage(tmp_path / "step-4")
    other, its_optimizer = parts()
    assert checkpoints.newest_whole(other, its_optimizer) == 2
    assert f"{tmp_path}/step-4 is damaged" in caplog.text
    assert checkpoints.load(2, other, its_optimizer) == SavedState(2, loss=1.0)
    assert torch.equal(other.weight, wanted)  # type: ignore[arg-type]
    # The run continues: neither the next save nor one in the damaged place loses the whole one before its time.
    checkpoints.save(SavedState(3), model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]


def test_with_no_whole_checkpoint_the_training_is_refused(tmp_path: Path) -> None:
    model, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, "f", keep=2)
    for step in (2, 4):
        checkpoints.save(SavedState(step), model, optimizer)
        flip_one_byte(tmp_path / f"step-{step}")
    with pytest.raises(
        CorpusError, match=r"step-4: state\.pt is cut .*step-2: .*delete it to train from the first step"
    ):
        checkpoints.newest_whole(model, optimizer)


def test_weights_of_another_shape_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, "f", keep=3)
    checkpoints.save(SavedState(2), *parts())
    checkpoints.save(SavedState(4), *parts(width=3))
    assert checkpoints.newest_whole(*parts()) == 2
    assert "first weight: expected shape (2, 2), found (2, 3)" in caplog.text


def test_a_save_in_the_place_of_a_damaged_one_and_what_killed_saves_left(tmp_path: Path) -> None:
    model, optimizer = parts()
    checkpoints = Checkpoints(tmp_path, "f", keep=1)
    checkpoints.save(SavedState(4), model, optimizer)
    flip_one_byte(tmp_path / "step-4")
    for name in (".step-6.tmp", ".step-2.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps({"fingerprint": "f"}))
    checkpoints.save(SavedState(4), model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert checkpoints.newest_whole(model, optimizer) == 4
