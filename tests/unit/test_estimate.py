"""Estimates from a sample: what is read of files, what a model costs, and the arithmetic from there to a corpus."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs import estimate as job
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import IngestConfig, ModelConfig, ScoreConfig
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError, CorpusError, ModelLoadError
from miniplm_udf.estimate import estimate, measure
from miniplm_udf.estimate.results import Gpus, ModelEstimate
from miniplm_udf.estimate.sample import STRATA, take_sample
from miniplm_udf.estimate.table_bytes import table_bytes
from miniplm_udf.ingestion.inputs import Inputs
from miniplm_udf.ingestion.listing import InputFile
from miniplm_udf.scoring import prefix_probe
from miniplm_udf.scoring.results import Score
from tests.support import tiny_models

CONF = Path(__file__).resolve().parents[2] / "conf"


def line(i: int, words: int = 20) -> bytes:
    return json.dumps({"id": i, "text": f"text {i} " + " ".join(f"w{(i * 7 + j) % 89}" for j in range(words))}).encode()


def write(path: Path, lines: list[bytes]) -> InputFile:
    content = b"".join(one + b"\n" for one in lines)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return InputFile(f"file://{path}", 0, len(content))


def sample_of(files: list[InputFile], sample_bytes: int) -> Any:
    return take_sample(None, Inputs("jsonl", "unused", files=tuple(files)), IngestConfig(), sample_bytes)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_small_corpus_is_read_whole(tmp_path: Path, suffix: str) -> None:
    lines = [[line(10 * n + i) for i in range(10)] for n in range(20)]
    files = [write(tmp_path / f"part{n:02}{suffix}", part) for n, part in enumerate(lines)]
    found = sample_of(files, 10**7)
    assert found.rows.column("line").to_pylist() == [one for part in lines for one in part]
    assert found.rows.column("source_file").to_pylist() == [file.path for file in files for _ in range(10)]
    assert found.scale == 1
    assert (found.n_files, found.n_tried, found.unreadable) == (20, 20, {})


@pytest.mark.slow
def test_a_large_plain_file_is_sampled_all_along(tmp_path: Path) -> None:
    lines = [line(i) for i in range(20_000)]
    file = write(tmp_path / "all.jsonl", lines)
    found = sample_of([file], 160_000)
    ids = [json.loads(one)["id"] for one in found.rows.column("line").to_pylist()]
    assert all(one in set(lines) for one in found.rows.column("line").to_pylist()), "a line was cut"
    assert len({i * STRATA // 20_000 for i in ids}) == STRATA, "no line from some part of the file"
    assert len(set(ids)) == len(ids)
    assert 120_000 < found.read_bytes < 200_000
    assert len(ids) * found.scale == pytest.approx(20_000, rel=0.05)
    assert found.rows.equals(sample_of([file], 160_000).rows)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_of_large_compressed_files_the_starts_are_read(tmp_path: Path, suffix: str) -> None:
    def noise(i: int) -> bytes:
        return json.dumps({"id": i, "text": os.urandom(150).hex()}).encode()

    files = [write(tmp_path / f"part{n}{suffix}", [noise(i) for i in range(10_000)]) for n in range(4)]
    found = sample_of(files, 2_000_000)
    assert 1_000_000 < sum(map(len, found.rows.column("line").to_pylist())) < 3_000_000
    assert found.n_tried == 4
    assert found.rows.num_rows * found.scale == pytest.approx(40_000, rel=0.25)


def test_files_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl.gz", [line(i) for i in range(10)])
    bad = write(tmp_path / "bad.jsonl.gz", [line(i) for i in range(10)])
    Path(bad.path.removeprefix("file://")).write_bytes(b"this is not gzip" * 10)
    cut = write(tmp_path / "cut.jsonl.gz", [os.urandom(500).hex().encode() for _ in range(1000)])
    whole = Path(cut.path.removeprefix("file://")).read_bytes()
    Path(cut.path.removeprefix("file://")).write_bytes(whole[: len(whole) // 2])
    found = sample_of([bad, cut, good], 10**7)
    assert set(found.unreadable) == {bad.path, cut.path}
    assert found.rows.num_rows == 10
    with pytest.raises(CorpusError, match="expected rows to sample"):
        sample_of([bad], 10**7)


def test_a_line_longer_than_the_budget_is_taken_whole(tmp_path: Path) -> None:
    lines = [line(i, words=50_000) for i in range(8)]
    found = sample_of([write(tmp_path / "long.jsonl", lines)], 16_000)
    assert found.rows.num_rows > 0
    assert set(found.rows.column("line").to_pylist()) <= set(lines)


# --- a model's cost ---


def measured(request: measure.MeasureRequest, texts: list[str]) -> measure.Measured:
    rows = [{"text": text, "segment_ends": [], "ends_document": True} for text in texts]
    return measure.measure_model(request, iter([pa.RecordBatch.from_pylist(rows, schema=measure.REQUEST_SCHEMA)]))


def request(folder: Path | None, **changes: Any) -> measure.MeasureRequest:
    config = ModelConfig(
        path=str(folder) if folder else None,
        document_separator=tiny_models.SEPARATOR,
        context_tokens=64,
        window_overlap_tokens=8,
    )
    plain: dict[str, Any] = {
        "alias": "teacher",
        "dtype": None,
        "score": ScoreConfig(tokens_per_batch=256),
        "seconds": 0.2,
    }
    return measure.MeasureRequest(config=config, **(plain | changes))


TEXTS = [f"the quick brown fox {i} jumps " * (1 + i % 9) for i in range(60)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    return tiny_models.make_model_folder(tmp_path)


def test_tokens_are_those_that_scoring_counts(folder: Path) -> None:
    from miniplm_udf.scoring.models import describe
    from miniplm_udf.workers.model_scorers import ModelScorerFactory

    found = measured(request(folder), [*TEXTS, ""])
    description = describe("teacher", request(folder).config)
    scores = ModelScorerFactory(request(folder).config, description, ScoreConfig(tokens_per_batch=256))().score(
        TEXTS, [[]] * len(TEXTS), [True] * len(TEXTS)
    )
    assert found.scored_tokens == sum(score.n_tokens for score in scores)  # type: ignore[union-attr]
    assert found.forward_tokens > found.scored_tokens, "texts of more than 64 tokens have windows that overlap"
    assert found.rejects == {"no_tokens": 1}
    assert (found.parameters, found.dtype) == (description.n_parameters, "float32")
    assert 0 < found.timed_tokens <= found.scored_tokens
    assert found.tokens_per_second > 0
    assert found.start_seconds > 0
    assert found.training_tokens_per_second is None


def test_a_job_does_not_wait_for_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(measure.time, name, lambda: now[0])

    class CompilingScorer:
        """Loads in 3 s, compiles in 50 s, and scores a text in a tenth of a second, the first batch in 2 s more."""

        tokens_per_batch = 64
        warnings: tuple[str, ...] = ()

        def __init__(self, *_: Any) -> None:
            self.n_calls = self.n_waits = 0

        def __call__(self) -> Any:
            now[0] += 3.0
            return self

        def score(self, texts: list[str], *_: Any) -> list[Score]:
            now[0] += len(texts) / 10 + (2.0 if self.n_calls == 0 else 0.0)
            self.n_calls += 1
            return [Score(1.0, 10, 1) for _ in texts]

        def finish_compiling(self) -> bool:
            self.n_waits += 1
            now[0] += 50.0 if self.n_waits == 1 else 0.0
            return self.n_waits == 1

    monkeypatch.setattr(measure, "ModelScorerFactory", CompilingScorer)
    described: Any = None
    rows = [{"text": text, "segment_ends": [], "ends_document": True} for text in TEXTS]
    timing = measure._time(ModelConfig(path="p"), described, request(None), rows)
    assert timing.start_seconds == pytest.approx(5.0)
    assert timing.tokens_per_second == pytest.approx(100.0)


def test_the_token_in_front_and_the_warning_about_it_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prefix_probe, "MARGIN_NATS", -1000.0)
    found = measured(request(tiny_models.make_bos_folder(tmp_path, "llama", "post_processor")), TEXTS[:3])
    assert found.prefix == "<bos> in front of every window (post-processor of tokenizer.json)"
    assert "the other way" in found.warnings[-1]


def test_flops_are_those_that_torch_counts(folder: Path) -> None:
    """Against torch's own counter, which counts full attention where the formula counts the causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros((1, 64), dtype=torch.int64))
    config = model.config
    width = config.num_attention_heads * config.head_dim
    in_products = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n)
    attention = 2.0 * config.num_hidden_layers * width * 64**2
    assert counter.get_total_flops() == 2 * in_products * 64 + 2 * attention
    ours = measure.forward_flops(*measure._sizes(request(folder).config, _described(folder)), [64])
    # The formula's parameters include the norms' few.
    assert ours == pytest.approx(2 * in_products * 64 + attention, rel=0.01)


def _described(folder: Path) -> Any:
    from miniplm_udf.scoring.models import describe

    return describe("teacher", request(folder).config)


@pytest.mark.slow
def test_a_model_that_is_not_trained_is_measured_with_fresh_weights(folder: Path, tmp_path: Path) -> None:
    architecture = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "tie_word_embeddings": True,
    }  # fmt: skip
    train = TrainConfig(steps=10, warmup_steps=0, batch_sequences=4, micro_batch_sequences=2)
    found = measured(
        request(None, architecture=architecture, tokenizer=request(folder).config, train=train, sequence_length=32),
        TEXTS,
    )
    vocabulary = tiny_models.make_tokenizer().get_vocab_size()
    attention, mlp, norms = 4 * 32 * 32, 3 * 32 * 48, 2 * 32
    assert found.parameters == vocabulary * 32 + 2 * (attention + mlp + norms) + 32
    assert found.scored_tokens == measured(request(folder), TEXTS).scored_tokens
    assert found.training_tokens_per_second is not None
    assert found.training_flops_per_token == 3 * (2 * found.parameters + 2 * 2 * 32 * 32)


def test_errors_come_with_their_class(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file or folder"):
        measured(request(Path("/no/such/model")), TEXTS)
    with pytest.raises(CorpusError, match="found none"):
        measured(request(folder), [""])
    with pytest.raises(ConfigError, match=r"reference\.architecture: expected keywords"):
        measured(
            request(None, architecture={"model_type": "lama"}, tokenizer=request(folder).config, train=TrainConfig()),
            TEXTS,
        )


# --- from there to a corpus ---


def test_gpu_seconds() -> None:
    assert Gpus(n=8, mfu=0.5, tflops=1000).seconds(4e15) == pytest.approx(1.0)


def test_stage_seconds_share_the_instances_and_not_the_loading(tmp_path: Path) -> None:
    model = ModelEstimate(
        parameters=1, dtype="float32", device="cpu", fresh_weights=False, tokens=1, flops=1.0, tokens_per_second=1.0,
        timed_tokens=1, start_seconds=3.0, seconds=100.0, gpu_seconds=1.0, prefix="", warnings=[],
    )  # fmt: skip
    config = ExperimentConfig(root=str(tmp_path), score=estimate_score(workers=4))
    stage = estimate._stage_estimate(config, {"a": model, "b": model})
    assert stage.model_seconds == 200.0
    assert stage.stage_seconds == 50 + 6 + estimate.SPARK_SECONDS


def estimate_score(**changes: Any) -> Any:
    from miniplm_udf.config.sections import ScoreConfig

    return ScoreConfig(**changes)


@pytest.mark.slow
def test_table_bytes_are_those_of_tables_of_that_size() -> None:
    text_bytes = [500 + i for i in range(1000)]
    two, one = ["teacher", "reference"], ["teacher"]
    small, large, alone = (table_bytes(names, text_bytes, scale) for names, scale in ((two, 1), (two, 20), (one, 20)))
    assert large["scores"] == pytest.approx(20 * small["scores"], rel=0.3)
    # Two hashes of 32 characters, and one number a model that differs from row to row.
    assert 70 < alone["scores"] / 20_000 < 110
    # The other model's rows name the same instances.
    assert 1.1 < large["scores"] / alone["scores"] < 1.9


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--sample-bytes", "0"], "--sample-bytes"), (["--mfu", "1.5"], "--mfu"), (["--gpus", "-1"], "--gpus")],
)
def test_bad_options_exit_2(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["-c", str(CONF / "demo.yaml"), *options]) == 2
    assert message in capsys.readouterr().err


def test_dry_run_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["-c", str(CONF / "demo.yaml"), "--dry-run", "pack.shards=3"]) == 0
    assert '"shards": 3' in capsys.readouterr().out


def test_numbers_for_people() -> None:
    assert [job._si(n) for n in (0, 12, 1500, 2.5e9, 7e20)] == ["0 ", "12 ", "1.5 k", "2.5 G", "700 E"]
    assert [job._time(s) for s in (0.0123, 90, 600, 9000)] == ["0.0123 s", "90 s", "10.0 min", "2.5 h"]
