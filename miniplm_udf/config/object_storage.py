"""The section `storage`: how an S3 service is reached. Imports nothing heavy."""

import dataclasses
import urllib.parse

from miniplm_udf.config.sections import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """An S3 service, for `s3a:` and `s3:` URIs. The keys are for Spark, delta-rs and fsspec alike.

    Credentials are not in the config: they come from the environment (`AWS_ACCESS_KEY_ID`, ...), from the files of
    `~/.aws`, or from the role of the machine.

    Attributes:
        endpoint: URL of the service, such as `http://minio:9000`. Null takes `AWS_ENDPOINT_URL_S3` or
            `AWS_ENDPOINT_URL`, else AWS.
        region: region of the buckets. Null takes `AWS_REGION` or `AWS_DEFAULT_REGION`; with an endpoint, `us-east-1`.
        path_style: whether requests name the bucket in the path of the URL instead of the host. Null is true with an
            endpoint, else false.
    """

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            parts = urllib.parse.urlsplit(self.endpoint)
            check(
                parts.scheme in ("http", "https") and bool(parts.hostname) and parts.path in ("", "/"),
                "storage.endpoint: expected a URL without a path, such as http://minio:9000, "
                f"found {self.endpoint.rpartition('@')[2]!r}",
            )
            check(
                "@" not in parts.netloc and not parts.query and not parts.fragment,
                "storage.endpoint: expected no user, password, query or fragment, which records would show; "
                "credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), from ~/.aws, or "
                "from the machine's role",
            )
