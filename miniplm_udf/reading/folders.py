"""The folder of an export: there whole or not at all, and never in place of anything but another export. Driver only.

Input: its place, a path or URI. On a disk all is written to a hidden folder beside it, which takes its name at the end.
An object store cannot rename: there the manifest comes last and a mark lies in the folder until then, so a folder is
whole where it has a manifest and no mark. What fails removes what it wrote; what a kill left is removed by the next
export to the same place, of which there is one at a time (the lease of export.py).
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError

MANIFEST = "manifest.json"
# What a manifest says it is.
KIND = "miniplm export"
UNFINISHED = "_UNFINISHED"


def check_free(target: str, overwrite: bool) -> None:
    """Refuses a place where something is; with `overwrite`, something else than an export.

    Raises:
        ConfigError: it is refused.
    """
    if not storage.exists(target) or not _names(target):
        return
    is_unfinished = storage.exists(storage.join(target, UNFINISHED))
    found = manifest_of(target)
    if found is None and not is_unfinished:
        raise ConfigError(
            f"--out: expected nothing, or an earlier export, at {storage.redact(target)}, found files of something "
            "else, which are never overwritten; give another place"
        )
    if found is not None and not overwrite:
        raise ConfigError(
            f"--out: expected nothing at {storage.redact(target)}, found an export of {found.get('corpus')}@"
            f"{found.get('version')}; give another place, or --overwrite to replace it"
        )


def manifest_of(target: str) -> dict[str, Any] | None:
    """The manifest of the export at a place; None where there is none."""
    found = None
    with contextlib.suppress(ValueError):  # someone else's file of that name
        found = storage.read_json(storage.join(target, MANIFEST))
    return found if isinstance(found, dict) and found.get("kind") == KIND else None


@contextlib.contextmanager
def written(target: str, overwrite: bool) -> Iterator[str]:
    """The place to write to meanwhile; at the end of the block, all that is there is at the target.

    Raises:
        ConfigError: on entering, the place is taken (`check_free`) or cannot be written to.
    """
    check_free(target, overwrite)
    with (_on_disk if storage.is_local(target) else _on_object_store)(target) as folder:
        yield folder


@contextlib.contextmanager
def _on_disk(target: str) -> Iterator[str]:
    place = Path(storage.local_path(target))
    partial, old = (place.with_name(f".{place.name}.{word}") for word in ("partial", "old"))
    for folder in (partial, old):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out: expected a place that can be written to, found {place}: {error}") from error
    try:
        yield storage.to_uri(str(partial))
        if place.exists():
            place.rename(old)
        partial.rename(place)
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _on_object_store(target: str) -> Iterator[str]:
    mark = storage.join(target, UNFINISHED)
    storage.write_text(mark, "no manifest yet, or one of an export that is being replaced\n")
    remove_others(target, ())
    try:
        yield target
    except BaseException:
        storage.remove_folder(target)
        raise
    storage.remove_folder(mark)


def remove_others(folder: str, names: Collection[str]) -> None:
    """Removes what lies in a folder under other names than these: of tasks that failed and were run again."""
    for name in _names(folder):
        if name not in names and name != UNFINISHED:
            storage.remove_folder(storage.join(folder, name))


def _names(folder: str) -> list[str]:
    """Hidden ones too."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache(path)
    return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False)]
