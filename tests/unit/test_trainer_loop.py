"""The loop: micro-batches, ranks and restarts change nothing; the same seed gives the same weights; it learns."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from tests.support.loops import LENGTH, SEPARATOR, VOCAB, FakeSequences, make_loop, run, weights
from tests.support.trainer_roots import FAMILIES
from trainer.checkpoint import Checkpoints, SavedState
from trainer.distributed import World
from trainer.loop import Loop, StepMeasures
from trainer.state import gather


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models of some thousand weights run faster on one thread than on all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["official", "token_mean"])
@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_are_one_batch(kind: str, micro: int) -> None:
    whole, parts = make_loop(loss=kind), make_loop(loss=kind, micro_batch_sequences=micro)
    first, second = run(whole), run(parts)
    assert [m.loss for m in first] == pytest.approx([m.loss for m in second], abs=1e-5)
    # Adam forgives a gradient that is too large by a factor: the norms must agree, too.
    assert [m.gradient_norm for m in first] == pytest.approx([m.gradient_norm for m in second], rel=1e-3)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["official", "token_mean"])
def test_the_loss_is_the_stated_mean(kind: str) -> None:
    loop = make_loop(loss=kind, batch_sequences=10)
    tokens = torch.from_numpy(loop.sequences.get(np.arange(10))[0]).long()
    mask = torch.from_numpy(loop.sequences.get(np.arange(10))[1]).bool()
    with torch.no_grad():
        log_p = torch.log_softmax(loop.model(input_ids=tokens[:, :-1]).logits, -1)
    nll = -log_p.gather(2, tokens[:, 1:, None])[..., 0]
    means, everything = [], []
    for row in range(10):
        official = mask[row] & (tokens[row, :-1] != SEPARATOR)
        means.append(float(nll[row][official].mean()))
        everything += nll[row][mask[row]].tolist()
    expected = np.mean(means) if kind == "official" else np.mean(everything)
    assert run(loop)[0].loss == pytest.approx(float(expected), abs=1e-5)


class PaddedInstances:
    """Two instances of 5 and 9 tokens, padded with separators, as `pack.sequences: instance` makes them."""

    sequence_length, n_sequences = LENGTH, 2
    instances = ([7, 8, SEPARATOR, 9, 10], [5, 6, 7, 8, 9, 10, 11, 12, SEPARATOR])

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((len(rows), LENGTH + 1), SEPARATOR, "i4")
        mask = np.zeros((len(rows), LENGTH), "u1")
        for place, row in enumerate(rows):
            ids = self.instances[row]
            tokens[place, : len(ids)], mask[place, : len(ids) - 1] = ids, 1
        return tokens, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_at_the_end_of_an_instance_changes_nothing(family: str) -> None:
    loop = make_loop(architecture=FAMILIES[family], sequences=PaddedInstances(), batch_sequences=2)
    loop.model.eval()
    means = []
    for ids in PaddedInstances.instances:  # each alone, without padding: positions 0, 1, ...
        with torch.no_grad():
            log_p = torch.log_softmax(loop.model(input_ids=torch.tensor([ids[:-1]])).logits[0], -1)
        nll = [-float(log_p[i, target]) for i, target in enumerate(ids[1:]) if ids[i] != SEPARATOR]
        means.append(sum(nll) / len(nll))
    assert float(loop.step(0)[1]) == pytest.approx(sum(means) / 2, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_weights_and_it_learns(family: str) -> None:
    # GPT-2 has dropout: its random numbers must be a function of the step, too.
    first, again = (make_loop(architecture=FAMILIES[family], steps=12) for _ in range(2))
    losses = [m.loss for m in run(first)]
    assert losses == [m.loss for m in run(again)]
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(first).items())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.5)
    assert losses[-1] < losses[0] - 0.2


def test_another_seed_gives_other_weights() -> None:
    first, other = make_loop(), make_loop(seed=1)
    assert run(first)[-1].loss != run(other)[-1].loss


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_resumed_after_any_step_ends_bit_identical(tmp_path: Path, family: str) -> None:
    whole = make_loop(architecture=FAMILIES[family])
    run(whole)
    for stop in range(1, 5):
        killed = make_loop(architecture=FAMILIES[family])
        for step in range(stop):
            killed.step(step)
        tensors = gather(killed.model, killed.optimizer)
        assert tensors is not None
        Checkpoints(tmp_path, "f", keep=1).save(SavedState(stop), tensors)
        checkpoints = Checkpoints(tmp_path, "f", keep=1)
        assert checkpoints.newest_whole(killed.model) == stop
        resumed = make_loop(architecture=FAMILIES[family], resumed=(checkpoints, stop))
        run(resumed, stop)
        assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_measures() -> None:
    measures = run(make_loop(log_every_steps=2))
    assert [m.steps_done for m in measures] == [2, 4, 5]
    assert [m.tokens for m in measures] == [2 * 6 * LENGTH, 4 * 6 * LENGTH, 5 * 6 * LENGTH]
    assert measures[0].learning_rate == pytest.approx(0.01)
    assert all(m.gradient_norm > 0 and m.tokens_per_second > 0 for m in measures)


def test_saves_on_time_and_at_the_end() -> None:
    saved: list[int] = []
    make_loop().run(0, lambda m: None, lambda m: saved.append(m.steps_done))
    assert saved == [2, 4, 5]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_stop_is_the_last_step_and_is_saved(stop: int) -> None:
    loop = make_loop(log_every_steps=4, save_every_steps=4)
    seen: dict[str, list[int]] = {"ended": [], "logged": [], "saved": []}

    def ends() -> bool:
        seen["ended"].append(len(seen["ended"]) + 1)
        return len(seen["ended"]) == stop

    loop.run(0, lambda m: seen["logged"].append(m.steps_done), lambda m: seen["saved"].append(m.steps_done), ends)
    steps = [4, 5] if stop == 5 else [stop]
    assert seen == {"ended": list(range(1, stop + 1)), "logged": steps, "saved": steps}


def test_one_sequence_and_a_batch_larger_than_the_table() -> None:
    assert len(run(make_loop(sequences=FakeSequences(1)))) == 5


def test_clipping_bounds_the_update() -> None:
    free, clipped = make_loop(steps=1, warmup_steps=0), make_loop(steps=1, warmup_steps=0, gradient_clip_norm=1e-9)
    start = weights(free)
    run(free), run(clipped)
    # Adam divides by the gradient's size, so only a gradient far under adam_eps shows in the update.
    moved = [sum(float((weights(loop)[n] - v).abs().sum()) for n, v in start.items()) for loop in (free, clipped)]
    assert moved[1] < moved[0] / 10


def test_divergence_is_an_error_and_is_not_saved() -> None:
    loop = make_loop()
    with torch.no_grad():
        next(loop.model.parameters()).fill_(float("nan"))
    saved: list[StepMeasures] = []
    with pytest.raises(MiniplmError, match="at step 1 the loss is nan"):
        loop.run(0, lambda m: None, saved.append)
    assert saved == []


def test_no_target_at_all() -> None:
    sequences = FakeSequences()
    sequences.mask[:] = 0
    with pytest.raises(CorpusError, match="no target"):
        run(make_loop(sequences=sequences))


def test_fewer_sequences_than_ranks() -> None:
    one = make_loop(batch_sequences=6)
    with pytest.raises(ConfigError, match="at least one per rank"):
        Loop(one.model, one.optimizer, one.sequences, one.config, SEPARATOR, World(size=7))
