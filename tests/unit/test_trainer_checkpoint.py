"""Checkpoints: damages are found and named, an older whole one is never lost, and a thread writes what the step had."""

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError, MiniplmError
from tests.support.full_disk import largest_file
from tests.support.s3_server import BUCKET, RequestFault, S3Server
from tests.support.trainer_roots import LLAMA
from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.checkpoints.checkpoint_writer import CheckpointWriter
from trainer.checkpoints.mirror import Mirror
from trainer.models.model import build_model, model_config
from trainer.ranks.state import Tensors, gather, gather_weights


def trained(width: int = 2) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A model after one step, and its optimiser."""
    model = torch.nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    return model, optimizer


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    tensors = gather(model, optimizer)
    assert tensors is not None
    return tensors


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
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, "f", keep=2)
    checkpoints.save(SavedState(2, loss=1.0), tensors_of(model, optimizer))
    wanted = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    checkpoints.save(SavedState(4, loss=0.5), tensors_of(model, optimizer))
    damage(tmp_path / "step-4")
    assert checkpoints.newest_whole(trained()[0]) == 2
    assert f"{tmp_path}/step-4 is damaged" in caplog.text
    state, tensors = checkpoints.load(2)
    assert state == SavedState(2, loss=1.0)
    assert torch.equal(tensors["model"]["weight"], wanted)
    # The run continues: neither the next save nor one in the damaged place loses the whole one before its time.
    checkpoints.save(SavedState(3), tensors_of(model, optimizer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]


def test_with_no_whole_checkpoint_the_training_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, "f", keep=2)
    for step in (2, 4):
        checkpoints.save(SavedState(step), tensors_of(model, optimizer))
        flip_one_byte(tmp_path / f"step-{step}")
    with pytest.raises(
        CorpusError, match=r"step-4: state\.pt is cut .*step-2: .*delete it to train from the first step"
    ):
        checkpoints.newest_whole(model)


def test_weights_of_another_shape_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path, "f", keep=3)
    checkpoints.save(SavedState(2), tensors_of(*trained()))
    checkpoints.save(SavedState(4), tensors_of(*trained(width=3)))
    assert checkpoints.newest_whole(trained()[0]) == 2
    assert "first weight: expected shape (2, 2), found (2, 3)" in caplog.text


def test_a_save_in_the_place_of_a_damaged_one_and_what_killed_saves_left(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, "f", keep=1)
    checkpoints.save(SavedState(4), tensors_of(model, optimizer))
    flip_one_byte(tmp_path / "step-4")
    for name in (".step-6.tmp", ".step-2.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(json.dumps({"fingerprint": "f"}))
    checkpoints.save(SavedState(4), tensors_of(model, optimizer))
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]
    assert checkpoints.newest_whole(model) == 4


def test_the_settings_that_differ_from_an_unfinished_training_are_named(tmp_path: Path) -> None:
    model, optimizer = trained()
    old = Checkpoints(tmp_path, "old", keep=2, settings={"train.seed": "1", "train.steps": "9", "tokenizer": "t"})
    old.save(SavedState(9), tensors_of(model, optimizer))
    new = Checkpoints(tmp_path, "new", keep=2, settings={"train.seed": "2", "tokenizer": "t", "architecture.x": "3"})
    with pytest.raises(CorpusError) as refused:
        new.newest_whole(model)
    assert (
        "unfinished training: it has train.seed 1 (now 2), train.steps 9 (now no value), architecture.x no value "
        f"(now 3); go back to these values to resume it, or delete {tmp_path}"
    ) in str(refused.value)


def test_only_finished_trainings_are_replaced(tmp_path: Path) -> None:
    model, optimizer = trained()
    Checkpoints(tmp_path, "old", keep=2).save(SavedState(9), tensors_of(model, optimizer))
    with pytest.raises(CorpusError, match=r"step-9 is the checkpoint of another, unfinished training: .* delete "):
        Checkpoints(tmp_path, "new", keep=2).newest_whole(model)
    assert [path.name for path in tmp_path.iterdir()] == ["step-9"]
    mine = Checkpoints(tmp_path, "new", keep=2, replaceable=("old",))
    assert mine.newest_whole(model) is None
    for step in (2, 4, 10):
        mine.save(SavedState(step, seconds=1.5, loss=step), tensors_of(model, optimizer))
    (tmp_path / "step-12").mkdir()  # without state.json: not whole
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-10", "step-12", "step-4"]
    assert mine.newest_whole(model) == 10
    assert mine.load(10)[0] == SavedState(10, seconds=1.5, loss=10)


@pytest.mark.parametrize("width", [2, 3000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, width: int) -> None:
    model, optimizer = trained(width)
    checkpoints = Checkpoints(tmp_path, "f", keep=1)
    checkpoints.save(SavedState(2), tensors_of(model, optimizer))
    with largest_file(1000), pytest.raises(MiniplmError) as raised:
        checkpoints.save(SavedState(4), tensors_of(model, optimizer))
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/step-4: cannot be written (")
    assert "step-2 is whole, and the same command resumes from it" in message
    assert "train.keep_checkpoints" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert checkpoints.newest_whole(model) == 2


class SlowCheckpoints(Checkpoints):
    """Saves when it is told to, and fails at the steps that it is told."""

    def __init__(self, folder: Path, fails: tuple[int, ...] = ()) -> None:
        super().__init__(folder, "f", keep=1)
        self.may_save, self.fails = threading.Event(), fails

    def save(self, state: SavedState, tensors: Tensors) -> Path:
        assert self.may_save.wait(60)
        if state.steps_done in self.fails:
            raise MiniplmError(f"step {state.steps_done} cannot be written")
        return super().save(state, tensors)


def test_a_save_in_the_thread_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoints = SlowCheckpoints(tmp_path)
    with CheckpointWriter(checkpoints) as writer:
        at_the_save = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        writer.save(SavedState(1), tensors_of(model, optimizer))
        model(torch.ones(1, 2)).sum().backward()  # the next step, before the thread has written a byte
        optimizer.step()
        writer.check()
        assert not list(tmp_path.iterdir())
        checkpoints.may_save.set()
    assert writer.saved == SavedState(1)
    _, tensors = checkpoints.load(1)
    assert not torch.equal(model.weight, at_the_save[0]["weight"])
    for number, name in enumerate(("weight", "bias")):
        assert torch.equal(tensors["model"][name], at_the_save[0][name])
        for part in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(tensors["optimizer"]["state"][name][part], at_the_save[1][number][part])


def train_until(end: str, writer: CheckpointWriter, tensors: Tensors) -> None:
    """Saves two steps, and then goes on in the way that `end` names until the writer raises."""
    with writer:
        writer.save(SavedState(1), tensors)
        writer.save(SavedState(2), tensors)
        while end == "check":
            writer.check()
        if end == "save":
            writer.save(SavedState(3), tensors)
        if end == "finish":
            writer.finish()


def test_an_error_of_the_thread_comes_to_the_training(tmp_path: Path) -> None:
    tensors = tensors_of(*trained())
    for end in ("check", "save", "finish", "exit"):
        checkpoints = SlowCheckpoints(tmp_path / end, fails=(2,))
        checkpoints.may_save.set()
        writer = CheckpointWriter(checkpoints)
        with pytest.raises(MiniplmError, match="step 2 cannot be written"):
            train_until(end, writer, tensors)
        assert writer.saved == SavedState(1)
        assert [path.name for path in (tmp_path / end).iterdir()] == ["step-1"]


def save_and_fail(writer: CheckpointWriter, step: int) -> None:
    with writer:
        writer.save(SavedState(step), tensors_of(*trained()))
        raise KeyError("of the training")


def test_a_save_ends_even_if_the_training_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = SlowCheckpoints(tmp_path, fails=(2,))
    checkpoints.may_save.set()
    for step in (1, 2):
        with pytest.raises(KeyError, match="of the training"):
            save_and_fail(CheckpointWriter(checkpoints), step)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert "step 2 cannot be written" in caplog.text


def test_tied_weights_are_one_tensor_in_the_file(tmp_path: Path) -> None:
    shape = model_config(LLAMA, where="x", vocab_size=40, separator_id=3, max_positions=12)
    model = build_model(shape, where="x", seed=0)
    weights = gather_weights(model)
    assert weights is not None
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert weights["lm_head.weight"].data_ptr() != model.lm_head.weight.data_ptr()


def mirrored(folder: Path, uri: str, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, "f", keep=keep, mirror=Mirror(uri))


@pytest.fixture
def remote(s3: S3Server, tmp_path: Path) -> str:
    s3.reset()
    return f"s3a://{BUCKET}/{tmp_path.name}/train"


def test_another_machine_goes_on_from_the_copy_on_the_root(remote: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    first = mirrored(tmp_path / "a", remote)
    first.fetch()
    training = first.tracking_id()
    for step in (2, 4, 6):
        first.save(SavedState(step, loss=float(step)), tensors_of(model, optimizer))
    assert storage.list_folder(remote) == ["run.json", "step-4", "step-6"]
    second = mirrored(tmp_path / "b", remote)
    second.fetch()
    assert second.newest_whole(trained()[0]) == 6
    assert second.tracking_id() == training
    state, tensors = second.load(6)
    assert state == SavedState(6, loss=6.0)
    assert torch.equal(tensors["model"]["weight"], model.weight)
    second.save(SavedState(8), tensors_of(model, optimizer))
    # The first machine has steps of its own, older than those of the second.
    first.fetch()
    assert first.newest_whole(trained()[0]) == 8


@pytest.mark.parametrize("name", ["state.pt", "state.json"])
def test_a_step_that_was_not_copied_whole_is_passed_over(remote: str, s3: S3Server, tmp_path: Path, name: str) -> None:
    model, optimizer = trained()
    first = mirrored(tmp_path / "a", remote)
    first.tracking_id()
    first.save(SavedState(2), tensors_of(model, optimizer))
    s3.add_fault(RequestFault("denied", method="PUT|POST", path=f"step-4/{name}"))
    with pytest.raises(MiniplmError, match=rf"^{remote}: the checkpoints cannot be written: object storage: .* lack a"):
        first.save(SavedState(4), tensors_of(model, optimizer))
    second = mirrored(tmp_path / "b", remote)
    second.fetch()
    assert second.newest_whole(trained()[0]) == 2
    # On the first machine the step is whole.
    s3.reset()
    first.fetch()
    assert first.newest_whole(trained()[0]) == 4
    second.save(SavedState(3), tensors_of(model, optimizer))
    assert storage.list_folder(remote) == ["run.json", "step-2", "step-3"]


def test_a_damaged_copy_is_passed_over(remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = trained()
    first = mirrored(tmp_path / "a", remote)
    first.tracking_id()
    for step in (2, 4):
        first.save(SavedState(step), tensors_of(model, optimizer))
    storage.write_text(f"{remote}/step-4/state.pt", "cut")
    second = mirrored(tmp_path / "b", remote)
    second.fetch()
    assert second.newest_whole(trained()[0]) == 2
    assert "step-4 is damaged" in caplog.text


def test_a_training_that_began_again_elsewhere_replaces_local_steps(remote: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    first, second = mirrored(tmp_path / "a", remote), mirrored(tmp_path / "b", remote)
    first.tracking_id()
    first.save(SavedState(40), tensors_of(model, optimizer))
    second.fetch()
    second.replace("old model")
    second.tracking_id()
    second.save(SavedState(2), tensors_of(model, optimizer))
    assert storage.list_folder(remote) == ["run.json", "step-2"]
    first.fetch()
    assert first.newest_whole(trained()[0]) == 2
