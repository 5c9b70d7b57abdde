"""Faults of the storage in the middle of `miniplm ingest` on S3: a short one is not noticed, a lasting one is one line.

The faults begin after the probe of the root, so Spark meets them. After each, the command runs again without a fault,
and the table is whole.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from miniplm_udf.config.experiment import ExperimentConfig, to_yaml
from miniplm_udf.store.delta_files import parquet_files
from tests.support.s3_server import BUCKET, REPOSITORY, RequestFault, S3Server, running
from tests.support.storage_runs import DOCUMENTS, at, make_config, put_file

pytestmark = pytest.mark.long
TABLES = r"/run/tables/"


def ingest(config: ExperimentConfig, folder: Path) -> tuple[int, list[str]]:
    """Exit code and lines on stderr of `miniplm ingest`."""
    (folder / "experiment.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "jobs.cli", "ingest", "-c", str(folder / "experiment.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=580)
    print(ended.stderr)
    return ended.returncode, ended.stderr.splitlines()


def run_again(config: ExperimentConfig, folder: Path, server: S3Server) -> None:
    server.reset()
    assert ingest(config, folder)[0] == 0
    assert_whole(config)


def assert_whole(config: ExperimentConfig) -> None:
    """Every document is there, and each instance once."""
    filesystem = fsspec.filesystem("s3")
    files = [file.removeprefix("s3a://") for file in parquet_files(config.layout.table("instances"))]
    rows = [row for file in files for row in pq.read_table(file, filesystem=filesystem).to_pylist()]
    assert len({row["instance_id"] for row in rows}) == len(rows)
    assert {name for row in rows for name in row["document_ids"]} == {f"d{number}" for number in range(DOCUMENTS)}


@pytest.fixture
def config(tmp_path: Path, s3: S3Server) -> ExperimentConfig:
    s3.reset()
    place = f"s3a://{BUCKET}/{tmp_path.name}"
    config = at(make_config(tmp_path), f"{place}/run", f"{place}/in")
    put_file(config, 0)
    return config


@pytest.mark.parametrize(
    "fault",
    [
        RequestFault("slow_down", path=TABLES, times=5),
        RequestFault("error", method="PUT", path=TABLES, times=2),
        RequestFault("drop", method="PUT", path=TABLES, times=2),
        RequestFault("hang", method="PUT", path=rf"{TABLES}.*_delta_log", times=1, seconds=3.0),
    ],
    ids=lambda fault: fault.kind,
)
def test_a_fault_that_passes_is_not_noticed(
    config: ExperimentConfig, s3: S3Server, tmp_path: Path, fault: RequestFault
) -> None:
    s3.add_fault(fault)
    assert ingest(config, tmp_path)[0] == 0
    assert_whole(config)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (RequestFault("slow_down", path=TABLES), "the service asked to slow down"),
        (RequestFault("expired", method="PUT", path=TABLES), "the credentials have expired"),
        (RequestFault("denied", method="PUT", path="/run/_checkpoints/"), "the credentials lack a permission"),
    ],
    ids=lambda each: each.kind if isinstance(each, RequestFault) else "",
)
def test_a_fault_that_lasts_is_one_line(
    config: ExperimentConfig, s3: S3Server, tmp_path: Path, fault: RequestFault, sentence: str
) -> None:
    s3.add_fault(fault)
    start = time.monotonic()
    code, lines = ingest(config, tmp_path)
    print(f"{fault.kind}: {time.monotonic() - start:.0f} s")
    assert code == 1
    assert_one_line(lines, sentence)
    run_again(config, tmp_path, s3)


def test_a_service_that_goes_away_is_one_line(tmp_path: Path) -> None:
    with running() as server:
        place = f"s3a://{BUCKET}/gone"
        config = at(make_config(tmp_path), f"{place}/run", f"{place}/in")
        put_file(config, 0)

        def end_it() -> None:
            while not any(TABLES in line for line in server.log()):
                time.sleep(0.1)
            server.process.kill()

        threading.Thread(target=end_it, daemon=True).start()
        code, lines = ingest(config, tmp_path)
        assert code == 1
        assert_one_line(lines, "the service cannot be reached")


def assert_one_line(lines: list[str], sentence: str) -> None:
    """The last line tells the fault, and there is no trace of Python or Java."""
    assert lines[-1].startswith("miniplm: ")
    assert sentence in lines[-1]
    assert not [line for line in lines if line.startswith(("Traceback", "\tat ", "Caused by", "    at "))]
