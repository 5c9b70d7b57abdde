"""Inputs in object storages and on the hub are checked before anything runs; the servers are on loopback."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pytest
import s3fs
from deltalake import write_deltalake

from jobs import cli
from miniplm_udf import object_storage
from miniplm_udf.config.experiment import load_config
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.ingestion import hub
from miniplm_udf.upkeep import input_checks, preflight
from tests.support.hub_server import hub_server
from tests.support.right_experiment import Place
from tests.support.s3_server import BUCKET, RequestFault, S3Server

LINES = b'{"text": "a text", "n": 1}\n'
STORE = f"s3a://{BUCKET}"
NO_MATCH = "matches no file; correct the path or the pattern"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def problems_with(place: Place, path: str, *overrides: str, stages: tuple[str, ...] = ("ingest",)) -> list[str]:
    place.set("ingest.input", path)
    return preflight.problems(load_config(place.file(), overrides), list(stages))


# In memory.


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for name in ("a.jsonl", "sub/b.jsonl.gz", "_hidden/c.jsonl", "sub/_d.jsonl"):
        filesystem.pipe(f"/texts/{name}", LINES)
    filesystem.pipe("/tables/a.csv", b"text\nx\n")
    yield "memory:/"
    filesystem.store.clear()


@pytest.mark.parametrize("path", ["texts", "texts/*.jsonl", "texts/{a,x}.jsonl", "texts/**/*.jsonl", "t*/[^b].jsonl"])
def test_a_right_input_is_taken(place: Place, memory: str, path: str) -> None:
    assert problems_with(place, f"{memory}/{path}") == []


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("text", (), NO_MATCH),
        ("texts/*.parquet", (), NO_MATCH),
        ("texts/sub/_*", (), NO_MATCH),
        ("tables", (), "CSV and TSV files are not read, found memory:///tables/a.csv"),
        ("texts/*.jsonl", ("ingest.format=delta",), "expected a Delta table"),
        ("texts/a.jsonl", ("ingest.fields.text=txt",), "did you mean ingest.fields.text=text?"),
    ],
)
def test_a_mistake_is_named(place: Place, memory: str, path: str, options: tuple[str, ...], message: str) -> None:
    (problem,) = problems_with(place, f"{memory}/{path}", *options)
    assert problem.startswith("ingest.")
    assert message in problem


def test_a_storage_that_spark_may_reach_in_another_way_is_not_checked(place: Place, memory: str) -> None:
    place.set("spark.conf", {"spark.hadoop.fs.memory.impl": "Other"})
    assert problems_with(place, f"{memory}/nothing") == []
    assert problems_with(place, "hdfs://nowhere/texts") == []


def test_a_storage_whose_package_is_missing_is_not_checked(place: Place) -> None:
    assert problems_with(place, "gs://bucket/texts") == []


def test_a_slow_storage_does_not_stop_the_start(place: Place, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_checks, "_SECONDS", 0.2)
    monkeypatch.setattr(input_checks, "list_files", lambda *arguments: time.sleep(2))
    start = time.monotonic()
    assert problems_with(place, f"{memory}/nothing") == []
    assert time.monotonic() - start < 1.5


# On S3.


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[S3Server]:
    s3.reset()
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe(f"{BUCKET}/checks/a.jsonl", LINES)
    filesystem.pipe(f"{BUCKET}/checks/sub/b.jsonl", LINES)
    yield s3
    s3.reset()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("checks", (), None),
        ("checks/{a,b}.jsonl", (), None),
        ("checks/**/*.jsonl", (), None),
        ("checks/none", (), NO_MATCH),
        ("checks/*.parquet", (), NO_MATCH),
        ("checks", ("ingest.fields.text=body",), "expected a column or field 'body'"),
    ],
)
def test_an_input_on_s3(
    place: Place, bucket: S3Server, path: str, options: tuple[str, ...], message: str | None
) -> None:
    problems = problems_with(place, f"{STORE}/{path}", *options)
    assert [message in problem for problem in problems if message] == [True] * (message is not None), problems


def test_only_the_beginnings_of_files_are_fetched(place: Place, bucket: S3Server) -> None:
    fsspec.filesystem("s3").pipe(f"{BUCKET}/large/a.jsonl", LINES * 500_000)
    bucket.reset()
    assert problems_with(place, f"{STORE}/large") == []
    assert bucket.requests().get("get 206", 0) <= 2


@pytest.mark.parametrize("path", ["texts", "texts/*.jsonl"])
def test_a_missing_bucket(place: Place, bucket: S3Server, path: str) -> None:
    (problem,) = problems_with(place, f"s3a://not-there/{path}")
    assert problem.startswith(
        f"ingest.input: s3a://not-there/{path} cannot be listed: object storage: there is no such"
    )
    assert "storage.endpoint" in problem


@pytest.mark.parametrize(
    ("kind", "message"), [("denied", "the credentials lack a permission"), ("expired", "the credentials have expired")]
)
def test_a_refusal_is_one_line(place: Place, bucket: S3Server, kind: Any, message: str) -> None:
    s3fs.S3FileSystem.clear_instance_cache()
    bucket.add_fault(RequestFault(kind))
    (problem,) = problems_with(place, f"{STORE}/checks")
    assert f"cannot be listed: object storage: {message}" in problem
    assert "\n" not in problem


def test_a_service_that_does_not_answer(place: Place, bucket: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.setenv(name, os.environ[name])  # restored after the test
    object_storage.use(StorageConfig(endpoint="http://127.0.0.1:1"))
    try:
        (problem,) = problems_with(place, f"{STORE}/checks")
    finally:
        object_storage.use(StorageConfig(endpoint=bucket.url))
    assert "http://127.0.0.1:1 does not answer" in problem
    assert "check storage.endpoint" in problem


def test_a_busy_service_is_left_to_ingest_and_asked_no_more(
    place: Place, bucket: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_checks, "_SECONDS", 1.5)
    monkeypatch.setattr(input_checks, "_REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(input_checks, "_is_visible_table", lambda path: False)
    bucket.add_fault(RequestFault("slow_down"))
    assert problems_with(place, f"{STORE}/checks") == []
    asked = len(bucket.log())
    time.sleep(2)
    assert len(bucket.log()) == asked


def test_a_delta_table_on_s3(place: Place, bucket: S3Server) -> None:
    write_deltalake(f"{STORE}/table", pa.table({"body": ["a"], "n": [1]}), mode="overwrite")
    assert problems_with(place, f"{STORE}/table", "ingest.fields.text=body") == []
    (problem,) = problems_with(place, f"{STORE}/table")
    assert "expected a column or field 'text' in s3a://test-bucket/table, found ['body', 'n']" in problem


def test_an_external_set_on_s3(place: Place, bucket: S3Server) -> None:
    place.set("evaluate.inputs", {"other": {"path": f"{STORE}/checks/none"}})
    (problem,) = problems_with(place, str(place.texts), stages=("evaluate",))
    assert problem.startswith("evaluate.inputs.other.path: expected files of texts, found none")
    place.set("evaluate.inputs", {"other": {"path": f"{STORE}/checks", "text_column": "body"}})
    (problem,) = problems_with(place, str(place.texts), stages=("evaluate",))
    assert problem.startswith("evaluate.inputs.other.text_column")
    place.set("evaluate.inputs", {"other": {"path": f"{STORE}/checks"}})
    assert problems_with(place, str(place.texts), stages=("evaluate",)) == []


def test_the_command_uses_the_endpoint_of_the_config(
    place: Place, bucket: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setitem(fsspec.config.conf, "s3", dict(fsspec.config.conf["s3"]))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    place.set("ingest.input", f"{STORE}/checks/none")
    place.set("storage", {"endpoint": bucket.url})
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 2
    assert NO_MATCH in capsys.readouterr().err


# On the hub.


@dataclasses.dataclass
class AskedHub:
    """A hub that this process asks.

    Attributes:
        requests: the requests so far.
        patch: changes constants of the hub's client until the end of the test.
    """

    requests: list[str]
    patch: pytest.MonkeyPatch

    def move(self, url: str) -> None:
        """Makes this process ask another address."""
        self.patch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        self.patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextlib.contextmanager
def asked_hub(folder: Path, cache: Path, repo: str, kind: Literal["datasets", "models"]) -> Iterator[AskedHub]:
    """A hub with one data set or model, and an empty cache."""
    with pytest.MonkeyPatch.context() as patch, hub_server(folder, repo, kind) as (url, requests):
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        asked = AskedHub(requests, patch)
        asked.move(url)
        yield asked


@pytest.fixture
def texts_hub(tmp_path: Path) -> Iterator[AskedHub]:
    repo = tmp_path / "repo"
    contents = {"data/a.jsonl": LINES, "data/_b.jsonl": LINES, "data/README.md": b"#", "tab/c.csv": b"text\n"}
    for name, content in contents.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_bytes(content)
    hub.local_copy.cache_clear()
    with asked_hub(repo, tmp_path / "hub", "org/texts", "datasets") as asked:
        yield asked
    hub.local_copy.cache_clear()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("org/texts", None),
        ("org/texts@main/data", None),
        ("org/texts/data/a.jsonl", None),
        ("org/texts/**/*.jsonl", None),
        ("org/texts/d*", None),
        ("org/none", "found none of this name; correct it, or set HF_TOKEN"),
        ("org/texts/dat", "has no file that ingest reads; it has data/README.md"),
        ("org/texts/data/_b*", "has no file that ingest reads"),
        ("org/texts/tab", "it has tab/c.csv; CSV and TSV files are not read"),
        ("texts", "expected hf://datasets/ORG/NAME"),
    ],
)
def test_a_data_set_of_the_hub(place: Place, texts_hub: AskedHub, path: str, message: str | None) -> None:
    problems = problems_with(place, f"hf://datasets/{path}", "ingest.fields.text=body")
    assert [message in problem for problem in problems if message] == [True] * (message is not None), problems
    assert not [request for request in texts_hub.requests if "/resolve/" in request], "a check has fetched a file"


def test_what_is_fetched_already_is_checked(place: Place, texts_hub: AskedHub) -> None:
    path = "hf://datasets/org/texts/data"
    assert problems_with(place, path, "ingest.fields.text=body") == []
    hub.local_copy(path)
    (problem,) = problems_with(place, path, "ingest.fields.text=body")
    assert "expected a column or field 'body'" in problem
    assert problems_with(place, path) == []
    texts_hub.move("http://127.0.0.1:1")
    assert problems_with(place, path) == []
    assert len(problems_with(place, path, "ingest.fields.text=body")) == 1


def test_a_hub_that_cannot_be_reached(place: Place, texts_hub: AskedHub) -> None:
    texts_hub.move("http://127.0.0.1:1")
    (problem,) = problems_with(place, "hf://datasets/org/texts")
    assert f"the hub cannot be asked (ConnectError), and {hub.folder()} does not have all files" in problem
    assert "hf download org/texts" in problem


@pytest.mark.parametrize(
    ("on_hub", "problem"),
    [
        (("config.json", "tokenizer.json", "model.safetensors"), None),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "expected weights as *.safetensors"),
    ],
)
def test_a_model_of_the_hub_with_its_small_files_in_the_cache(
    place: Place, tmp_path: Path, on_hub: tuple[str, ...], problem: str | None
) -> None:
    """The run fetches the weights, if the hub has them."""
    from huggingface_hub import snapshot_download

    repo = tmp_path / "repo"
    place.write_model(repo)
    (repo / "model.safetensors").unlink()
    for name in set(on_hub) - {"config.json", "tokenizer.json"}:
        (repo / name).write_bytes(b"weights")
    place.set("models.teacher.path", "org/model")
    with asked_hub(repo, tmp_path / "hub", "org/model", "models") as asked:
        snapshot_download("org/model", allow_patterns=["*.json"])
        problems = problems_with(place, str(place.texts), stages=("score",))
        asked.move("http://127.0.0.1:1")
        elsewhere = problems_with(place, str(place.texts), "spark.master=spark://elsewhere:7077", stages=("score",))
        asked.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (offline,) = problems_with(place, str(place.texts), stages=("score",))
    assert [problem in each for each in problems if problem] == [True] * (problem is not None), problems
    assert elsewhere == []
    assert "the hub's cache has only some of its files, and HF_HUB_OFFLINE forbids to ask the hub" in offline
