"""The folder of an export: complete or absent, and never in place of anything but another export. Driver only.

Input: the path or URI of the folder. On a disk, everything is written to a hidden folder next to it, which gets its
name at the end. An object store cannot rename: there the manifest is written last and a marker file lies in the folder
until then, so a folder is complete if it has a manifest and no marker. A failure removes what was written. What a kill
left is removed by the next export to the same folder; only one runs at a time (the lease of export.py).
"""

import contextlib
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import fsspec

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError
from miniplm_udf.storage import Json

MANIFEST = "manifest.json"
# The value of `kind` in a manifest.
KIND = "miniplm export"
UNFINISHED = "_UNFINISHED"


def check_free(target: str, overwrite: bool) -> None:
    """Refuses a folder that is not empty, unless it holds an export that may be replaced.

    Args:
        target: URI of the folder.
        overwrite: whether an export may be replaced.

    Raises:
        ConfigError: it is refused.
    """
    if not storage.exists(target) or not _names(target):
        return
    is_unfinished = storage.exists(storage.join(target, UNFINISHED))
    manifest = manifest_of(target)
    if manifest is None and not is_unfinished:
        raise ConfigError(
            f"--out: expected nothing, or an earlier export, at {storage.redact(target)}, found files of something "
            "else, which are never overwritten; choose another folder"
        )
    if manifest is not None and not overwrite:
        raise ConfigError(
            f"--out: expected nothing at {storage.redact(target)}, found an export of "
            f"{manifest.get('corpus')}@{manifest.get('version')}; choose another folder, or --overwrite to replace it"
        )


def manifest_of(target: str) -> Json | None:
    """Returns the manifest of the export in a folder; None if the folder has no manifest.

    Args:
        target: URI of the folder, which need not exist.
    """
    manifest = None
    with contextlib.suppress(ValueError):  # another program's file with that name
        manifest = storage.read_json(storage.join(target, MANIFEST))
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == KIND else None


@contextlib.contextmanager
def written(target: str, overwrite: bool) -> Iterator[str]:
    """Publishes the files that the block writes, all at once at its end.

    Args:
        target: URI of the folder to make.
        overwrite: whether an export there may be replaced.

    Yields:
        URI of the folder to write to.

    Raises:
        ConfigError: the target is refused (`check_free`) or cannot be written to; raised at the start of the block.
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
        raise ConfigError(f"--out: expected a folder that can be written to, found {place}: {error}") from error
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
    storage.write_text(mark, "no manifest yet, or the manifest of an export that is being replaced\n")
    remove_others(target, ())
    try:
        yield target
    except BaseException:
        storage.remove_folder(target)
        raise
    storage.remove_folder(mark)


def remove_others(folder: str, names: Collection[str]) -> None:
    """Removes files whose names are not in `names`: files of tasks that failed and were run again.

    Args:
        folder: path or URI of the folder.
        names: names of the files that stay; the marker `UNFINISHED` stays too.
    """
    for name in _names(folder):
        if name not in names and name != UNFINISHED:
            storage.remove_folder(storage.join(folder, name))


def _names(folder: str) -> list[str]:
    """Names of all files and folders in a folder, hidden ones too."""
    filesystem, path = fsspec.core.url_to_fs(folder)
    filesystem.invalidate_cache(path)
    return [str(name).rstrip("/").rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False)]
