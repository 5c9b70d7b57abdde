"""The loop: micro-batches, ranks and restarts change nothing; the same seed gives the same weights; it learns."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError
from tests.support.loops import LENGTH, SEPARATOR, VOCAB, FakeSequences, make_loop, run, weights
from tests.support.no_wait import NoWait
from tests.support.trainer_roots import FAMILIES
from trainer import loop as loop_module
from trainer.checkpoints.checkpoint import Checkpoints, SavedState
from trainer.loop import Loop, StepMeasures
from trainer.models.blocks import prepare_blocks
from trainer.models.flops import training_flops_per_token
from trainer.ranks.distributed import World
from trainer.ranks.state import gather


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


@pytest.mark.slow
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

    sequence_length, n_sequences, group_rows = LENGTH, 2, np.array([2])
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_speed_is_that_of_the_last_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 10.0, 1.0, 3.0, 1.0])  # of each step
    now = 100.0

    def step(number: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        nonlocal now
        now += next(seconds)
        return 0.01, torch.ones(1), torch.tensor(1.0)

    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: now)
    monkeypatch.setattr(loop_module, "peak_flops_per_second", lambda device, dtype: 1e6)
    loop = make_loop(log_every_steps=2, save_every_steps=3)
    monkeypatch.setattr(loop, "step", step)
    logged, saved = [], []
    loop.run(0, logged.append, saved.append)
    tokens = 6 * LENGTH
    assert [m.tokens_per_second for m in logged] == [2 * tokens / 20, 2 * tokens / 4, tokens / 1]
    assert [m.tokens_per_second for m in saved] == [tokens / 1, tokens / 1]
    flops = training_flops_per_token(loop.model, LENGTH)
    assert [m.mfu for m in logged] == pytest.approx([m.tokens_per_second * flops / 1e6 for m in logged])


def test_without_a_known_peak_there_is_no_mfu() -> None:
    assert {m.mfu for m in run(make_loop())} == {None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_does_not_wait_for_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"micro_batch_sequences": 2, "log_every_steps": 100, "save_every_steps": 100}
    loop = make_loop(architecture=FAMILIES[family], **settings)
    loop.model.config.use_cache = False  # as the trainer does; with a cache, transformers does not look for documents
    prepare_blocks(loop.module, loop.config, LENGTH, "x")  # type: ignore[arg-type]
    with NoWait():
        loop.step(0)
        loop.step(1)
    read: list[int] = []
    monkeypatch.setattr(loop, "_read", lambda losses, norm: read.append(len(losses)) or [0.0] * (len(losses) + 1))
    with NoWait():
        loop.run(0, lambda m: None, lambda m: None)
    assert read == [1]  # at the last step, which is logged and saved
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="waits"), NoWait():
        float(loop.step(2)[1])


def test_saves_on_time_and_at_the_end() -> None:
    saved: list[int] = []
    make_loop().run(0, lambda m: None, lambda m: saved.append(m.steps_done))
    assert saved == [2, 4, 5]


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_stop_is_the_last_step_and_is_saved(stop: int) -> None:
    loop = make_loop(log_every_steps=4, save_every_steps=4)
    asked: list[int] = []
    logged: list[int] = []
    saved: list[int] = []

    def ends() -> bool:
        asked.append(len(asked) + 1)
        return len(asked) == stop

    loop.run(0, lambda m: logged.append(m.steps_done), lambda m: saved.append(m.steps_done), ends)
    assert asked == list(range(1, stop + 1))
    assert logged == ([4, 5] if stop == 5 else [])
    assert saved == ([4, 5] if stop == 5 else [stop])


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
    with pytest.raises(MiniplmError, match="at step 1 the loss or"):
        loop.run(0, lambda m: None, saved.append)
    assert saved == []


def test_the_first_bad_step_is_named_with_its_rows_though_later_steps_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(log_every_steps=5, save_every_steps=4, gradient_clip_norm=0)
    step, done = loop.optimizer.step, 0

    def spoil() -> None:
        nonlocal done
        step()
        done += 1
        if done == 2:
            with torch.no_grad():
                next(loop.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr(loop.optimizer, "step", spoil)
    saved: list[StepMeasures] = []
    rows = ", ".join(str(row) for row in loop.batches.rows(2))
    with pytest.raises(MiniplmError, match=rf"at step 3 the loss or .*packed table .sequence_id.: {rows}$"):
        loop.run(0, saved.append, saved.append)
    assert (saved, done) == ([], 4)  # step 4 would have saved


def test_diverged_weights_are_not_evaluated() -> None:
    loop = make_loop(evaluate_every_steps=2, log_every_steps=2)
    with torch.no_grad():
        next(loop.model.parameters()).fill_(float("nan"))
    evaluated: list[int] = []
    with pytest.raises(MiniplmError, match="at step 1 the loss or"):
        loop.run(0, lambda m: None, lambda m: None, on_evaluate=evaluated.append)
    assert evaluated == []


def test_no_target_at_all() -> None:
    sequences = FakeSequences()
    sequences.mask[:] = 0
    with pytest.raises(CorpusError, match=r"^step 1: a batch has no target: .*\(rows "):
        run(make_loop(sequences=sequences))


def test_fewer_sequences_than_ranks() -> None:
    one = make_loop(batch_sequences=6)
    with pytest.raises(ConfigError, match="at least one per rank"):
        Loop(one.module, one.optimizer, one.sequences, one.config, SEPARATOR, World(size=7))
