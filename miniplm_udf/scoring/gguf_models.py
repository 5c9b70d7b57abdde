"""A .gguf file as a model folder: weights dequantised to float32 safetensors, config.json and tokenizer.json.

Owns this node's cache of such folders, `<cache>/gguf/<sha256 of the file>-v<layout>/`: loading a GGUF takes 15 to 20 s,
loading its folder under one. Input: a local .gguf file. Output: the folder. Executor side. Processes that ask at once
wait for one of them; the folder is built beside its place and renamed, so that a killed build leaves none.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.errors import ModelLoadError

SOURCE_FILE = "gguf_source.json"
# Part of the folder's name: raise it when what is written changes.
_LAYOUT = 1
# general.file_type of files whose tensors are not quantised: F32, F16, BF16.
_UNQUANTISED = (0, 1, 32)
# tokenizer.ggml.pre of vocabularies that split every digit off before the byte-level split, as llama.cpp does for them;
# transformers rebuilds these without the digits.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, remembered in the node's cache by (path, size, modification time)."""
    status = path.stat()
    record = storage.cache_folder() / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    stamp = [status.st_size, status.st_mtime_ns]
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    storage.write_json(str(record), {"stamp": stamp, "sha256": digest, "path": str(path)})
    return digest


def gguf_folder(path: Path) -> Path:
    """The model folder of a .gguf file, built where this node has none yet.

    A tokenizer.json beside the file is taken as it is; else the tokenizer is rebuilt from the file.

    Raises:
        ModelLoadError: if transformers cannot read the file.
    """
    from filelock import FileLock

    beside = path.parent / "tokenizer.json"
    name = f"{sha256_of(path)}-v{_LAYOUT}" + (f"-{sha256_of(beside)[:16]}" if beside.is_file() else "")
    target = storage.cache_folder() / "gguf" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building."))
        try:
            _convert(path, staging)
        except ModelLoadError:
            raise
        except Exception as error:
            raise ModelLoadError(
                f"{path}: expected a .gguf file of a causal LM that transformers can read, found "
                f"{type(error).__name__}: {error}; give the model as a folder of safetensors instead"
            ) from error
        else:
            staging.chmod(0o755)
            os.replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    metadata = _metadata(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if metadata["pre_tokenizer"] in _DIGITS_APART:
        _split_digits(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)
    if (path.parent / "tokenizer.json").is_file():
        shutil.copyfile(path.parent / "tokenizer.json", folder / "tokenizer.json")
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    # save_pretrained refuses a model that came from a GGUF. named_parameters() gives a tied weight once, as it would.
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / SOURCE_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _metadata(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return field.contents() if field is not None else None

    file_type = value("general.file_type")
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "file_type": file_type,
        "quantised": file_type not in _UNQUANTISED,
        "pre_tokenizer": value("tokenizer.ggml.pre"),
    }


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
