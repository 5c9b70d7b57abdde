"""Fetches data sets that are named by hub: `hf://datasets/ORG/NAME/...`. Driver only.

Input: a data set, or a folder, file or glob in it, perhaps with `@REVISION`. Output: the same path in the hub's cache
on this machine (`HF_HOME`), where Spark reads it like any local folder; on a cluster, the cache has to be on storage
that all nodes share. Only files of formats that ingest reads are fetched, each once. A file's path has the commit in
it: a newer commit of the hub gives new paths, whose known documents are duplicates. Without a network, the files that
were fetched before are read. A retry continues the download. `listed_files` fetches nothing: it lists for the checks
before a command starts.
"""

import functools
import logging
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion import globs
from miniplm_udf.ingestion.formats import SUFFIXES
from miniplm_udf.ingestion.input_files import ListedFile, is_hidden, list_files

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
    repo, revision, inner = _parts(path)
    LOGGER.info("ingest: fetching %s from the hub, as far as it is not on this machine", path)
    folder = _fetched(path, repo, revision, inner)
    if not any(file.is_file() for file in folder.rglob("*")) or not (_GLOB.search(inner) or (folder / inner).exists()):
        raise ConfigError(f"ingest.input: {path} has no file that ingest reads; {_names_there(repo, revision, inner)}")
    return f"{folder}/{inner}".rstrip("/")


def _parts(path: str) -> tuple[str, str | None, str]:
    """The data set, the revision and the path in it."""
    match = _NAME.match(path)
    if match is None:
        raise ConfigError(f"ingest.input: expected hf://datasets/ORG/NAME, perhaps with a path behind it, found {path}")
    return match["repo"], match["revision"], (match["path"] or "").strip("/")


def listed_files(path: str, seconds: float) -> list[ListedFile] | None:
    """Lists the files of a path of the hub that ingest would fetch and read; fetches none.

    Args:
        path: a data set, a folder or file in it, or a glob.
        seconds: time for the hub's answer.

    Returns:
        The files, sorted by name: those in the cache with their place on this machine, the others by their names. None
        if it is not known which files there are.

    Raises:
        ConfigError: the path names no data set, the hub has none of this name or no file that ingest reads, or the hub
            cannot be asked and the cache does not have its files.
        ImportError: huggingface_hub is not installed.
    """
    from huggingface_hub import try_to_load_from_cache

    repo, revision, inner = _parts(path)
    try:
        commit, names = _names_on_hub(repo, revision, seconds)
    except ConfigError as error:
        raise ConfigError(f"ingest.input: {path}: {error}") from error
    except Exception as error:  # the errors of several HTTP clients
        if (copy := _cached(repo, revision, inner)) is not None:
            return list_files(f"{copy}/{inner}".rstrip("/")) or None
        # A hub that is slow now may answer when ingest asks it.
        if "Timeout" in type(error).__name__:
            return None
        raise ConfigError(
            f"ingest.input: {path}: the hub cannot be asked ({type(error).__name__}), and {folder()} does not have all "
            f"files of the data set; fetch it where there is a network with hf download {repo} --repo-type dataset "
            "--local-dir FOLDER, and set ingest.input=FOLDER"
        ) from error
    matches = _matching(inner, names)
    if not matches:
        raise ConfigError(f"ingest.input: {path} has no file that ingest reads; {_described(names, inner)}")
    files = []
    for name in sorted(matches):
        here = try_to_load_from_cache(repo, name, revision=commit, repo_type="dataset")
        is_here = isinstance(here, str)
        files.append(ListedFile(str(here), Path(str(here)).stat().st_size) if is_here else ListedFile(name, 0, False))
    return files


def _names_on_hub(repo: str, revision: str | None, seconds: float) -> tuple[str | None, list[str]]:
    """The commit of a data set, and the names of its files.

    Raises:
        ConfigError: the hub does not have the data set, or does not give it.
        Exception: the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(repo, revision=revision, timeout=seconds)
    except GatedRepoError as error:
        raise ConfigError("the hub gives it to users who accepted its terms; accept them, and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"the data set has no revision {revision!r}; correct the name after @") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            "expected a data set of the hub, found none of this name; correct it, or set HF_TOKEN for a private data "
            "set"
        ) from error
    return info.sha, [file.rfilename for file in info.siblings or ()]


def _cached(repo: str, revision: str | None, inner: str) -> Path | None:
    """The folder of the data set in the cache; None if the cache does not have all files of the path."""
    from huggingface_hub import snapshot_download

    allowed = patterns(inner)
    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=allowed, local_files_only=True
            )
        )
    except Exception:  # several classes, by what the cache lacks
        return None


def _matching(inner: str, names: Iterable[str]) -> list[str]:
    """The names that are fetched for a path, and that Spark then finds at it."""
    wanted = patterns(inner)
    fetched = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    if _GLOB.search(inner):
        return [name for name in globs.matching(inner, fetched) if not is_hidden(name.rpartition("/")[2])]
    prefix = f"{inner}/" if inner else ""
    below = {name: name.removeprefix(prefix) for name in fetched if name.startswith(prefix)}
    below |= {name: name.rpartition("/")[2] for name in fetched if name == inner}
    return [name for name, rest in below.items() if not any(map(is_hidden, rest.split("/")))]


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

    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except Exception as error:
        return f"its files cannot be listed ({type(error).__name__})"
    return _described(names, inner)


def _described(names: list[str], inner: str) -> str:
    from miniplm_udf.ingestion.file_format import csv_hint

    below = [name for name in names if name == inner or name.startswith(f"{inner}/".lstrip("/"))]
    hint = csv_hint(below)
    return f"it has {', '.join((below or names)[:_NAMES_SHOWN])}" + (f"; {hint}" if hint else "")
