"""The probe of a root on S3: whether it can be reached, written and emptied, and keeps what is there.

Input: the URI of a root. Writes a small object below `<root>/_probe/`, tries to create it a second time, which the
storage must refuse, and deletes it. A storage that ignores `If-None-Match` is refused, because there two drivers could
replace each other's commits. Owns no table. A kill leaves an object of a few bytes.
"""

import uuid

import fsspec

from miniplm_udf import object_storage, storage
from miniplm_udf.errors import ConfigError, first_line
from miniplm_udf.layout import Root
from miniplm_udf.storage_errors import explain

_CONTENT = b"probe"


def probe(root: str) -> None:
    """Checks a root on S3, with four requests; does nothing for any other root.

    Args:
        root: URI of the root.

    Raises:
        ConfigError: the root cannot be used; the message says which step failed, why, and what to do.
    """
    if not object_storage.is_s3(root):
        return
    step = "be reached"
    try:
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


def _create(filesystem: fsspec.AbstractFileSystem, path: str) -> bool:
    """Creates the object; False if there is one."""
    try:
        filesystem.pipe_file(path, _CONTENT, mode="create")
    except FileExistsError:
        return False
    return True
