"""URIs and the small files beside the tables: JSON records, tokenizers, model folders. On the driver and on executors.

Owns the normal form of `root` and reading and writing of whole small files at any URI, through fsspec. Owns no table:
tables are read and written by Spark and delta-rs alone, which take the URIs made here. A retry overwrites: a small file
is replaced whole or not at all on a local disk, and by one put on an object store.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec

_URI = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:")


def to_uri(path: str) -> str:
    """Makes a bare path an absolute `file:` URI; leaves a URI as it is, less a trailing slash."""
    if _URI.match(path):
        return path.rstrip("/") if not path.startswith("file:") else "file://" + local_path(path).rstrip("/")
    # Hadoop's paths are not percent-encoded, so neither is this.
    return f"file://{Path(path).expanduser().absolute()}".rstrip("/")


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    return uri.startswith("file:") or not _URI.match(uri)


def local_path(uri: str) -> str:
    """The path of a `file:` URI or a bare path.

    Raises:
        ValueError: if the URI is not local.
    """
    if not is_local(uri):
        raise ValueError(f"{redact(uri)} is not a local path")
    return re.sub(r"^file:(//)?", "", uri) if uri.startswith("file:") else str(Path(uri).absolute())


def redact(uri: str) -> str:
    """The URI without user, password or query, fit for logs and metadata."""
    return re.sub(r"\?.*$", "", re.sub(r"(//)[^/@]+@", r"\1", uri))


def exists(uri: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return bool(filesystem.exists(path))


def read_text(uri: str) -> str:
    with fsspec.open(uri, "r", encoding="utf-8") as handle:
        return str(handle.read())


def write_text(uri: str, text: str) -> None:
    """Replaces the file whole; on a local disk by rename, so that a reader sees the old or the new one."""
    if not is_local(uri):
        with fsspec.open(uri, "w", encoding="utf-8") as handle:
            handle.write(text)
        return
    target = Path(local_path(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)


def read_json(uri: str) -> Any:
    """The parsed file, or None where there is none."""
    return json.loads(read_text(uri)) if exists(uri) else None


def write_json(uri: str, value: Any) -> None:
    write_text(uri, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def upload_folder(folder: Path, uri: str) -> None:
    """Replaces the folder at `uri` by a local one; on a local disk by rename."""
    if is_local(uri):
        target = Path(local_path(uri))
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        staging.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    else:
        filesystem, path = fsspec.core.url_to_fs(uri)
        filesystem.put(str(folder) + "/", path.rstrip("/") + "/", recursive=True)


def list_folder(uri: str) -> list[str]:
    """Names of what lies in the folder at `uri`, sorted, hidden files apart; none where there is no folder."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if not filesystem.exists(path):
        return []
    filesystem.invalidate_cache(path)
    names = (str(name).rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False))
    return sorted(name for name in names if name and not name.startswith("."))


def remove_folder(uri: str) -> None:
    """Removes the folder at `uri` and all in it, or the file, where there is one."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


def folder_state(uri: str) -> list[list[Any]]:
    """Name, size and time (or tag) of each file at `uri`, a folder or a file; empty where there is none."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    if not filesystem.exists(path):
        return []
    found = filesystem.find(path, detail=True)
    times = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    return [
        [name, info.get("size"), str(next((info[key] for key in times if info.get(key) is not None), None))]
        for name, info in sorted(found.items())
    ]


def cache_folder() -> Path:
    """This node's cache of models: `MINIPLM_CACHE`, else `~/.cache/miniplm`."""
    return Path(os.environ.get("MINIPLM_CACHE", "~/.cache/miniplm")).expanduser()


def local_folder(uri: str) -> Path:
    """A local copy of the folder at `uri`: itself where it is local, else fetched into this node's cache.

    It is fetched once for each state of the folder: a model that was trained anew is another one.
    """
    if is_local(uri):
        return Path(local_path(uri))
    filesystem, path = fsspec.core.url_to_fs(uri)
    target = cache_folder() / "fetched" / hashlib.sha256(f"{uri} {folder_state(uri)}".encode()).hexdigest()[:32]
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=target.parent))
        filesystem.get(path.rstrip("/") + "/", str(staging) + "/", recursive=True)
        os.replace(staging, target)
    return target
