"""The probe of a root on S3: whether it can be reached, written and emptied, and keeps what is there.

Input: the URI of a root. Writes a small object below `<root>/_probe/`, tries to create it a second time, which the
storage must refuse, and deletes it. A storage that ignores `If-None-Match` is refused, because there two drivers could
replace each other's commits. Owns no table. A kill leaves an object of a few bytes.
"""

import os
import socket
import ssl
import urllib.parse
import uuid

import fsspec

from miniplm_udf import conditional_files, object_storage, storage
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.errors import ConfigError, first_line
from miniplm_udf.layout import Root
from miniplm_udf.storage_errors import explain

_CONTENT = b"probe"


def probe(root: str) -> None:
    """Checks a root on S3, with three requests; does nothing for any other root.

    Args:
        root: URI of the root.

    Raises:
        ConfigError: the root cannot be used; the message says which step failed, why, and what to do.
    """
    if not object_storage.is_s3(root):
        return
    step = "be reached"
    try:
        connect()
        filesystem, path = fsspec.core.url_to_fs(Root(root).probe(uuid.uuid4().hex))
        step = "be written"
        _create(filesystem, path)
        is_kept = not _create(filesystem, path)
        step = "be deleted from"
        filesystem.rm_file(path)
    except Exception as error:
        reason = explain(error) or first_line(error)
        raise ConfigError(f"root {storage.redact(root)} cannot {step}: {reason}") from error
    if not is_kept:
        raise ConfigError(
            f"root {storage.redact(root)}: expected a storage that honours If-None-Match, found one that has replaced "
            "an object which it was asked only to create: two drivers could replace each other's commits without an "
            "error. Use AWS S3, MinIO, Cloudflare R2, Ceph or another service that honours it"
        )


def connect(seconds: float = 10.0) -> None:
    """Connects to the service once, because its client tries for half a minute to reach one that is not there.

    Does nothing for AWS, and behind a proxy.

    Args:
        seconds: how long to wait for the connection.

    Raises:
        ConfigError: the service does not answer; the message says what to do.
    """
    endpoint = object_storage.service(StorageConfig(), os.environ).endpoint
    if endpoint is None or any(os.environ.get(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")):
        return
    parts = urllib.parse.urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), seconds) as connection:
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
                context.wrap_socket(connection, server_hostname=parts.hostname).close()
    except ssl.SSLError as error:
        raise ConfigError(
            f"the TLS connection to {endpoint} failed ({error.reason}); check https in storage.endpoint, "
            "and the service's certificate (AWS_CA_BUNDLE)"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{endpoint} does not answer ({error.strerror or error}); check storage.endpoint (or "
            "AWS_ENDPOINT_URL) and the network"
        ) from error


def _create(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """Creates the object; False if there is one."""
    try:
        filesystem.pipe_file(path, _CONTENT, mode="create")
    except OSError as error:
        if not conditional_files.is_refusal(error):
            raise
        return False
    return True
