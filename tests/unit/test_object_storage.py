"""One description of an S3 service for delta-rs, fsspec and Spark, against a server on loopback."""

import json
from pathlib import Path

import deltalake
import fsspec
import pyarrow as pa
import pytest

from miniplm_udf import object_storage
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.object_storage import service
from tests.support.s3_server import BUCKET, RequestFault, S3Server


def test_the_config_wins_over_the_environment() -> None:
    environment = {"AWS_ENDPOINT_URL": "http://other:1/", "AWS_REGION": "eu-west-1"}
    found = service(StorageConfig(), environment)
    assert (found.endpoint, found.region, found.path_style) == ("http://other:1", "eu-west-1", True)
    found = service(StorageConfig(endpoint="https://minio", region="x", path_style=False), environment)
    assert (found.endpoint, found.region, found.path_style) == ("https://minio", "x", False)


def test_aws_itself_needs_no_setting() -> None:
    found = service(StorageConfig(), {})
    assert (found.endpoint, found.region, found.path_style) == (None, None, False)
    assert "AWS_ENDPOINT_URL" not in found.environment()
    assert "endpoint_url" not in json.loads(found.environment()["FSSPEC_S3"])
    assert not any("endpoint" in key for key in found.spark_properties())


@pytest.mark.parametrize("endpoint", ["minio:9000", "ftp://minio", "http://minio/path", "http://", "http://u:p@minio"])
def test_a_wrong_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"^storage\.endpoint: ") as error:
        StorageConfig(endpoint=endpoint)
    assert "u:p" not in str(error.value)


def test_no_credentials_are_in_the_properties(s3: S3Server) -> None:
    found = service(StorageConfig(), {"AWS_ACCESS_KEY_ID": "key-1", "AWS_SECRET_ACCESS_KEY": "secret-1"})
    assert not {"key-1", "secret-1"} & {*found.spark_properties().values(), *found.environment().values()}


def test_delta_rs_and_fsspec_reach_the_server(s3: S3Server) -> None:
    uri = f"s3a://{BUCKET}/table"
    deltalake.write_deltalake(uri, pa.table({"a": [1, 2]}))
    assert deltalake.DeltaTable(uri).count() == 2
    with fsspec.open(f"s3a://{BUCKET}/file", "w") as file:
        file.write("text")
    assert fsspec.open(f"s3://{BUCKET}/file", "r").open().read() == "text"


@pytest.mark.parametrize(("status", "expected"), [(None, "none"), ("Enabled", "kept"), ("Suspended", "kept")])
def test_buckets_that_keep_versions_are_known(s3: S3Server, status: str | None, expected: str) -> None:
    bucket = s3.create_bucket(f"versions-{status}".lower())
    if status:
        filesystem = fsspec.filesystem("s3")
        filesystem.call_s3("put_bucket_versioning", Bucket=bucket, VersioningConfiguration={"Status": status})
    assert object_storage.earlier_objects(f"s3a://{bucket}/run") == expected


def test_an_unknown_state_of_versions_is_said(s3: S3Server, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    s3.add_fault(RequestFault("denied", path="versioning"))
    assert object_storage.earlier_objects(f"s3a://{BUCKET}/run") == "unknown"
    assert "it is not known whether the bucket keeps versions" in caplog.text
    assert object_storage.earlier_objects("gs://bucket/run") == "unknown"
    assert object_storage.earlier_objects(str(tmp_path)) == "none"
    s3.reset()
