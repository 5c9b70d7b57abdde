"""The loops that scoring is timed against score what the Scorer scores."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench import bench_gpu
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
def test_the_gpu_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its eager rows, on the CPU: the numbers of a model this small say nothing, and compilation takes a minute."""
    monkeypatch.setattr(bench_gpu, "_GROUPS", bench_gpu._GROUPS[:1])
    peaks = {"bfloat16": 1e12, "float8": 2e12}
    monkeypatch.setattr(bench_gpu, "peak_flops_per_second", lambda device, dtype: peaks[dtype])
    assert bench_gpu.main(["--size", "tiny", "--instances", "3", "--results", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["variant"] for row in written["rows"][2:]] == ["official loop", "eager", "float8, eager"]
    assert all(row["of_matmul"] > 0 and row["vs_official"] > 0 for row in written["rows"][2:])
    for row in written["rows"]:
        peak = 2.0 if "float8" in row["variant"] else 1.0
        assert row["of_peak"] == pytest.approx(row["tflop_per_s"] / peak)
    assert 0 < written["rows"][-1]["largest_difference"] < 0.1
    assert written["environment"][0].keys() == {"device", "torch", "transformers"}
    assert "utilisation, tiny, eager" in written["ratios"]


def test_a_bench_runs_without_the_official_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager row has the attention of the scorer. Without a known peak the row has no `of_peak`."""
    bench = bench_gpu.Bench("tiny", "cpu", 2, bench_gpu.Rates(matmul=1e12))
    assert bench._model.config._attn_implementation == "sdpa"
    row = bench.run(bench_gpu._EAGER)
    assert bench._model.config._attn_implementation != "sdpa"
    assert "of_peak" not in row
    assert row["of_matmul"] > 0


def test_a_new_start_has_new_functions() -> None:
    from miniplm_udf.scoring.compilation import CompiledLayers

    model = bench_gpu.make_model("tiny", "cpu")
    first = CompiledLayers(model.model)
    bench_gpu.forget_compiled_code(model)
    assert set(first._functions).isdisjoint(CompiledLayers(model.model)._functions)


def test_rows_without_time_or_with_an_error_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_gpu, "_LEAST_SECONDS", 0.0)
    table = bench_gpu.Table(0.3, tmp_path)

    def fails() -> dict[str, Any]:
        raise ValueError("no such kernel")

    def never_ends() -> dict[str, Any]:
        while True:
            try:
                time.sleep(0.01)
            except Exception as error:
                raise RuntimeError("a library's own error") from error

    assert table.measure("tiny", "first", lambda: {"tokens_per_s": 12345.6}) is not None
    assert table.measure("tiny", "second", fails) is None
    assert table.measure("tiny", "third", never_ends) is None
    assert table.measure("tiny", "fourth", lambda: {"tokens_per_s": 1.0}) is None
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "12,346" in lines[0]
    assert "failed: ValueError: no such kernel" in lines[1]
    assert all("skipped: the time is over" in line for line in lines[2:])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 4
    assert table.n_failed == 1
