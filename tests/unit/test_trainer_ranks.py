"""Several ranks are one process: DDP, FSDP and HSDP, tied and untied, resumed on another number of ranks; they stop
after the same step, and an error of one is the error of all.
"""

import itertools
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from tests.support.loops import FakeSequences, make_loop, make_teacher, run, weights
from tests.support.ranks import run_ranks
from tests.support.trainer_roots import LLAMA
from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.loop import StepMeasures
from trainer.losses.kd_teacher import Teacher
from trainer.ranks.distributed import Agreement, Wish, World, process_group
from trainer.ranks.parallel import divide
from trainer.ranks.state import check_equal_weights, gather, gather_weights

TWO_BLOCKS = LLAMA | {"num_hidden_layers": 2}
ARCHITECTURES = {
    "tied": TWO_BLOCKS,
    "untied": TWO_BLOCKS | {"tie_word_embeddings": False},
    "distilled": TWO_BLOCKS,
}
DIVISIONS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp", "shard_ranks": 2},
}
# Four ranks have 2, 2, 2 and 1 of the 7 rows of a batch, in micro-batches of 1. The norm before clipping is about 1.
TRAIN = {"batch_sequences": 7, "micro_batch_sequences": 1, "gradient_clip_norm": 0.3}


class RecordedSequences(FakeSequences):
    """Sequences that note the rows of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[int]] = []

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.rows.append(rows.tolist())
        return super().get(rows)


def teacher_of(name: str) -> tuple[Teacher | None, float]:
    """The teacher of a model, and the share of the KL divergence in its loss."""
    return (make_teacher(), 0.5) if name == "distilled" else (None, 0.0)


def check_is_frozen(teacher: Teacher | None) -> None:
    """No rank has divided, synchronised or trained the teacher."""
    if teacher is not None:
        expected = make_teacher().model.state_dict()
        for key, value in teacher.model.state_dict().items():
            assert type(value) is torch.Tensor
            assert torch.equal(value, expected[key])


def numbers_of(measures: list[StepMeasures]) -> list[tuple[float, ...]]:
    """Norms and losses of all steps."""
    return [(m.gradient_norm, m.loss, m.lm_loss or 0.0, m.kd_loss or 0.0) for m in measures]


def _train_each_way(world: World, folder: Path) -> None:
    """Five steps in each division; rank 0 writes losses, norms and weights."""
    for name, architecture in ARCHITECTURES.items():
        for way, division in DIVISIONS.items():
            teacher, ratio = teacher_of(name)
            loop = make_loop(world, architecture, teacher=teacher, kd_ratio=ratio, **TRAIN, **division)
            measures = run(loop)
            check_is_frozen(teacher)
            state = gather_weights(loop.model)
            assert (state is None) == (world.rank > 0)
            if state is not None:
                numbers = numbers_of(measures)
                torch.save({"measures": numbers, "weights": state}, folder / f"{name}-{way}.pt")


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_train_each_way, folder, 4)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", DIVISIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_four_ranks_train_as_one(four_ranks: Path, name: str, way: str) -> None:
    teacher, ratio = teacher_of(name)
    one = make_loop(architecture=ARCHITECTURES[name], teacher=teacher, kd_ratio=ratio, **TRAIN)
    measures = numbers_of(run(one))
    assert all(norm > TRAIN["gradient_clip_norm"] for norm, *_ in measures)
    ranks = torch.load(four_ranks / f"{name}-{way}.pt")
    np.testing.assert_allclose(ranks["measures"], measures, atol=1e-4)
    assert ranks["weights"].keys() == weights(one).keys()
    for key, value in weights(one).items():
        torch.testing.assert_close(ranks["weights"][key], value, atol=1e-4, rtol=0)


def _resume_after_each_step(world: World, folder: Path) -> None:
    """Continues after each step of one process, and saves again after step 4."""
    checkpoints = Checkpoints(folder / "one", "f", keep=9)
    for way, division in DIVISIONS.items():
        for step in range(1, 5):
            sequences = RecordedSequences()
            loop = make_loop(world, TWO_BLOCKS, sequences, (checkpoints, step), **TRAIN, **division)
            losses = [m.loss for m in run(loop, step)]
            rows = world.from_all(sequences.rows)
            if world.is_first:
                (folder / f"{way}-{step}.json").write_text(json.dumps({"losses": losses, "rows": rows}))
        loop = make_loop(world, TWO_BLOCKS, None, (checkpoints, 2), **TRAIN, **division)
        loop.step(2), loop.step(3)
        tensors = gather(loop.model, loop.optimizer)
        if tensors is not None:
            Checkpoints(folder / way, "f", keep=1).save(SavedState(4), tensors)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_training_continues_on_another_number_of_ranks(tmp_path: Path, size: int) -> None:
    sequences = RecordedSequences()
    whole = make_loop(architecture=TWO_BLOCKS, sequences=sequences, **TRAIN)
    losses, checkpoints = [], Checkpoints(tmp_path / "one", "f", keep=9)
    for step in range(5):
        losses.append(float(whole.step(step)[1]))
        tensors = gather(whole.model, whole.optimizer)
        assert tensors is not None
        checkpoints.save(SavedState(step + 1), tensors)
    run_ranks(_resume_after_each_step, tmp_path, size)
    for way in DIVISIONS:
        for step in range(1, 5):
            ranks = json.loads((tmp_path / f"{way}-{step}.json").read_text())
            np.testing.assert_allclose(ranks["losses"], losses[step:], atol=1e-5)
            shares = zip(*ranks["rows"], strict=True)  # of each step
            assert [sorted(itertools.chain(*rows)) for rows in shares] == [
                sorted(rows) for rows in sequences.rows[step:]
            ]
        # And back on one process, from what the ranks saved.
        one = make_loop(None, TWO_BLOCKS, None, (Checkpoints(tmp_path / way, "f", keep=1), 4), **TRAIN)
        assert float(one.step(4)[1]) == pytest.approx(losses[4], abs=1e-5)
        for key, value in weights(whole).items():
            torch.testing.assert_close(weights(one)[key], value, atol=1e-4, rtol=0)


def _agree(world: World, folder: Path) -> None:
    """Rank 1 wishes to stop after step 2, and in a second run to fail. Each rank writes after which step it left."""
    left: list[Any] = []
    for wish in (Wish.STOP, Wish.FAIL):
        agreement = Agreement(world)
        assert agreement.now(Wish.GO_ON) is Wish.GO_ON
        for step in range(1, 6):
            agreed = agreement.after_step(wish if (world.rank, step) == (1, 2) else Wish.GO_ON)
            if agreed is not Wish.GO_ON:
                left.append([step, agreed])
                break
        assert agreement.now(Wish.STOP if world.rank == 0 else Wish.GO_ON) is Wish.STOP
    left.append(world.from_all(world.rank))
    left.append(world.first_decides(lambda: "first") if world.is_first else world.first_decides(lambda: 1 // 0))
    for other in (0, 1):
        try:
            world.together(_refuse if world.rank == other else lambda: None)
        except ConfigError as error:
            left.append(str(error))
    try:
        world.first_decides(_refuse)
    except ConfigError as error:
        left.append(str(error))
    try:
        check_equal_weights(torch.nn.Linear(world.rank + 1, 2), world)
    except CorpusError as error:
        left.append(str(error).split(":")[0])
    (folder / f"{world.rank}.json").write_text(json.dumps(left))


def _refuse() -> None:
    raise ConfigError("refused")


@pytest.mark.slow
def test_ranks_agree(tmp_path: Path) -> None:
    run_ranks(_agree, tmp_path)
    stop, fail = [3, Wish.STOP], [3, Wish.FAIL]
    common = [stop, fail, [0, 1], "first"]
    differ = "the weights of rank 1 differ from those of rank 0 before the first step"
    expected = [
        [*common, "refused", "rank 1: refused", "refused", differ],
        [*common, "rank 0: refused", "refused", "refused", differ],
    ]
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == expected


def test_one_rank_agrees_with_itself() -> None:
    agreement = Agreement(World())
    assert [agreement.after_step(wish) for wish in (Wish.GO_ON, Wish.STOP)] == [Wish.GO_ON, Wish.STOP]
    with pytest.raises(ConfigError, match=r"^refused$"):
        World().together(_refuse)


def test_shards_that_do_not_fit_the_ranks() -> None:
    config = make_loop(parallel="hsdp", shard_ranks=3).config
    with pytest.raises(
        ConfigError, match=r"^train\.shard_ranks: expected a divisor of the number of ranks \(4\), found 3"
    ):
        divide(torch.nn.Linear(1, 1), config, World(size=4))
    with pytest.raises(
        ConfigError, match=r"^train\.shard_ranks: expected null, or at least 1 with train\.parallel: hsdp"
    ):
        make_loop(shard_ranks=2)


def _diverge(world: World, folder: Path) -> None:
    loop = make_loop(world)
    run(loop)
    world.from_first("the last collective")
    raise MiniplmError("diverged")


def _end_alone(world: World, folder: Path) -> None:
    if world.rank == 1:
        raise MiniplmError("the disk of rank 1 is gone")
    make_loop(world).step(0)


@pytest.mark.slow
def test_ranks_that_fail_do_not_hang(tmp_path: Path) -> None:
    run_ranks(_diverge, tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["diverged, 0 alive"] * 2
    run_ranks(_end_alone, tmp_path)
    assert (tmp_path / "0.txt").read_text().startswith("rank 0 lost the connection to another rank, whose message")


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ConfigError) as raised, process_group():
            pass
    message = str(raised.value)
    assert message.startswith(f"MASTER_PORT: the ranks cannot meet at 127.0.0.1:{port}: the port is in use; set ")
    assert "\n" not in message


def test_variables_of_no_launcher_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE is 2, but .* RANK .*start several processes with torchrun"):
        process_group().__enter__()
