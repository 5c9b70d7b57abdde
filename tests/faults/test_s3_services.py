"""The promises of a root on S3, on MinIO and on the Versity gateway. Skipped where they are not there and Go is not.

Each service: one of several takers wins a conditional put; two drivers and delta-rs append to one table and lose
nothing; `miniplm run` and `miniplm verify` as a user runs them.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from miniplm_udf import conditional_files
from miniplm_udf.upkeep.storage_probe import probe
from tests.support import s3_services
from tests.support.faults.race import race
from tests.support.s3_server import BUCKET
from tests.support.takers import winners
from tests.support.tiny_models import make_model_folder
from tests.support.user_corpus import Experiment, make_documents, write_jsonl

pytestmark = pytest.mark.long
RACE_SECONDS = 60.0
TAKERS = 8


@pytest.fixture(scope="module", params=s3_services.SERVICES)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_services.running(request.param, tmp_path_factory.mktemp("objects")):
        yield request.param


def test_one_taker_wins(service: str) -> None:
    probe(f"s3a://{BUCKET}/leases")
    for number in range(10):
        uri = f"s3a://{BUCKET}/leases/{number}"
        assert winners(uri, None, TAKERS) == 1
        present = conditional_files.read(uri)
        assert present is not None
        assert winners(uri, present.tag, TAKERS) == 1


def test_writers_of_one_table_lose_nothing(service: str) -> None:
    end = time.monotonic() + RACE_SECONDS
    writers = ["spark", "spark", "delta-rs"]
    result = race(None, f"s3a://{BUCKET}/race", writers, lambda refused, replaced: time.monotonic() > end)
    print(service, result)
    assert result.commits > 20
    assert (result.lost, result.duplicated, result.unknown, result.gaps) == (0, 0, 0, 0)


def test_a_whole_run(service: str, tmp_path: Path) -> None:
    teacher = make_model_folder(tmp_path / "teacher", "llama")
    user = Experiment(home=tmp_path, root=tmp_path / "unused", texts=tmp_path / "texts", teacher=teacher)
    root = f"s3a://{BUCKET}/run"
    write_jsonl(user.texts / "a.jsonl", make_documents(60, seed=1))
    fsspec.filesystem("s3").put_file(user.texts / "a.jsonl", f"{BUCKET}/texts/a.jsonl")
    start = time.monotonic()
    for command in ("run", "verify"):
        ended = user.miniplm(command, f"root={root}", f"ingest.input=s3a://{BUCKET}/texts/*.jsonl")
        assert ended.returncode == 0, ended.stderr[-4000:]
    print(f"{service}: {time.monotonic() - start:.0f} s")
    assert not user.root.exists()
    assert {"summary.json", "report.html", "models"} <= {
        name.rpartition("/")[2] for name in fsspec.filesystem("s3").ls(f"{BUCKET}/run", detail=False)
    }
