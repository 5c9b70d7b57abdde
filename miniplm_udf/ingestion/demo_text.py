"""Makes the demo's corpus of text that every Python environment holds, as gzip JSONL shards. Driver only, no Spark.

Input: the standard library and the installed packages. Owns the choice of text: docstrings (read by `ast`, no module is
imported), README texts (the bodies of package metadata), licences, source files and data files. The text is not
cleaned: near-duplicates and noise are there for refinement to drop. Output: `<folder>/demo-text-NNNN.jsonl.gz`, one
object a line with `id` (a relative path), `source` and `text`; and the manifest `demo-text.json`. Documents are taken
whole, in the order of a hash of their path, equally many bytes of each source; a larger scale adds shards and leaves
full shards as they are. A retry replaces whole files; a folder that is complete at the scale stays as it is.
"""

import ast
import dataclasses
import email
import gzip
import hashlib
import json
import logging
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.storage import write_json

LOGGER = logging.getLogger("miniplm.demo_text")

RULE = 1  # version of the choice of text: a folder made by another rule is made again
BYTES_PER_SOURCE = 100_000  # at scale 1: five sources, about 145,000 tokens of SmolLM2
SHARDS = 4  # at scale 1
MAX_DOCUMENT_BYTES = 12_000  # the longest common licence fits; smaller documents give every split some of each source
MIN_DOCUMENT_BYTES = 200
DOCSTRINGS_PER_FILE = 8
MANIFEST = "demo-text.json"

_LICENCE_NAMES = ("license", "licence", "copying", "notice")
_DATA_SUFFIXES = {".json", ".csv", ".txt", ".rst", ".md"}
_METADATA_NAMES = {"METADATA", "PKG-INFO"}
_OWN_NAME = "miniplm"  # its README changes while it is worked on

NamedText = tuple[str, str]  # (id, text)
TextReader = Callable[[str, Path], Iterator[NamedText]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoManifest:
    """The content of `demo-text.json`.

    Attributes:
        rule: version of the choice of text.
        scale: size of the corpus; 1 takes BYTES_PER_SOURCE of each source.
        sources: `documents` and `bytes` by source.
        shards: SHA-256 of the shards, by name.
    """

    rule: int
    scale: float
    sources: dict[str, dict[str, int]]
    shards: dict[str, str]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def python_roots() -> dict[str, Path]:
    """The folders that are searched, by the prefix that their files' ids get."""
    paths = sysconfig.get_paths()
    roots = {"stdlib": Path(paths["stdlib"]), "site-packages": Path(paths["purelib"])}
    if paths["platlib"] != paths["purelib"]:
        roots["site-packages-platform"] = Path(paths["platlib"])
    return roots


def list_files(roots: dict[str, Path]) -> dict[str, Path]:
    """Lists the regular files below some folders, without compiled files, links and this project's files.

    Args:
        roots: folder by prefix; below the prefix `stdlib`, installed packages are left out.

    Returns:
        Path by id: the prefix and the path below the folder, with slashes.
    """
    paths = {}
    for prefix, root in roots.items():
        for folder, subfolders, names in os.walk(root):
            skipped = {"__pycache__"} | ({"site-packages", "dist-packages"} if prefix == "stdlib" else set())
            subfolders[:] = [s for s in subfolders if s not in skipped and not s.startswith((f"{_OWN_NAME}-", "~"))]
            relative = PurePosixPath(prefix, Path(folder).relative_to(root).as_posix())
            for name in names:
                if not name.startswith((f"__editable__.{_OWN_NAME}", f"__editable___{_OWN_NAME}")):
                    paths[str(relative / name)] = Path(folder, name)
    return {key: path for key, path in paths.items() if not path.is_symlink()}


def kind_of(file_id: str) -> str | None:
    """The kind of a file: readmes, licences, source_code or data_files; None for other files.

    Args:
        file_id: the file's path below its installation folder.
    """
    path = PurePosixPath(file_id)
    in_metadata = any(part.endswith((".dist-info", ".egg-info")) for part in path.parts[:-1])
    if path.name in _METADATA_NAMES and in_metadata:
        return "readmes"
    if path.name.lower().startswith(_LICENCE_NAMES) and path.suffix.lower() in {"", ".txt", ".md", ".rst", ".apache"}:
        return "licences"
    if path.suffix == ".py":
        return "source_code"
    if path.suffix in _DATA_SUFFIXES and not in_metadata:
        return "data_files"
    return None


def _text_of(path: Path, limit: int) -> str | None:
    """The text of a file; None if it is longer than `limit` bytes, is not UTF-8 or cannot be read."""
    try:
        if path.stat().st_size > limit:
            return None
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _whole(file_id: str, path: Path) -> Iterator[NamedText]:
    text = _text_of(path, MAX_DOCUMENT_BYTES)
    if text is not None:
        yield file_id, text


def _readme(file_id: str, path: Path) -> Iterator[NamedText]:
    text = _text_of(path, 50 * MAX_DOCUMENT_BYTES)
    if text is not None:
        message = email.message_from_string(text)
        yield file_id, str(message.get_payload() or message.get("Description", ""))


def _docstrings(file_id: str, path: Path) -> Iterator[NamedText]:
    """Yields the docstrings of a module's first objects; only a few, so that many modules give text."""
    text = _text_of(path, 50 * MAX_DOCUMENT_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(text or "")
    except (SyntaxError, ValueError, RecursionError):
        return
    taken = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            if len(docstring) >= MIN_DOCUMENT_BYTES and taken < DOCSTRINGS_PER_FILE:
                taken += 1
                yield f"{file_id}::{getattr(node, 'name', '')}:{getattr(node, 'lineno', 0)}", docstring


# For each source: the kind of the files that it is read from, and the reader.
_SOURCES: dict[str, tuple[str, TextReader]] = {
    "docstrings": ("source_code", _docstrings),
    "readmes": ("readmes", _readme),
    "licences": ("licences", _whole),
    "source_code": ("source_code", _whole),
    "data_files": ("data_files", _whole),
}


def documents_of(source: str, files: dict[str, Path]) -> Iterator[NamedText]:
    """Yields the usable documents of a source, in the order of a hash of the id of their file.

    Args:
        source: name of the source, a key of `_SOURCES`.
        files: all files by id; files of another kind are not read.

    Yields:
        The document's id, and its text of MIN_DOCUMENT_BYTES to MAX_DOCUMENT_BYTES UTF-8 bytes.
    """
    kind, reader = _SOURCES[source]
    chosen = sorted((file_id for file_id in files if kind_of(file_id) == kind), key=lambda f: _hash(f"{source}\0{f}"))
    for file_id in chosen:
        for document_id, text in reader(file_id, files[file_id]):
            try:
                n_bytes = len(text.encode("utf-8"))
                document_id.encode("utf-8")
            except UnicodeEncodeError:  # a lone surrogate, from an escape or a file name
                continue
            if MIN_DOCUMENT_BYTES <= n_bytes <= MAX_DOCUMENT_BYTES and "\0" not in text:
                yield document_id, text


def choose(files: dict[str, Path], scale: float) -> tuple[list[list[dict[str, str]]], dict[str, dict[str, int]]]:
    """Chooses the documents of the corpus.

    Shard k of a source begins where k quarters of BYTES_PER_SOURCE are taken, so it does not depend on the scale.

    Args:
        files: paths by id (`list_files`).
        scale: size of the corpus; 1 takes BYTES_PER_SOURCE of each source.

    Returns:
        The rows of each shard; and by source the number of `documents` and `bytes`.
    """
    budget, shard_bytes = BYTES_PER_SOURCE * scale, BYTES_PER_SOURCE / SHARDS
    shards: list[list[dict[str, str]]] = []
    counts: dict[str, dict[str, int]] = {}
    for source in _SOURCES:
        taken = {"documents": 0, "bytes": 0}
        for document_id, text in documents_of(source, files):
            if taken["bytes"] >= budget:
                break
            shard = int(taken["bytes"] // shard_bytes)
            shards.extend([] for _ in range(shard + 1 - len(shards)))
            shards[shard].append({"id": document_id, "source": source, "text": text})
            taken = {"documents": taken["documents"] + 1, "bytes": taken["bytes"] + len(text.encode("utf-8"))}
        else:
            if taken["bytes"] < budget:
                LOGGER.warning("%s: asked for %.0f bytes, found %d: took all", source, budget, taken["bytes"])
        counts[source] = taken
    return shards, counts


def _encode(rows: list[dict[str, str]]) -> bytes:
    # In the order of a hash, so that a file mixes sources as a crawl does; mtime 0: equal rows give equal bytes.
    ordered = sorted(rows, key=lambda row: _hash(f"{row['source']}\0{row['id']}"))
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in ordered)
    return gzip.compress(lines.encode("utf-8"), mtime=0)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file by renaming; a file that has this content already keeps its modification time."""
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _complete_manifest(folder: Path, scale: float) -> DemoManifest | None:
    """The manifest, if the folder holds exactly the shards in it, made at this scale and by this rule; else None."""
    try:
        manifest = DemoManifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        is_same = (manifest.rule, manifest.scale) == (RULE, scale)
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.jsonl.gz")}
        return manifest if is_same and hashes == manifest.shards else None
    except (OSError, ValueError, TypeError):
        return None


def write_demo_text(folder: Path, scale: float = 1.0, roots: dict[str, Path] | None = None) -> DemoManifest:
    """Writes the demo's text into a folder and returns its manifest.

    Args:
        folder: created if it does not exist; shards of other scales are removed from it.
        scale: 1 is about 500 KB of text. If the environment has less text than the scale needs, all is taken, with a
            warning.
        roots: folders to search, by the prefix of their files' ids; by default the standard library and the installed
            packages.

    Raises:
        ConfigError: scale is not above 0.
        CorpusError: no text was found.
    """
    if not scale > 0:
        raise ConfigError(f"--scale: expected a number above 0, found {scale}")
    complete = _complete_manifest(folder, scale)
    if complete is not None:
        LOGGER.info("%s: complete at scale %g, left as it is", folder, scale)
        return complete
    searched = python_roots() if roots is None else roots
    shards, counts = choose(list_files(searched), scale)
    if not shards:
        raise CorpusError(f"demo text: expected Python files and package metadata under {searched}, found no text")
    folder.mkdir(parents=True, exist_ok=True)
    encoded = {f"demo-text-{k:04d}.jsonl.gz": _encode(rows) for k, rows in enumerate(shards)}
    for stale in folder.glob("demo-text-*.jsonl.gz"):
        if stale.name not in encoded:
            stale.unlink()
    for name, content in encoded.items():
        _replace(folder / name, content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in encoded.items()}
    manifest = DemoManifest(rule=RULE, scale=scale, sources=counts, shards=hashes)
    write_json(str(folder / MANIFEST), dataclasses.asdict(manifest))
    for source, count in counts.items():
        LOGGER.info("%s: %d documents, %d bytes", source, count["documents"], count["bytes"])
    return manifest
