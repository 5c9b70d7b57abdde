"""URIs, and the small files that are not tables: JSON records, tokenizers, model folders.

Owns the normal form of `root`, and reads and writes whole small files at any URI, through fsspec. Owns no table: Spark
and delta-rs alone read and write tables, at the URIs made here. A retry overwrites: on a local disk a small file is
replaced whole or not at all, on an object store by a single put. On the driver, on executors and in the trainer.
"""

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec

from miniplm_udf.errors import ConfigError, DamagedRecordError

Json = dict[str, Any]
"""A JSON object without declared keys: of a file, a log or another program, or about to be written or printed."""

# A file name may contain a colon (2024-01-01T10:00), so a scheme must be followed by a slash.
_URI = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+:/|file:|package:)")
# Characters that an engine reads as something else than a name: globs, backticks and ${variables} (Spark and Delta),
# % | ^ and control characters (delta-rs), :: (fsspec), ? (SQLAlchemy).
_UNSAFE = re.compile(r"::|[%`$*?\[\]{}\\|^\x00-\x1f\x7f\ud800-\udfff]")


def to_uri(path: str) -> str:
    """Returns an absolute `file:` URI for a bare path, and any other URI without its trailing slash.

    Args:
        path: a bare path (which may begin with `~`), a `file:` URI or any other URI.

    Raises:
        ConfigError: the path begins with `~` and a name that no user has.
    """
    if not is_local(path):
        return path.rstrip("/")
    # Hadoop does not percent-encode paths, so neither does this.
    bare = local_path(path) if path.startswith("file:") else os.path.abspath(_without_dots(_with_home(path)))
    return "file://" + bare.rstrip("/")


def _with_home(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{path}: expected the name of a user after ~, found no such user; if it is a folder, write ./{path}"
        )
    return expanded


def _without_dots(path: str) -> str:
    """The path without `..`. Delta would drop `..` together with the name before it, even if that name is a link."""
    return os.path.realpath(path) if ".." in path.split("/") else path


def check_location(key: str, uri: str) -> None:
    """Refuses a location with characters that Spark, Delta or fsspec would read as something else than a name.

    Args:
        key: the config key or option that gives the location, for the message.
        uri: the result of `to_uri`.

    Raises:
        ConfigError: the location has one of these characters; the message has its position.
    """
    if is_local(uri) and not uri.startswith("file:///"):
        raise ConfigError(f"{key}: expected file: and an absolute path, such as file:///data/run1, found {redact(uri)}")
    path = local_path(uri) if is_local(uri) else re.sub(r"^[^/]+://[^/]*", "", uri)
    if match := _UNSAFE.search(path):
        raise ConfigError(
            f"{key}: expected a place without % ` $ * ? [ ] {{ }} \\ | ^ :: and control characters, which Spark, "
            f"Delta or fsspec read as something else; found {match[0]!r} at position {match.start() + 1} of {path!r}; "
            "choose another name (environment variables are not replaced)"
        )


def join(base: str, *parts: str) -> str:
    """Returns the URI of a name below `base`.

    Args:
        base: a path or URI, with or without a trailing slash.
        parts: names of folders and a file; used as they are, not percent-encoded.
    """
    return "/".join([base.rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    """Whether a URI is a bare path or begins with `file:`.

    Args:
        uri: a path or URI.
    """
    return uri.startswith("file:") or not _URI.match(uri)


def local_path(uri: str) -> str:
    """Returns the absolute path of a `file:` URI or a bare path.

    Args:
        uri: a `file:` URI, not percent-encoded, or a bare path.

    Raises:
        ValueError: the URI is not local.
    """
    if not is_local(uri):
        raise ValueError(f"{redact(uri)} is not a local path")
    return re.sub(r"^file:(//)?", "", uri) if uri.startswith("file:") else str(Path(uri).absolute())


def redact(uri: str) -> str:
    """Returns the URI without user, password and query, so that logs and metadata hold no secret.

    Args:
        uri: a path or URI.
    """
    return re.sub(r"\?.*$", "", re.sub(r"(//)[^/@]+@", r"\1", uri))


def shown(place: str) -> str:
    """Returns a place as a message shows it: a `file:` URI as a path, any other URI without secrets.

    Args:
        place: a URI, or any other name.
    """
    return local_path(place) if place.startswith("file:") else redact(place)


def exists(uri: str) -> bool:
    """Whether there is a file or folder at `uri`.

    Args:
        uri: a path or URI.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    return bool(filesystem.exists(path))


def read_text(uri: str) -> str:
    """Returns the text of a UTF-8 file.

    Args:
        uri: a path or URI.

    Raises:
        FileNotFoundError: there is no file.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    return str(filesystem.cat_file(path), encoding="utf-8")  # one request, where opening a file takes two


def write_text(uri: str, text: str) -> None:
    """Replaces the whole file; on a local disk by rename, so that a reader sees either the old file or the new one.

    Args:
        uri: a path or URI; on a local disk, missing folders are made.
        text: the content, written as UTF-8.
    """
    if not is_local(uri):
        with fsspec.open(uri, "w", encoding="utf-8") as handle:
            handle.write(text)
        return
    target = Path(local_path(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            handle.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:  # a full disk, for example: nothing half written stays
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(uri: str) -> Any:
    """Reads a JSON file.

    Args:
        uri: a path or URI.

    Returns:
        The parsed value; None if there is no file.

    Raises:
        DamagedRecordError: the file is not JSON.
    """
    try:
        return json.loads(read_text(uri))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DamagedRecordError(
            f"record {redact(uri)}: expected JSON, found a file that is empty, cut off or not JSON ({error}); restore "
            "it from a copy, or remove it: the step that it records is then done again"
        ) from error


def write_json(uri: str, value: Any) -> None:
    """Replaces the whole file by a value as JSON, with sorted keys.

    Args:
        uri: a path or URI.
        value: plain data; keys of dictionaries are strings.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    write_text(uri, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def upload_folder(folder: Path, uri: str, last: Sequence[str]) -> None:
    """Replaces the folder at `uri` by a local one, by rename; a remote folder keeps files that the local one lacks.

    Args:
        folder: the local folder.
        uri: a path or URI of the folder that is replaced.
        last: the files whose presence says that the folder is whole. A remote folder loses them first and gets them
            last, in this order, because its files arrive one by one.
    """
    if is_local(uri):
        target = Path(local_path(uri))
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.????????"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            shutil.copytree(folder, staging, dirs_exist_ok=True)
        except BaseException:  # a full disk, for example: nothing half written stays
            shutil.rmtree(staging, ignore_errors=True)
            raise
        staging.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    else:
        filesystem, path = fsspec.core.url_to_fs(uri)
        inner = path.rstrip("/")
        filesystem.invalidate_cache(inner)
        for name in reversed(last):
            if filesystem.exists(f"{inner}/{name}"):
                filesystem.rm_file(f"{inner}/{name}")
        names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        for name in [*sorted(set(names) - set(last)), *last]:
            filesystem.put_file(str(folder / name), f"{inner}/{name}")


def list_folder(uri: str) -> list[str]:
    """Returns the sorted names in the folder at `uri`, without hidden ones; empty if there is no folder.

    Args:
        uri: a path or URI.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    if not filesystem.exists(path):
        return []
    filesystem.invalidate_cache(path)
    names = (str(name).rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False))
    return sorted(name for name in names if name and not name.startswith("."))


def remove_folder(uri: str) -> None:
    """Removes the file, or the folder with everything in it, at `uri`; does nothing if there is none.

    Args:
        uri: a path or URI.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def folder_state(uri: str) -> list[list[Any]]:
    """Describes the files at `uri`, a folder or a file: equal states mean unchanged files.

    Args:
        uri: a path or URI.

    Returns:
        [name, size in bytes, modification time or tag] of each file, sorted by name; empty if there is no file.
    """
    filesystem, path = fsspec.core.url_to_fs(uri)
    if not filesystem.exists(path):
        return []
    files = filesystem.find(path, detail=True)
    times = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    return [
        [name, info.get("size"), str(next((info[key] for key in times if info.get(key) is not None), None))]
        for name, info in sorted(files.items())
    ]


def cache_folder() -> Path:
    """This node's folder of cached models: `MINIPLM_CACHE` if set, else `~/.cache/miniplm`."""
    return Path(os.environ.get("MINIPLM_CACHE", "~/.cache/miniplm")).expanduser()


def local_folder(uri: str, names: Sequence[str] | None = None) -> Path:
    """Returns the local path of the folder at `uri`; a remote folder is copied into this node's cache.

    It is copied once for each state of the folder, so a model that was trained again is copied again.

    Args:
        uri: a path or URI.
        names: patterns of the names of files; a remote folder's other files and its folders are not copied. None copies
            all.
    """
    if is_local(uri):
        return Path(local_path(uri))
    filesystem, path = fsspec.core.url_to_fs(uri)
    facts = f"{uri} {folder_state(uri)}" + (f" {list(names)}" if names is not None else "")
    target = cache_folder() / "fetched" / hashlib.sha256(facts.encode()).hexdigest()[:32]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent))
        if names is None:
            filesystem.get(path.rstrip("/") + "/", str(staging) + "/", recursive=True)
        else:
            for file in filesystem.ls(path, detail=False):
                if any(fnmatch.fnmatch(file.rpartition("/")[2], name) for name in names) and filesystem.isfile(file):
                    filesystem.get_file(file, str(staging / file.rpartition("/")[2]))
        os.replace(staging, target)
    return target
