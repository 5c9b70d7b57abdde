"""Real models through the Arrow functions: described where they will run, pickled, and scored with."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scores.models import describe_here
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.messages import SCORE_REQUEST_SCHEMA
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support import tiny_models


def test_describe(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    config = ModelConfig(path=str(folder), context_tokens=64, window_overlap_tokens=8)
    found = describe_here("teacher", config, None)
    assert (found.model_id, found.context_tokens, found.document_separator_id) == ("teacher", 64, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"context_tokens": 4096}, ConfigError), ({"path": "/no/such/model"}, ModelLoadError)],
)
def test_errors_keep_their_class(tmp_path: Path, changes: dict[str, Any], expected: type[Exception]) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    with pytest.raises(expected):
        describe_here("teacher", dataclasses.replace(ModelConfig(path=str(folder)), **changes), "float32")


def test_unforeseen_errors_name_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"models\.teacher: AttributeError"):
        describe_here("teacher", ModelConfig(path=5), "float32")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_function_travels_as_spark_sends_it(tmp_path: Path) -> None:
    """A real scorer, pickled into a process that has nothing but the package, for two rows."""
    cloudpickle = pytest.importorskip("pyspark.cloudpickle")
    config = ModelConfig(path=str(tiny_models.make_model_folder(tmp_path)), context_tokens=64, window_overlap_tokens=8)
    description = describe_here("teacher", config, "float32")
    factory = ModelScorerFactory(config, description, ScoreConfig(tokens_per_batch=128))
    (tmp_path / "function").write_bytes(cloudpickle.dumps(score_arrow({"teacher": factory})))
    with pa.OSFile(str(tmp_path / "rows"), "wb") as sink, pa.ipc.new_stream(sink, SCORE_REQUEST_SCHEMA) as writer:
        columns = [pa.array(values) for values in (["1", "2"], ["one text", "another"])]
        columns += [pa.array([[], []], pa.list_(pa.int32())), pa.array([True, True]), pa.array([["teacher"]] * 2)]
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCORE_REQUEST_SCHEMA))
    script = (
        "import pickle, sys, pyarrow as pa\n"
        "run = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for batch in run(iter(pa.ipc.open_stream(open(sys.argv[2], 'rb')))):\n"
        "    print(batch.to_pylist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "function"), str(tmp_path / "rows")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("'reason': None") == 2
    assert "teacher: loaded on" in done.stderr
