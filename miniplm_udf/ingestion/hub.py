"""Fetches data sets that are named by hub: `hf://datasets/ORG/NAME/...`. Driver only.

Input: a data set, or a folder, file or glob in it, perhaps with `@REVISION`. Output: the same path in the hub's cache
on this machine (`HF_HOME`), where Spark reads it like any local folder; on a cluster, the cache has to be on storage
that all nodes share. Only files of formats that ingest reads are fetched, each once. A file's path has the commit in
it: a newer commit of the hub gives new paths, whose known documents are duplicates. Without a network, the files that
were fetched before are read. A retry continues the download.
"""

import functools
import logging
import re
from pathlib import Path

from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.formats import SUFFIXES

LOGGER = logging.getLogger("miniplm.ingest")

_PREFIX = "hf://"
_NAME = re.compile(r"^hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(?P<path>/.*)?$")
_GLOB = re.compile(r"[*?\[\]{}]")
_READ = tuple(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
_NAMES_SHOWN = 10


def is_on_hub(path: str) -> bool:
    """Whether a path is on a hub.

    Args:
        path: a path or URI.
    """
    return path.startswith(_PREFIX)


def folder() -> str:
    """Returns the folder of the hub's cache on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return str(HF_HUB_CACHE)


@functools.cache
def local_copy(path: str) -> str:
    """Fetches the files at a path of the hub, once in a process.

    Args:
        path: a data set, a folder or file in it, or a glob.

    Returns:
        The same path, folder or glob on this machine.

    Raises:
        ConfigError: the path names no data set, there are no files to read, or the hub cannot be reached.
    """
    match = _NAME.match(path)
    if match is None:
        raise ConfigError(f"ingest.input: expected hf://datasets/ORG/NAME, perhaps with a path behind it, found {path}")
    repo, revision, inner = match["repo"], match["revision"], (match["path"] or "").strip("/")
    LOGGER.info("ingest: fetching %s from the hub, as far as it is not on this machine", path)
    folder = _fetched(path, repo, revision, inner)
    if not any(file.is_file() for file in folder.rglob("*")) or not (_GLOB.search(inner) or (folder / inner).exists()):
        raise ConfigError(f"ingest.input: {path} has no file that ingest reads; {_names_there(repo, revision, inner)}")
    return f"{folder}/{inner}".rstrip("/")


def patterns(inner: str) -> list[str]:
    """Returns the patterns of the files to fetch, in which `*` also stands for `/`.

    Args:
        inner: a folder, file or glob in a data set; empty for the whole data set.

    Returns:
        Patterns that match at least the files of the path.
    """
    if _GLOB.search(inner):
        return [re.sub(r"\{[^}]*\}", "*", inner).replace("**/", "*")]
    return [*([inner] if inner else []), *(f"{inner}/*{suffix}".lstrip("/") for suffix in _READ)]


def _fetched(path: str, repo: str, revision: str | None, inner: str) -> Path:
    """Fetches the files; returns the local folder of the data set's commit."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"ingest.input: {path} needs the package huggingface_hub; install it with pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns(inner)))
    except Exception as error:  # errors of the hub's client, of its HTTP library and of the disk
        raise ConfigError(
            f"ingest.input: {path} cannot be fetched ({type(error).__name__}: {str(error).splitlines()[0]}); correct "
            "the name, set HF_TOKEN for a private or gated data set, or fetch it where there is a network with "
            f"hf download {repo} --repo-type dataset --local-dir FOLDER and set ingest.input=FOLDER"
        ) from error


def _names_there(repo: str, revision: str | None, inner: str) -> str:
    from huggingface_hub import HfApi

    from miniplm_udf.ingestion.file_format import csv_hint

    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except Exception as error:
        return f"its files cannot be listed ({type(error).__name__})"
    below = [name for name in names if name == inner or name.startswith(f"{inner}/".lstrip("/"))]
    hint = csv_hint(below)
    return f"it has {', '.join((below or names)[:_NAMES_SHOWN])}" + (f"; {hint}" if hint else "")
