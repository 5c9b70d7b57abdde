"""The loops that scoring is timed against score what the Scorer scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import plain_loops, tiny_models

TEXTS = ["the quick brown fox", "hello world, this is a test of the tokenizer!", "a  b", "the lazy dog. " * 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop",
    [
        lambda model, ids: plain_loops.padded(model, ids, context=64, batch_size=3),
        lambda model, ids: plain_loops.sorted_by_length(model, ids, 3),
        lambda model, ids: [plain_loops.official(model, [row], 3)[0] for row in ids],
    ],
    ids=["padded", "sorted", "official"],
)
def test_a_plain_loop_scores_as_the_scorer(tmp_path: Path, loop: Callable[[Any, list[list[int]]], list[float]]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_models.make_model_folder(tmp_path)
    scorer = tiny_models.make_scorer(folder)
    tokenizer = tiny_models.make_tokenizer()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    expected = scorer.score(TEXTS, [[]] * len(TEXTS), [False] * len(TEXTS))
    found = loop(AutoModelForCausalLM.from_pretrained(folder).eval(), ids)
    assert found == pytest.approx([one.nll_sum_nats for one in expected], abs=1e-3)


@pytest.mark.slow
def test_the_gpu_benchmark_runs(tmp_path: Path) -> None:
    """Its code, on whatever device is here: the numbers of a model this small say nothing."""
    from tests.bench import bench_gpu

    assert bench_gpu.main(["--size", "tiny", "--instances", "3", "--results", str(tmp_path)]) == 0
    assert '"utilisation_tiny"' in (tmp_path / "gpu.json").read_text()
