"""Small files that are created or replaced only if nobody else has done so: the primitives of a lease.

    storage              create                        replace
    S3                   put with If-None-Match        put with If-Match
    gs:, abfss:          put that refuses a file       read, compare, write: two may both succeed
    local disk           hard link                     read, compare, write: two may both succeed
    hdfs: and others     check, then write             read, compare, write: two may both succeed

Where two may both succeed, a caller waits, reads the file again, and believes what is there. The client for S3 sends
a put again if the answer was lost, and the second put is refused because of the first one; so a refused put is believed
only if the file has another text. Texts therefore have to be unique, for example by a random token. On the driver and
in the trainer.
"""

import dataclasses
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec

from miniplm_udf import storage

_S3 = ("s3", "s3a")
# Their clients refuse an existing file in one step.
_CREATES = (*_S3, "gs", "gcs", "abfs", "abfss", "az")
_REFUSALS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


@dataclasses.dataclass(frozen=True)
class TaggedText:
    """The text of a file, and the tag that it had just before it was read.

    Attributes:
        text: the content.
        tag: the ETag on S3; elsewhere the text itself.
    """

    text: str
    tag: str


def creates_in_one_step(uri: str) -> bool:
    """Whether only one of two callers of `create` on this storage can succeed.

    Args:
        uri: a path or URI.
    """
    return storage.is_local(uri) or _scheme(uri) in _CREATES


def replaces_in_one_step(uri: str) -> bool:
    """Whether only one of two callers of `replace` with the same tag can succeed on this storage.

    Args:
        uri: a path or URI.
    """
    return _scheme(uri) in _S3


def read(uri: str) -> TaggedText | None:
    """Reads a file and its tag.

    Args:
        uri: a path or URI.

    Returns:
        The text and the tag; None if there is no file.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        if _scheme(uri) not in _S3:
            text = filesystem.cat_file(path).decode("utf-8", errors="replace")
            return TaggedText(text, text)
        # The tag comes first: if the file changes in between, a replacement with this tag is refused.
        tag = str(filesystem.info(path)["ETag"])
        return TaggedText(filesystem.cat_file(path).decode("utf-8", errors="replace"), tag)
    except FileNotFoundError:
        return None


def create(uri: str, text: str) -> str | None:
    """Creates a file if there is none.

    Args:
        uri: a path or URI.
        text: the content; no other caller writes the same.

    Returns:
        The tag of the new file; None if there is a file, or a local disk has no hard links.

    Raises:
        OSError: the file cannot be written.
    """
    if storage.is_local(uri):
        return text if _link(Path(storage.local_path(uri)), text) else None
    return _put(uri, text, mode="create")


def replace(uri: str, text: str, tag: str) -> str | None:
    """Replaces a file if it still has the tag.

    Args:
        uri: a path or URI.
        text: the content; no other caller writes the same.
        tag: the tag of the file that is replaced.

    Returns:
        The tag of the new file; None if the file has another tag, or is gone.

    Raises:
        OSError: the file cannot be written.
    """
    if replaces_in_one_step(uri):
        return _put(uri, text, IfMatch=tag)
    present = read(uri)
    if present is None or present.tag != tag:
        return None
    storage.write_text(uri, text)
    return text


def is_refusal(error: OSError) -> bool:
    """Whether a storage has refused a put because of its condition.

    Args:
        error: what the put raised.
    """
    if isinstance(error, FileExistsError | FileNotFoundError):
        return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") != "NoSuchBucket"
    # s3fs raises FileExistsError only for services that name the condition in their answer.
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") in _REFUSALS


def _put(uri: str, text: str, **condition: Any) -> str | None:
    """Puts a file under a condition; None if it was refused and the file has another text."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        answer = filesystem.pipe_file(path, text.encode("utf-8"), **condition)
    except OSError as error:
        if not is_refusal(error):
            raise
        present = read(uri)
        return present.tag if present is not None and present.text == text else None
    return str(answer["ETag"]) if replaces_in_one_step(uri) else text


def _scheme(uri: str) -> str:
    return uri.partition("://")[0]


def _link(path: Path, text: str) -> bool:
    """Creates the file with its text in one step; False if the file exists, or the filesystem cannot do this."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, path)
        except OSError:  # FileExistsError, or a filesystem without hard links
            return False
    finally:
        draft.unlink(missing_ok=True)
    return True
