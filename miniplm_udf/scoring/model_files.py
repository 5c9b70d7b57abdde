"""Where a model's files are: finds, fetches or converts them. Executor side.

Owns the ways to name a model (folder, URI, hub name, .gguf file, `package:NAME/FILE`). Input: a `ModelConfig` with a
path. Output: a local folder. Files are fetched or converted once on each node; a retry finds them there. transformers
and the hub's client are loaded inside the functions that need them.
"""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ModelLoadError
from miniplm_udf.scoring.gguf_models import gguf_folder
from miniplm_udf.scoring.tokenizer import TOKENIZER_FILE
from miniplm_udf.scoring.weights import weight_files
from miniplm_udf.similar_paths import did_you_mean

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_WEIGHTS = "*.safetensors"
# The same weights in the format of another program.
_NOT_FETCHED = ["consolidated*.safetensors"]


def model_folder(config: ModelConfig) -> Path:
    """The local folder of a model, with config.json, safetensors and tokenizer.json; fetched or converted if needed.

    Args:
        config: the model; its `path` is a folder, the `file:` or remote URI of a folder, a hub name, a `.gguf` file, or
            `package:NAME/FILE` for a file or folder inside an installed Python package.

    Raises:
        ModelLoadError: there is no such model, or its folder lacks files that scoring needs.
    """
    path = config.path
    if path is None:
        raise ModelLoadError("path: expected a model's path, found null, which is for a model that this run trains")
    if path.startswith("package:"):
        local = _in_package(path)
    elif path.endswith(".gguf") and not storage.is_local(path):
        local = storage.local_folder(path.rpartition("/")[0]) / path.rpartition("/")[2]
    elif storage.is_local(path) and (_existing(path) or path.endswith(".gguf") or not _HUB_NAME.match(path)):
        local = _existing(path) or _missing(path)
    elif storage.is_local(path):
        local = _from_hub(path, config.revision, _HUB_FILES + ([_WEIGHTS] if config.server is None else []))
    else:
        try:
            local = storage.local_folder(path, None if config.server is None else _HUB_FILES)
        except Exception as error:
            raise ModelLoadError(
                f"{storage.redact(path)}: cannot be fetched: {type(error).__name__}: {error}"
            ) from error
    folder = gguf_folder(local) if local.suffix == ".gguf" and local.is_file() else local
    return _complete(folder, config)


def files_here(config: ModelConfig) -> Path | None:
    """Returns where the files of a model are on this machine, as they are: fetches and converts nothing.

    Args:
        config: the model.

    Returns:
        A folder or a .gguf file; None for a model without a path, in an object storage, or on the hub and not fetched.

    Raises:
        ModelLoadError: there is no such local folder, file or installed package.
    """
    path = config.path
    if path is not None and path.startswith("package:"):
        return _in_package(path)
    if path is None or not storage.is_local(path):
        return None
    if local := _existing(path):
        return local
    return _fetched(path, config.revision) if is_hub_name(path) else _missing(path)


def is_hub_name(path: str) -> bool:
    """Whether a path is the name of a model on the hub, if there is no such folder.

    Args:
        path: the path of a model.
    """
    return storage.is_local(path) and not path.endswith(".gguf") and bool(_HUB_NAME.match(path))


def _fetched(name: str, revision: str | None) -> Path | None:
    """The folder of a model of the hub in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def _existing(path: str) -> Path | None:
    local = Path(storage.local_path(path)).expanduser() if path.startswith("file:") else Path(path).expanduser()
    return local.absolute() if local.exists() else None


def _missing(path: str) -> Path:
    raise ModelLoadError(
        f"{path}: expected a model folder, a .gguf file or a hub name (owner/name), found no such file or folder; "
        f"relative paths are taken from {Path.cwd()}{did_you_mean(path)}"
    )


def _in_package(path: str) -> Path:
    package, slash, inner = path.removeprefix("package:").partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not slash:
        raise ModelLoadError(
            f"{path}: expected package:NAME/FILE of an installed Python package, found no package {package!r}; "
            f"install it where the scoring runs"
        )
    for folder in spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]:
        if (Path(folder) / inner).exists():
            return Path(folder) / inner
    raise ModelLoadError(f"{path}: the package {package!r} is installed, but holds no {inner!r}")


def _from_hub(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=_NOT_FETCHED))
    except Exception as error:
        raise ModelLoadError(
            f"{name}: there is no such local folder (searched in {Path.cwd()}), and as a hub name"
            f"{f' at revision {revision}' if revision else ''} it cannot be fetched "
            f"({type(error).__name__}: {error}); correct the path, or fetch the model where there is a network"
            f"{did_you_mean(name)}"
        ) from error


def _complete(folder: Path, config: ModelConfig) -> Path:
    """The folder if it has all files; if only tokenizer.json is missing, a folder in the cache that has it."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder}: expected a model folder with a config.json, found none")
    if config.server is None:
        weight_files(folder)
    return folder if (folder / TOKENIZER_FILE).is_file() else _with_fast_tokenizer(folder, config.trust_remote_code)


def _with_fast_tokenizer(folder: Path, trust_remote_code: bool) -> Path:
    """A folder in the cache with links to the files of `folder`, and a tokenizer.json made by transformers."""
    import os
    import shutil
    import tempfile

    from transformers import AutoTokenizer

    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()]
    target = storage.cache_folder() / "tokenizers" / hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:32]
    if target.exists():
        return target
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise ModelLoadError(
            f"{folder}: a fast tokenizer is needed; expected tokenizer.json, found none, and transformers cannot make "
            f"one ({type(error).__name__}: {error})"
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building."))
    for file, _, _ in stamps:
        (staging / Path(file).name).symlink_to(Path(file).resolve())
    (staging / TOKENIZER_FILE).write_text(text, encoding="utf-8")
    try:
        os.replace(staging, target)
    except OSError:  # another process was first
        shutil.rmtree(staging)
    return target
