"""The promises of `miniplm run` on a user's own files, in the order a user meets them. Tests share one experiment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet
import pytest

from miniplm_udf.store import catalog
from tests.support.user_corpus import REPOSITORY, Experiment, make_documents, write_jsonl

STAGES = ("ingest", "annotate", "reference", "score", "refine", "pack", "train", "evaluate", "report")


def read_table(root: Path, name: str, version: int | None = None) -> pa.Table:
    """A table through delta-rs, without a JVM."""
    from deltalake import DeltaTable

    table = DeltaTable(str(root / "tables" / name), version=version)
    paths = [unquote(uri).removeprefix("file://") for uri in table.file_uris()]
    return pa.concat_tables([pa.parquet.read_table(path) for path in paths])


def table_version(root: Path, name: str) -> int:
    from deltalake import DeltaTable

    return DeltaTable(str(root / "tables" / name)).version()


def test_summary_holds_what_the_tables_hold(experiment: Experiment) -> None:
    summary, root = experiment.summary, experiment.root
    instances, scores = read_table(root, "instances"), read_table(root, "scores")
    assert summary["instances"] == instances.num_rows > 0
    assert summary["rejected"] == 0
    pool = {row["instance_id"] for row in instances.to_pylist() if row["split"] == "pool"}
    for alias in ("teacher", "reference"):
        scored = [row["instance_id"] for row in scores.to_pylist() if row["model_id"] == alias]
        assert len(scored) == len(set(scored)) == summary["scored"][alias]
        assert set(scored) <= pool
        assert summary["tokens_per_second"][alias] > 0
    assert set(summary["seconds"]) == set(STAGES)
    for name, corpus in summary["refined"].items():
        assert read_table(root, f"refined/{name}", corpus["version"]).num_rows == summary["kept"][name] > 0
    assert set(summary["students"]) == {"miniplm", "conventional"}
    assert all(student["heldout_bits_per_byte"] > 0 for student in summary["students"].values())
    assert (root / "report.html").stat().st_size > 10_000
    assert (root / "mlflow.db").exists()


def test_scores_equal_a_plain_forward_pass(experiment: Experiment) -> None:
    """-log p summed over targets whose input is not the separator, from one unbatched call with full logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from miniplm_udf.scoring.tokenizer import load_tokenizer

    scores = read_table(experiment.root, "scores").to_pylist()
    instances = {row["instance_id"]: row for row in read_table(experiment.root, "instances").to_pylist()}
    compared = 0
    for alias, folder in (("teacher", experiment.teacher), ("reference", experiment.root / "models" / "reference")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(folder)
        separator = tokenizer.token_to_id("<|endoftext|>")
        for score in [row for row in scores if row["model_id"] == alias][::7]:
            ids = encode_instance(tokenizer, instances[score["instance_id"]], separator)
            assert len(ids) <= 65, "the demo's chunks fit one window"
            with torch.no_grad():
                log_p = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
            kept = [i for i in range(len(ids) - 1) if ids[i] != separator]
            expected = -sum(float(log_p[i, ids[i + 1]]) for i in kept)
            assert score["n_tokens"] == len(kept)
            assert score["nll_sum_nats"] == pytest.approx(expected, abs=1e-4 * len(kept))
            compared += 1
    assert compared > 10


def encode_instance(tokenizer: Any, instance: dict[str, Any], separator: int) -> list[int]:
    data = instance["text"].encode()
    ends = [*instance["segment_ends"], len(data)]
    starts = [0, *instance["segment_ends"]]
    ids: list[int] = []
    for start, end in zip(starts, ends, strict=True):
        ids += tokenizer.encode(data[start:end].decode(), add_special_tokens=False).ids
        if end < len(data) or instance["ends_document"]:
            ids.append(separator)
    return ids


def test_running_again_does_nothing(experiment: Experiment) -> None:
    tables = ("instances", "scores", "score_matrix", "refined/difference", "packed/difference/bpe8k")
    before = {name: table_version(experiment.root, name) for name in tables}
    summary = experiment.summary
    done = experiment.miniplm("run")
    assert done.returncode == 0, done.stderr[-4000:]
    assert {name: table_version(experiment.root, name) for name in tables} == before
    assert done.stderr.count("unchanged, skipped") == len(STAGES)
    assert experiment.summary == summary


@pytest.mark.long
def test_a_new_file_is_all_that_is_scored(experiment: Experiment) -> None:
    before = read_table(experiment.root, "scores").to_pylist()
    version = table_version(experiment.root, "refined/difference")
    reference = (experiment.root / "models" / "reference" / "model.safetensors").read_bytes()
    write_jsonl(experiment.texts / "c.jsonl", make_documents(30, seed=3))
    done = experiment.miniplm("run")
    assert done.returncode == 0, done.stderr[-4000:]
    after = read_table(experiment.root, "scores").to_pylist()
    old = {(row["instance_id"], row["model_revision"]): row for row in before}
    new = {(row["instance_id"], row["model_revision"]): row for row in after}
    assert {key: new[key] for key in old} == old
    assert len(new) == len(after) > len(before)
    assert {row["model_revision"] for row in after} == {row["model_revision"] for row in before}
    assert (experiment.root / "models" / "reference" / "model.safetensors").read_bytes() == reference
    assert table_version(experiment.root, "refined/difference") == version + 1
    # The version of before is still there to be read.
    assert read_table(experiment.root, "refined/difference", version).num_rows > 0
    assert "reference: unchanged, skipped" in done.stderr
    # In a process that has run no query of its own.
    verified = experiment.miniplm("verify")
    assert verified.returncode == 0, verified.stderr[-4000:]


def test_the_tables_answer_plain_sql(experiment: Experiment, spark: Any) -> None:
    session = spark.newSession()
    catalog.register_tables(session, str(experiment.root))
    with_text = session.sql("select count(*) from difference_text where text is not null").first()[0]
    kept = session.sql("select count(*) from refined_difference").first()[0]
    wrong_means = session.sql(
        "select count(*) from score_matrix "
        "where abs(teacher_nll_mean - teacher_nll_sum_nats / teacher_n_tokens) > 1e-12"
    ).first()[0]
    assert with_text == kept > 0
    assert wrong_means == 0


@pytest.mark.long
def test_a_stage_is_a_file_for_spark_submit(experiment: Experiment) -> None:
    before = table_version(experiment.root, "refined/difference")
    submit = [
        *("spark-submit", "--properties-file", str(REPOSITORY / "conf/spark/local.conf")),
        *(str(REPOSITORY / "jobs/refine.py"), "-c", str(REPOSITORY / "conf/demo.yaml"), *experiment.overrides),
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(
        [*submit, "refine.corpora.difference.select.ratio=0.4", "--json"],
        cwd=experiment.home, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert table_version(experiment.root, "refined/difference") == before + 1
    # spark-submit sends a Python program's log to stdout, too; the summary comes last.
    found = json.loads(done.stdout[done.stdout.index("\n{\n") :])["refine"]["refined"]["difference"]
    assert (found["version"], found["skipped"]) == (before + 1, False)


BAD_INPUT = [
    ("ingest", "ingest.input=/no/such/*.jsonl", 2, "/no/such/*.jsonl"),
    ("ingest", "ingest.fields.text=body", 2, "body"),
    ("ingest", "models.teacher.path=/no/such/model", 2, "/no/such/model"),
    ("score", "root=ROOT/empty", 1, "run `miniplm reference` first"),
    ("train", "root=ROOT/empty", 1, "pack"),
]


def test_bad_input_exits_with_its_code_and_one_line(experiment: Experiment, tmp_path: Path) -> None:
    """The commands share one process, and so one JVM."""
    lines = []
    for number, (command, override, _, _) in enumerate(BAD_INPUT):
        root = [] if override.startswith("root=") else [f"root={tmp_path}/root{number}"]
        lines.append(experiment.command_line(command, *root, override.replace("ROOT", str(tmp_path))))
    write_jsonl(tmp_path / "mixed.jsonl", [*make_documents(8, seed=4), {"id": "bad", "text": None}])
    mixed = [f"root={tmp_path}/root", f"ingest.input={tmp_path}/mixed.jsonl"]
    lines.append(experiment.command_line("ingest", *mixed))
    done = experiment.python(str(REPOSITORY / "tests/support/commands.py"), json.dumps(lines))
    assert done.returncode == 0, done.stderr[-3000:]
    *results, too_many_rejects = [json.loads(line) for line in done.stdout.splitlines()]
    for (command, override, code, message), result in zip(BAD_INPUT, results, strict=True):
        assert result["code"] == code, (command, override, result["stderr"][-3000:])
        assert message in result["stderr"]
        assert "Traceback" not in result["stderr"]
    # The good documents of the file are ingested all the same.
    assert too_many_rejects["code"] == 3, too_many_rejects["stderr"][-3000:]
    assert read_table(tmp_path / "root", "rejects").column("reason").to_pylist() == ["missing_text"]
    assert read_table(tmp_path / "root", "instances").num_rows > 0
