"""A root on S3 is tried before any work, and each fault of its service is one sentence. The server is on loopback."""

import os
from collections.abc import Iterator

import pytest
import s3fs

from miniplm_udf import object_storage
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.storage_errors import explain
from miniplm_udf.upkeep.preflight import require_writable
from miniplm_udf.upkeep.storage_probe import probe
from tests.support.s3_server import BUCKET, RequestFault, S3Server

ROOT = f"s3a://{BUCKET}/run"


@pytest.fixture(autouse=True)
def own_clients(s3: S3Server) -> Iterator[None]:
    s3.reset()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def reach(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Makes this process use other variables than those of the server."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.setenv(name, os.environ[name])  # restored after the test
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    object_storage.use(StorageConfig())
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_root_that_can_be_used_costs_few_requests_and_keeps_nothing(s3: S3Server) -> None:
    require_writable(ROOT)
    assert s3.requests() == {"put 200": 1, "put 412": 1, "delete 204": 1}


def test_a_storage_that_ignores_the_condition_is_refused(s3: S3Server) -> None:
    s3.add_fault(RequestFault("unconditional", method="PUT"))
    with pytest.raises(ConfigError, match=rf"^root {ROOT}: expected a storage that honours If-None-Match"):
        probe(ROOT)


def test_a_service_that_does_not_name_the_condition_is_understood(s3: S3Server) -> None:
    """MinIO's refusal of a put; s3fs raises no FileExistsError for it."""
    s3.add_fault(RequestFault("unnamed", method="PUT"))
    probe(ROOT)
    assert s3.requests()["put 412"] == 1


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("denied", "PUT", r"cannot be written: object storage: the credentials lack a permission; .* \(.*AccessDenied"),
        ("denied", "DELETE", r"cannot be deleted from: object storage: the credentials lack a permission"),
        ("expired", "PUT", r"cannot be written: object storage: the credentials have expired; .*ExpiredToken"),
    ],
)
def test_refusals_are_one_sentence(s3: S3Server, kind: object, method: str, message: str) -> None:
    s3.add_fault(RequestFault(kind, method=method))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^root {ROOT} {message}") as error:
        probe(ROOT)
    assert "\n" not in str(error.value)


def test_a_missing_bucket_is_named() -> None:
    with pytest.raises(ConfigError, match=r"root s3a://not-there/run cannot be written: .* there is no such bucket"):
        probe("s3a://not-there/run")


@pytest.mark.parametrize("answer", ["slow_down", "error", "drop"])
def test_a_fault_that_passes_is_not_seen(s3: S3Server, answer: object) -> None:
    s3.add_fault(RequestFault(answer, method="PUT", times=1))  # type: ignore[arg-type]
    probe(ROOT)


def test_without_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, AWS_ENDPOINT_URL=s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=r"no credentials were found; set AWS_ACCESS_KEY_ID"):
        probe(ROOT)


def test_a_service_that_cannot_be_reached(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    with pytest.raises(
        ConfigError,
        match=r"reached: http://127\.0\.0\.1:1 does not answer .Connection refused.; check sto",
    ):
        probe(ROOT)


def test_a_service_without_tls(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(monkeypatch, AWS_ENDPOINT_URL=s3.url.replace("http:", "https:"))
    with pytest.raises(
        ConfigError,
        match=r"reached: the TLS connection to https://.* failed .*; check https in sto",
    ):
        probe(ROOT)


@pytest.mark.parametrize("error", [ValueError("403 Forbidden"), PermissionError(13, "Permission denied", "/data")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert explain(error) is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("java.nio.file.AccessDeniedException: s3a://b/x: ... software.amazon.awssdk.services.s3.model.S3Exception: "
         "Access Denied (Service: S3, Status Code: 403, Request ID: x)", "lack a permission"),
        ("org.apache.hadoop.fs.s3a.UnknownStoreException: `s3a://b/': Bucket does not exist", "no such bucket"),
        ("org.apache.hadoop.fs.s3a.AWSBadRequestException: ... ExpiredToken", "have expired"),
        ("OSError: Generic S3 error: Error performing GET http://h/x: error sending request", "cannot be reached"),
    ],
)  # fmt: skip
def test_errors_of_java_and_rust_have_the_same_sentences(text: str, sentence: str) -> None:
    assert sentence in str(explain(RuntimeError(text)))


def test_a_missing_package_names_the_extra() -> None:
    assert explain(ImportError("Install s3fs to access S3")) == (
        "object storage: the package s3fs is not installed: pip install 'miniplm[s3]'"
    )
