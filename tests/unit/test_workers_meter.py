"""The line about a model in the log, the counts of its time, and the token budget that a scorer states."""

import dataclasses
import functools
import pickle
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.usage import ScorerUsage
from miniplm_udf.scoring.windows import windows
from miniplm_udf.workers import meter
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.meter import Clock, Meter, WorkDone, log_line
from miniplm_udf.workers.score_counts import ModelCounts, ScoreCounts
from tests.support import tiny_models
from tests.support.scorer_requests import request, texts_of

GIB = 2**30
GPU = ScorerUsage("NVIDIA H200/bfloat16", 131_072, 5e15, 989e12, int(31.2 * GIB), int(139.8 * GIB))
# 60 s of a model that worked 50 s of them.
LATEST = WorkDone(tokens=8_506_150, seconds=50.0, busy_seconds=59.82, waited_seconds=0.18, model_flops=50 * 534e12)


def test_the_line_of_a_gpu() -> None:
    assert log_line("teacher", 1_234_567_890, LATEST, GPU) == (
        "teacher: 1,234,567,890 tokens, 170,123 tokens/s, 0.54 of the peak (989 TFLOP/s), waited 0.3 % of the time, "
        "31.2 of 139.8 GiB"
    )


@pytest.mark.parametrize(
    ("latest", "usage", "missing"),
    [
        ({}, {"peak_flops_per_second": None}, "0.54 of the peak (989 TFLOP/s), "),
        ({"model_flops": None}, {"model_flops": None}, "0.54 of the peak (989 TFLOP/s), "),
        ({"busy_seconds": 0.0, "waited_seconds": 0.0}, {}, "waited 0.3 % of the time, "),
        ({}, {"memory_total_bytes": None}, " of 139.8"),
        ({}, {"memory_bytes": None}, ", 31.2 of 139.8 GiB"),
    ],
)
def test_what_is_not_known_is_left_out(latest: dict[str, Any], usage: dict[str, Any], missing: str) -> None:
    whole = log_line("m", 1, LATEST, GPU)
    assert missing in whole
    line = log_line("m", 1, dataclasses.replace(LATEST, **latest), dataclasses.replace(GPU, **usage))
    assert line == whole.replace(missing, "")


def test_a_scorer_that_states_nothing_has_a_line_too() -> None:
    assert log_line("m", 5, LATEST, None) == "m: 5 tokens, 170,123 tokens/s, waited 0.3 % of the time"


def test_totals_since_an_earlier_state() -> None:
    earlier = WorkDone(100, 1.0, 2.0, 3.0, 4.0)
    assert WorkDone(300, 2.5, 4.0, 3.5, 10.0).since(earlier) == WorkDone(200, 1.5, 2.0, 0.5, 6.0)
    assert WorkDone(300, 2.5, 4.0, 3.5, None).since(earlier).model_flops is None


class StatingScorer:
    """Scores two texts a step, and states a budget."""

    slice_bytes = 40

    def __init__(self, budget: int | None = 1000) -> None:
        self.on_progress: Any = None
        self.n_scored = 0
        self.budget = budget

    def usage(self) -> ScorerUsage:
        return ScorerUsage("chip/float32", self.budget, 1e9 * self.n_scored, 1e12, GIB, None)

    def score(self, texts: Sequence[str | None], *_: Any) -> list[Any]:
        for start in range(0, len(texts), 2):
            time.sleep(0.002)
            n = len(texts[start : start + 2])
            self.n_scored += n
            self.on_progress(10 * n)
        return [Score(1.0, 10, 1) for _ in texts]


def run(n_texts: int, budget: int | None = 1000) -> ScoreCounts:
    totals: list[ScoreCounts] = []
    batch = request(texts_of(n_texts))
    factory = functools.partial(StatingScorer, budget)
    list(score_arrow({"teacher": factory}, sink=SimpleNamespace(add=totals.append))(iter([batch])))
    return totals[0]


def test_a_line_after_each_interval(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "miniplm.workers")
    run(12)
    assert "tokens/s" not in caplog.text
    monkeypatch.setattr(meter, "_FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(meter, "_LINE_EVERY_SECONDS", 0.0)
    run(12)
    lines = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    # Slices of two or three texts. The time of the first slice is not steady, so nothing is known of its waiting.
    first = r"teacher: 20 tokens, [\d,]+ tokens/s, \d\.\d\d of the peak \(1 TFLOP/s\), 1\.0 GiB"
    last = (
        r"teacher: 120 tokens, [\d,]+ tokens/s, \d\.\d\d of the peak \(1 TFLOP/s\), waited \d+\.\d % of the time, 1\.0"
    )
    assert re.fullmatch(first, lines[0]), lines
    assert re.fullmatch(last + " GiB", lines[-1]), lines


def test_the_first_line_is_early_and_the_next_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "miniplm.workers")
    monkeypatch.setattr(meter, "_FIRST_LINE_SECONDS", 0.0)
    run(12)
    assert caplog.text.count("tokens/s") == 1


def test_a_budget_that_was_found_comes_to_the_driver() -> None:
    total = run(12)
    assert total.models["teacher"].tokens_per_batch == {"chip/float32": 1000}
    assert run(12, None).models["teacher"].tokens_per_batch == {}
    assert pickle.loads(pickle.dumps(total)) == total


def test_budgets_of_workers_add_up_to_the_smallest_of_each_kind() -> None:
    total = ModelCounts(tokens_per_batch={"a": 8, "b": 16})
    total.add(ModelCounts(tokens_per_batch={"b": 4, "c": 2}))
    other = ModelCounts(tokens_per_batch={"b": 32})
    total.add(other)
    assert total.tokens_per_batch == {"a": 8, "b": 4, "c": 2}
    assert other.tokens_per_batch == {"b": 32}


def test_time_in_a_scorer_and_between_two_slices() -> None:
    clock, counts = Clock(), ScoreCounts()
    timed = Meter("m", clock, lambda: None)
    with timed.working(object(), counts):
        time.sleep(0.01)
    clock.steady = True
    time.sleep(0.01)
    with timed.working(object(), counts):
        time.sleep(0.01)
        assert clock.busy_seconds(time.monotonic()) >= 0.01
    assert counts.of("m").seconds >= 0.02
    assert (counts.of("m").tokens_per_batch, counts.waited_seconds >= 0.01) == ({}, True)
    assert 0.01 <= clock.busy_seconds(0.0) == counts.busy_seconds < counts.of("m").seconds
    assert clock.waited_seconds == counts.waited_seconds


def test_a_call_that_raises_took_time_and_was_no_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "miniplm.workers")
    now = [100.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    clock, counts, scorer = Clock(), ScoreCounts(), StatingScorer()
    clock.steady = True
    timed = Meter("m", clock, lambda: None)

    def work(error: Exception | None = None) -> None:
        now[0] += 2.0
        scorer.on_progress(10)
        if error is not None:
            raise error

    with timed.working(scorer, counts):
        work()
    now[0] += 1.0
    with pytest.raises(ValueError, match="a bad text"), timed.working(scorer, counts):
        work(ValueError("a bad text"))
    assert (counts.of("m").seconds, counts.busy_seconds, counts.waited_seconds) == (4.0, 2.0, 1.0)
    assert clock.busy_seconds(now[0] + 50.0) == 2.0, "the call has ended"
    now[0] += 10.0
    with timed.working(scorer, counts):
        work()
    assert (counts.of("m").seconds, counts.busy_seconds, counts.waited_seconds) == (6.0, 4.0, 11.0)
    assert "m: 30 tokens, 5 tokens/s, 0.00 of the peak (1 TFLOP/s), waited 73.3 % of the time" in caplog.text


def test_a_real_scorer_states_its_flops_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    scorer = tiny_models.make_scorer(tiny_models.make_model_folder(tmp_path, "llama"))
    before = scorer.usage()
    assert (before.place, before.found_tokens_per_batch, before.model_flops) == ("cpu/float32", None, 0.0)
    assert (before.peak_flops_per_second, before.memory_total_bytes) == (None, None)
    assert before.memory_bytes > 2**20
    tokens: list[int] = []
    scorer.on_progress = tokens.append
    # One window of fewer tokens than the context: FLOPs by hand.
    [score] = scorer.score(["abc def"], [[]], [True])
    sizes = scorer._sizes
    length = score.n_tokens
    expected = 2 * sizes.parameters * length + 2 * sizes.layers * sizes.width * length**2
    assert sizes.parameters > sizes.head_parameters > sizes.layers > 0 < sizes.width
    assert scorer.usage().model_flops == expected
    assert sum(tokens) == score.n_tokens
    # Windows of a longer text overlap: the output layer does not compute these tokens again.
    before = scorer.usage()
    [score] = scorer.score(["x" * 70], [[]], [True])
    lengths = [len(window) for window in windows(score.n_tokens, 24, 6)]
    assert sum(lengths) > score.n_tokens
    added = scorer.usage().model_flops - before.model_flops
    assert added == pytest.approx(sizes.forward_flops(lengths, score.n_tokens), rel=1e-9)
    assert added < 0.99 * sizes.forward_flops(lengths)
