"""The facts that a report shows, made by hand without a table: for tests of the page and not of its numbers."""

import dataclasses
import datetime
import math
from pathlib import Path

from miniplm_udf.config.experiment import load_config
from miniplm_udf.report.histogram import BUCKETS, Histogram
from miniplm_udf.report.queries import CorpusFacts, Example, Overview, RejectCount, SourceShare, TableFacts
from miniplm_udf.report.render import render
from miniplm_udf.report.students import StudentFacts
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.store.provenance import CorpusRow
from tests.support import model_records

REPOSITORY = Path(__file__).resolve().parents[2]
LONG_NAME = "a_source_whose_name_is_far_longer_than_a_phone_is_wide_and_has_no_space_in_it"
SOURCES = ("docstrings", "readmes", "<b>bold</b>", LONG_NAME)
ROOT = "file:///" + "a-folder-with-a-long-name/" * 6 + "root"
ALIASES = ("teacher", "reference")


def page(has_students: bool = True, n_trained: int = 4) -> str:
    """A report with all its parts: long names, wide tables, texts without a space.

    Args:
        has_students: whether the config has students.
        n_trained: number of trained students.
    """
    config = load_config(REPOSITORY / "conf/demo.yaml", [f"root={ROOT}"])
    if not has_students:
        config = dataclasses.replace(config, students={})
    seconds = dict.fromkeys(("ingest", "annotate", "reference", "score", "refine", "pack", "train", "evaluate"), 75.2)
    return render(config, {"seconds": seconds}, _overview(), [_corpus()], [_student(i) for i in range(n_trained)])


def _histogram(middle: float) -> Histogram:
    counts = [round(40 * math.exp(-(((bucket - middle) / 150) ** 2))) for bucket in range(BUCKETS)]
    kept = [count if bucket > 500 else 0 for bucket, count in enumerate(counts)]
    dropped = [0 if bucket > 500 else count for bucket, count in enumerate(counts)]
    return Histogram(low=-1.0, high=2.0, kept=kept, dropped=dropped, n_above=3)


def _share(source: str, n: int) -> SourceShare:
    return SourceShare(source=source, n_candidates=n, n_kept=n // 2, candidate_tokens=n * 900, kept_tokens=n * 450,
                       n_negative=n // 9, score_mean=0.7)  # fmt: skip


def _example(score: float, text: str) -> Example:
    return Example(instance_id="0123456789abcdef" * 2, source=LONG_NAME, score=score, kept=score >= 0.5,
                   nll_means={"teacher": 2.1, "reference": 2.8}, text=text, n_characters=len(text) + 400)  # fmt: skip


def _corpus() -> CorpusFacts:
    texts = ("a b c " * 90, "https://example.org/" + "x" * 500, "<script>alert(1)</script>")
    record: CorpusRow = {
        "name": "difference", "version": 4, "config": {},
        "inputs": {"matrix_version": 7, "model_revisions": {alias: alias[0] * 32 for alias in ALIASES}},
        "threshold": 0.5, "n_candidates": 4_000_000, "candidate_tokens": 9 * 10**9, "n_instances": 2_000_000,
        "n_tokens": 4 * 10**9, "fingerprint": "f" * 64, "code_revision": "0.1.0",
        "created_at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    }  # fmt: skip
    places = {"Highest": 1.9, "Lowest": -0.9, "Just above the cut": 0.51, "Just below the cut": 0.49}
    return CorpusFacts(
        name="difference", uri=f"{ROOT}/tables/refined/difference", record=record,
        config={"score": "reference_nll_mean - teacher_nll_mean", "where": "true", "select": {"ratio": 0.5}},
        score=_histogram(550), nll_means={alias: _histogram(400) for alias in ALIASES},
        sources=[_share(source, 10**6) for source in SOURCES], total=_share("all sources", 4 * 10**6),
        examples={label: [_example(score, text) for text in texts] for label, score in places.items()},
        notes=["A note with a " + "long" * 30 + " word."],
    )  # fmt: skip


def _overview() -> Overview:
    models = {
        alias: ModelDescription(
            model_id=alias, model_revision=alias[0] * 32, tokenizer_hash="t" * 32, dtype="float32", context_tokens=512,
            window_overlap_tokens=0, context_prefix="none", document_separator="x", document_separator_id=0,
            prefix_token_id=None, vocab_size=300, n_parameters=1_800_000_000, weights_hash="w", path="p",
            warnings=["a warning"],
        )
        for alias in ALIASES
    }  # fmt: skip
    return Overview(
        n_instances=4_100_000, instances_by_split={"heldout": 100_000, "pool": 4_000_000},
        rejects=[RejectCount(stage="ingest", reason="invalid_json", n_rows=12)],
        scored=dict.fromkeys(ALIASES, 4_100_000), models=models,
        tables=[TableFacts(name="instances", uri=f"{ROOT}/tables/instances", version=0, n_rows=4_100_000)],
    )  # fmt: skip


def _student(number: int) -> StudentFacts:
    bits = 1.1 - number / 50
    loss = model_records.text_loss(bits)
    sets = {"heldout": model_records.set_evaluation(loss, dict.fromkeys(SOURCES, loss))}
    tasks = {f"task_{i}": 0.3 + i / 50 for i in range(9)}
    return StudentFacts(
        name=f"student_{number}", corpus="difference", tokenizer="qwen", is_random=number == 3,
        is_baseline=number == 3, setting="",
        training=model_records.training_record(run_id="0" * 32, packed_uri=f"{ROOT}/tables/packed/difference/qwen"),
        evaluation=model_records.evaluation(sets, tasks),
        curve=[(step, 3 + 6 * math.exp(-step / 300) - number / 9) for step in range(10, 1001, 10)],
    )  # fmt: skip
