"""The scorer process on a GPU, as a Spark worker uses it, without Spark: real models, real errors of the device.

Needs torch, transformers, pyarrow, psutil and pytest. Each process takes seconds to start, so the tests share one, and
only those that end it start another.
"""

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psutil", reason="the scorer process needs psutil")

from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.workers.arrow import score_arrow
from tests.support.gpu_device import DEVICE, ON_GPU, needs_device
from tests.support.scorer_requests import request
from tests.support.tiny_models import make_model_folder, make_tokenizer
from tests.support.watched_scorers import WatchedFactory, made, warnings

pytestmark = [pytest.mark.gpu, needs_device]
MIB = 1024 * 1024
ROWS_A_BATCH = 7
# Nats a token in float32, between batches of other shapes.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Folders of this module's own for sockets, slots and models. The path has room for a socket's name."""
    tmp_path_factory.getbasetemp()  # of the whole run, and so not in this module's node
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="node-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", folder)
        patch.setenv("TMPDIR", folder)
        patch.setenv("MINIPLM_CACHE", f"{folder}/cache")
        yield


@pytest.fixture(scope="module")
def log(node: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The log of this module's scorer processes, which end with the module."""
    log = tmp_path_factory.mktemp("log") / "log"
    yield log
    for pid in {load["pid"] for load in made(log)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {family: make_model_folder(parent, family, name=family) for family in ("llama", "qwen2")}


def make_factory(
    folder: Path, log: Path, alias: str = "teacher", dtype: str = "float32", tokens: int = 64, **options: Any
) -> WatchedFactory:
    config = ModelConfig(path=str(folder), context_tokens=64, window_overlap_tokens=16)
    settings = ScoreConfig(tokens_per_batch=tokens, compile=False)
    return WatchedFactory(config, describe(alias, config, dtype), settings, log=log, **options)


def scored_here(factory: WatchedFactory, texts: Sequence[str]) -> list[Any]:
    """The scores of this process, which takes no slot of the GPU."""
    config, description = factory.config, factory.description
    model = load_model(config, description, DEVICE)
    budget = factory.settings.tokens_per_batch
    scorer = Scorer(model, load_tokenizer(model_folder(config)), description, budget, DEVICE, compiled=False)
    return scorer.score(texts, [()] * len(texts), [False] * len(texts))


def task(factories: dict[str, WatchedFactory], texts: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The scored rows of a task, a batch at a time, as a Spark worker gets them."""
    whole = request(texts, list(factories))
    batches = iter([whole.slice(start, ROWS_A_BATCH) for start in range(0, len(texts), ROWS_A_BATCH)])
    for scored in score_arrow(factories)(batches):
        yield scored.to_pylist()


def run(factories: dict[str, WatchedFactory], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [row for rows in task(factories, texts) for row in rows]


def check(rows: Sequence[dict[str, Any]], expected: Sequence[Any], tolerance: float = TOLERANCE) -> None:
    """Checks that there is one row for each text, in order, with its score."""
    assert [row["instance_id"] for row in rows] == [f"id{n}" for n in range(len(expected))]
    for row, score in zip(rows, expected, strict=True):
        assert isinstance(score, Score)
        assert (row["reason"], row["n_tokens"], row["n_bytes"]) == (None, score.n_tokens, score.n_bytes)
        assert abs(row["nll_sum_nats"] - score.nll_sum_nats) <= tolerance * score.n_tokens


def texts_of(n: int) -> list[str]:
    """Texts of 10 to 150 tokens, each with its own score."""
    return [f"the quick brown fox {number} jumps over " + "the lazy dog, " * (number % 12) for number in range(n)]


def test_scores_of_a_process_are_those_of_this_one(folders: dict[str, Path], log: Path) -> None:
    factory, texts = make_factory(folders["llama"], log), texts_of(60)
    expected = scored_here(factory, texts)
    assert len({round(score.nll_sum_nats, 3) for score in expected}) == len(texts)
    for _ in range(2):
        check(run({"teacher": factory}, texts), expected)
    (load,) = made(log)
    assert load["pid"] != os.getpid()
    assert (load["device"], load["dtype"]) == (DEVICE, "torch.float32")


def test_two_models_share_a_process_and_a_gpu(folders: dict[str, Path], log: Path) -> None:
    texts, n_loads = texts_of(40), len(made(log))
    factories = {
        "teacher": make_factory(folders["llama"], log),
        "reference": make_factory(folders["qwen2"], log, "reference"),
    }
    rows = run(factories, texts)
    for alias, factory in factories.items():
        check([row for row in rows if row["model_id"] == alias], scored_here(factory, texts))
    # In the other order too: no model was dropped for the other one.
    rows = run(dict(reversed(factories.items())), texts)
    assert len(rows) == 2 * len(texts)
    loads = made(log)[n_loads:]
    assert "reference" in {load["alias"] for load in loads}
    assert len(loads) <= 2
    assert len({load["pid"] for load in [*made(log)[-2:], *loads]}) == 1


def test_auto_is_settled_at_the_first_scoring_and_kept(folders: dict[str, Path], log: Path) -> None:
    config = ModelConfig(path=str(folders["llama"]), context_tokens=64, window_overlap_tokens=16)
    settled, other = ("bfloat16", "float32") if ON_GPU else ("float32", "bfloat16")
    first = describe("teacher", config)
    assert first.dtype == settled
    # The record of the first scoring, as the driver reads it back.
    record = ModelDescription.from_dict(first.to_dict())
    assert describe("teacher", config, record.dtype) == first
    # A root that was first scored on the other kind of machine keeps the dtype of that machine.
    elsewhere = describe("teacher", config, other)
    assert (elsewhere.dtype, elsewhere.model_revision != first.model_revision) == (other, True)
    texts, scores = texts_of(20), {}
    for description in (first, elsewhere):
        factory = make_factory(folders["llama"], log, dtype=description.dtype)
        assert factory.description.model_revision == description.model_revision
        rows = run({"teacher": factory}, texts)
        assert made(log)[-1]["dtype"] == f"torch.{description.dtype}"
        # Batches may have other shapes here, and bfloat16 rounds each by itself.
        check(rows, scored_here(factory, texts), 0.05 if description.dtype == "bfloat16" else TOLERANCE)
        scores[description.dtype] = [row["nll_sum_nats"] for row in rows]
    assert all(one != two for one, two in zip(scores["float32"], scores["bfloat16"], strict=True))


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, log: Path) -> None:
    """About 20,000 tokens in a batch, each with 4,096 activations of 4 bytes, with room for 500 MiB."""
    folder, texts = make_model_folder(tmp_path, "llama", intermediate_size=4096), texts_of(600)
    expected = scored_here(make_factory(folder, log, tokens=1024), texts)
    n_warnings, n_loads = len(warnings(log)), len(made(log))
    check(run({"teacher": make_factory(folder, log, tokens=65_536, free_bytes=500 * MIB)}, texts), expected)
    new_warnings = warnings(log)[n_warnings:]
    assert any("does not fit in memory: halved" in warning for warning in new_warnings), new_warnings
    assert len(made(log)) == n_loads + 1, "the process did not end"


def test_a_killed_process_is_replaced_and_no_row_is_lost(folders: dict[str, Path], log: Path) -> None:
    factory, texts = make_factory(folders["llama"], log), texts_of(300)
    expected = scored_here(factory, texts)
    batches = task({"teacher": factory}, texts)
    rows = next(batches)
    # A few slices are sent at a time, so most are not answered yet.
    assert len(rows) < len(texts) / 2
    (killed,) = {load["pid"] for load in made(log)[-1:]}
    os.kill(killed, signal.SIGKILL)
    rows += [row for batch in batches for row in batch]
    check(rows, expected)
    load = made(log)[-1]
    assert load["pid"] != killed
    assert load["device"] == DEVICE


def test_a_text_that_loses_the_device_is_rejected(folders: dict[str, Path], log: Path) -> None:
    """An id outside the embedding: CUDA's kernel asserts, and the process can use the GPU no more."""
    fatal_id = make_tokenizer().token_to_id("~")
    factory = make_factory(folders["llama"], log, fatal_id=fatal_id)
    # Each death costs a start, so there are two texts: after two deaths they are scored one by one.
    texts = [*texts_of(1), "a text with ~ in it"]
    expected = scored_here(factory, texts[:1])
    n_loads = len(made(log))
    rows = run({"teacher": factory}, texts)
    check(rows[:1], expected)
    rejected, loads = rows[1], made(log)[n_loads:]
    assert (rejected["instance_id"], rejected["nll_sum_nats"]) == ("id1", None)
    if ON_GPU:
        assert rejected["reason"] == "scorer_crashed"
        assert "exit code 70" in rejected["detail"]
        assert "CUDA error" in rejected["detail"]
        assert len({load["pid"] for load in loads}) >= 2, "another process took over"
        assert {load["device"] for load in loads} == {DEVICE}
    else:
        assert (rejected["reason"], rejected["detail"][:10]) == ("scorer_error", "IndexError")
        assert len(loads) == 1
