"""The notebooks run from top to bottom, in their own kernels, on a small real experiment; they show what it holds."""

import json
import math
import re
from typing import Any

import pyarrow.parquet as pq
import pytest

from docs.site.execute import NOTEBOOKS, execute
from miniplm_udf import storage
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.layout import Root
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.store.delta_files import parquet_files
from miniplm_udf.store.delta_log import newest_version
from tests.support.scaling_losses import PAPER
from tests.support.user_corpus import Experiment

pytestmark = pytest.mark.long
STAGES = 9
MIN_TOKENS = 32


def run(experiment: Experiment, name: str) -> str:
    """Everything that a notebook printed or showed; an image is `<png>`."""
    variables = {"MINIPLM_ROOT": str(experiment.root), "MLFLOW_TRACKING_URI": ""}
    notebook = execute(NOTEBOOKS / f"{name}.ipynb", NOTEBOOKS, **variables)
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            image = "<png>" if "image/png" in data else ""
            texts.append(output.get("text", "") + data.get("text/plain", "") + image)
    return "\n".join(texts)


def rows(experiment: Experiment, name: str, version: int | None = None) -> list[dict[str, Any]]:
    """The rows of a table, read without Spark."""
    uri = Root(storage.to_uri(str(experiment.root))).table(*name.split("/"))
    return list(pq.ParquetDataset(parquet_files(uri, version)).read().to_pylist())


def version_of(experiment: Experiment, name: str) -> int | None:
    return newest_version(Root(storage.to_uri(str(experiment.root))).table(*name.split("/")))


def difference(row: dict[str, Any]) -> float:
    return float(row["reference_nll_mean"] - row["teacher_nll_mean"])


def candidates(experiment: Experiment) -> list[dict[str, Any]]:
    """The pool's texts of at least 32 tokens, the highest difference first."""
    matrix = [row for row in rows(experiment, "score_matrix") if row["teacher_n_tokens"] >= MIN_TOKENS]
    assert {row["split"] for row in matrix} == {"pool"}
    return sorted(matrix, key=lambda row: (-difference(row), row["instance_id"]))


def ids(rows: list[dict[str, Any]]) -> set[str]:
    return {row["instance_id"] for row in rows}


def test_scores(experiment: Experiment) -> None:
    shown = run(experiment, "1_explore_scores")
    matrix, ranking = rows(experiment, "score_matrix"), candidates(experiment)
    assert f"version {version_of(experiment, 'score_matrix')}, {len(matrix)} rows; Spark counts {len(matrix)}" in shown
    assert f"{len(ranking)} texts" in shown
    for source in {row["source"] for row in matrix}:
        of_source = [row for row in matrix if row["source"] == source]
        mean = sum(map(difference, of_source)) / len(of_source)
        n_bytes, n_tokens = (sum(row[key] for row in of_source) for key in ("n_bytes", "teacher_n_tokens"))
        line = re.search(rf"{source} +{len(of_source)} +{n_bytes} +[\d.]+ +[\d.]+ +(-?[\d.]+)", shown)
        assert line, source
        assert float(line[1]) == pytest.approx(mean, abs=6e-4)
        assert re.search(rf"{source} +{n_bytes} +{n_tokens}\b", shown), "the table without Spark"
    for row in (ranking[0], ranking[-1]):
        assert re.search(rf"\n0 +{difference(row):.3f} ", shown), "the two ends of the ranking"
    assert shown.count("<png>") == 2


def test_refinement_twice(experiment: Experiment) -> None:
    ranking = candidates(experiment)
    half, quarter = len(ranking) // 2, len(ranking) // 4
    names = ("refined/difference", "refined/random", "instances", "score_matrix")
    before = {name: version_of(experiment, name) for name in names}
    summary = experiment.summary
    shown = run(experiment, "2_refine_and_versions")
    numbers = sorted(row["version"] for row in rows(experiment, "corpora") if row["name"] == "example")
    wide, narrow = (rows(experiment, "refined/example", version) for version in numbers)
    assert ids(wide) == ids(ranking[:half])
    assert ids(narrow) == ids(ranking[:quarter])
    band = rows(experiment, "refined/example_band")
    assert f"example: version {numbers[1]}, {quarter} of {len(ranking)} texts kept" in shown
    assert f"{quarter} rows, 0 differ from the query" in shown
    assert f"example@{numbers[0]} -> example@{numbers[1]}: 0 rows added, {half - quarter} removed" in shown
    added, removed = len(ids(band) - ids(wide)), len(ids(wide) - ids(band))
    assert f"example@{numbers[0]} -> example_band: {added} rows added, {removed} removed" in shown
    for source in {row["source"] for row in wide}:
        both, lost = (sum(row["source"] == source for row in part) for part in (narrow, ranking[quarter:half]))
        assert re.search(rf"{source} +{both} +0 +{lost}\b", shown), source
    for name, version in (("wide", wide), ("narrow", narrow)):
        assert re.search(rf"{name} +{len(version)} +{min(row['score'] for row in version):.3f}\b", shown), name
    assert f'"n_instances": {quarter},' in shown, "the provenance of the newest version"
    assert f"read by its tag: {half} rows" in shown
    assert rows(experiment, "pins") == []
    again = run(experiment, "2_refine_and_versions")
    assert again == shown, "a second run finds what the first has made"
    assert {name: version_of(experiment, name) for name in names} == before
    done = experiment.miniplm("run")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("unchanged, skipped") == STAGES
    assert experiment.summary == summary


def test_students(experiment: Experiment) -> None:
    shown = run(experiment, "3_compare_students")
    students = experiment.summary["students"]
    heldout = [row for row in rows(experiment, "instances") if row["split"] == "heldout"]
    best, other = sorted(students, key=lambda name: float(students[name]["heldout_bits_per_byte"]))
    for name, corpus in (("miniplm", "difference"), ("conventional", "random")):
        bits = students[name]["heldout_bits_per_byte"]
        assert re.search(rf"{name} +{corpus} +1 +6 +{6 * 4 * 64} +\S+ +{bits:.4f} ", shown), name
        version = version_of(experiment, f"refined/{corpus}")
        assert re.search(rf"{name} +FINISHED +\d+ +{corpus} +{version} ", shown), name
    gap = students[other]["heldout_bits_per_byte"] - students[best]["heldout_bits_per_byte"]
    assert f"{other} - {best}: {gap:.4f} bits per byte; no spread is known" in shown
    table = shown.partition(f"texts  {best}")[2]
    for source in {row["source"] for row in heldout}:
        assert re.search(rf"{source} +{sum(row['source'] == source for row in heldout)} +\d", table), source
    assert re.search(rf"all +{len(heldout)} +{students[best]['heldout_bits_per_byte']:.3f}\b", table)
    assert shown.count("<png>") == 2
    assert f"mlflow ui --backend-store-uri 'sqlite:///{experiment.root}/mlflow.db'" in shown
    assert "/#/compare-runs?runs=" in shown


def test_scaling(experiment: Experiment) -> None:
    shown = run(experiment, "4_scaling_curves")
    for name, corpus in (("miniplm", "difference"), ("conventional", "random")):
        assert re.search(rf"{name} +\d+ +1 +5 +\S+ +\S+ +[\d.]+ +corpus {corpus}", shown), name
    assert "not determined: " in shown, "six steps determine no law"
    assert "miniplm and conventional: " in shown
    for size, (compute, methods) in PAPER.items():
        losses = [methods[name][0].loss(compute) for name in ("without_kd", "miniplm")]
        assert re.search(rf"{size} +1T +{losses[0]:.3f} +{losses[1]:.3f}\b", shown), size
    assert "1.46 times less" in shown
    assert re.search(r"α = 0.515: 0.93 .*\n.*\nα = 0.525: 2.26 ", shown), "as docs/scaling-laws.md says"
    assert shown.count("<png>") == 2


def test_own_model(experiment: Experiment) -> None:
    shown = run(experiment, "5_your_own_model")
    heldout = [row for row in rows(experiment, "instances") if row["split"] == "heldout"]
    n_bytes = sum(row["n_bytes"] for row in heldout)
    assert f"{len(heldout)} held-out texts, {n_bytes:,} bytes" in shown
    assert f"scored bytes: reference {n_bytes:,}, miniplm {n_bytes:,}" in shown
    line = re.search(r"\nall((?: +\d+\.\d{3}){6})", shown)
    assert line
    expected: list[float] = []
    for name in ("reference", "miniplm"):
        nats, tokens = score_without_spark(experiment, name, [row["text"] for row in heldout])
        expected += [nats / tokens, n_bytes / tokens, nats / math.log(2) / n_bytes]
    assert [float(number) for number in line[1].split()] == pytest.approx(expected, abs=1e-3)
    assert "document separator '<|endoftext|>'" in shown


def score_without_spark(experiment: Experiment, name: str, texts: list[str]) -> tuple[float, int]:
    """Sum of -log p in nats, and the number of tokens."""
    folder = experiment.root / "models" / name
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    windows = {"context_tokens": longest, "window_overlap_tokens": longest // 4}
    config = ModelConfig(path=str(folder), dtype="float32", context_prefix="token", **windows)
    description = describe(name, config)
    scorer = Scorer(load_model(config, description, "cpu"), load_tokenizer(folder), description)
    scores = [
        score
        for score in scorer.score(texts, segment_ends=[[]] * len(texts), ends_document=[False] * len(texts))
        if isinstance(score, Score)
    ]
    assert len(scores) == len(texts)
    return sum(score.nll_sum_nats for score in scores), sum(score.n_tokens for score in scores)
