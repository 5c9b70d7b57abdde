"""The weight files of a model folder: which they are, what their headers say, the number of parameters, the hash.

Owns the rule that separates a model's own files from others in its folder (files that `model.safetensors.index.json`
names, or `model.safetensors` if there is no index), the reader of safetensors headers, and the hash of a model's
weights. Input: a local folder. Output: paths, tensor names with type and shape, counts of elements, a hash of 32 hex
digits. Reads no tensor. Driver or executor side; needs neither torch nor transformers; a retry gives the same.
"""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import NamedTuple

from miniplm_udf import storage
from miniplm_udf.errors import ModelLoadError

SOURCE_FILE = "gguf_source.json"
INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_ADAPTER_FILE = "adapter_config.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
# Bytes of the other types of safetensors that are longer than one byte.
_STORED_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}


class Tensor(NamedTuple):
    """One tensor of a safetensors header: type (`F32`, `BF16`, ...), shape, and name of the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def n_elements(self) -> int:
        """Number of elements: the product of the shape."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, sorted by name.

    Files that the index does not name (`consolidated.safetensors` next to shards) do not belong to the model.

    Args:
        folder: a local model folder.

    Raises:
        ModelLoadError: there are none, it is unclear which they are, a shard is absent, or the folder holds an adapter.
    """
    _refuse_adapter(folder)
    index, single = folder / INDEX_FILE, folder / _SINGLE_FILE
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        if single.is_file() and names != [_SINGLE_FILE]:
            raise ModelLoadError(
                f"{folder}: holds both {_SINGLE_FILE} and {INDEX_FILE}, and the index names other files; remove the "
                f"one that is not the model's"
            )
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelLoadError(
                f"{folder}: {INDEX_FILE} names {len(names)} weight files, of which {len(absent)} are not there: "
                f"{', '.join(absent[:3])}; copy or fetch the whole model again"
            )
        return [folder / name for name in names]
    if not single.is_file():
        raise ModelLoadError(_other_names(folder))
    return [single]


def _refuse_adapter(folder: Path) -> None:
    if (folder / _ADAPTER_FILE).is_file():
        raise ModelLoadError(
            f"{folder}: holds an adapter (LoRA) with {_ADAPTER_FILE}, which is no model by itself; merge it into its "
            f"base model (merge_and_unload of the package peft) and save that model into another folder, or "
            f"remove {_ADAPTER_FILE} if the folder holds the merged model"
        )


def _other_names(folder: Path) -> str:
    """The message for a folder without the files that transformers writes."""
    names = [file.name for file in sorted(folder.glob("*.safetensors"))]
    if not names:
        pickles = [file.name for file in sorted(folder.glob("*.bin"))][:3]
        return (
            f"{folder}: expected weights as *.safetensors, found {', '.join(pickles) or 'none'}; save the model again "
            f"with save_pretrained"
        )
    if len(names) == 1:
        remedy = f"rename it to {_SINGLE_FILE}, if it is the whole model as transformers names its weights"
    else:
        remedy = "it is unclear which of them are the model: fetch the index too, or save it with save_pretrained"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{folder}: expected {_SINGLE_FILE} or {INDEX_FILE}, found {', '.join(names[:3])}{more}; {remedy}"


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor name, from an index file."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = {str(name): str(file) for name, file in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(
            f"{index}: expected an index of safetensors files with a weight_map, found none "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    outside = [file for file in plain.values() if Path(file).name != file or not file.endswith(".safetensors")]
    if outside or not plain:
        raise ModelLoadError(
            f"{index}: expected names of *.safetensors files in the same folder, found {(outside or ['none'])[0]!r}"
        )
    return plain


def tensors(folder: Path) -> dict[str, Tensor]:
    """Reads the headers of the model's weight files; reads no weights.

    Args:
        folder: a local model folder.

    Returns:
        Every tensor, by name.

    Raises:
        ModelLoadError: a weight file is missing, cut off or no safetensors file, or two files hold a tensor
            with the same name.
    """
    entries: dict[str, Tensor] = {}
    for file in weight_files(folder):
        for name, tensor in _header(file).items():
            if name in entries:
                raise ModelLoadError(
                    f"{folder}: the tensor {name} is in both {entries[name].file} and {file.name}; the files are "
                    f"parts of two saved models: fetch or save the whole model again"
                )
            entries[name] = tensor
    return entries


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its header; checks the length of the file."""
    with file.open("rb") as handle:
        try:
            n_bytes = struct.unpack("<Q", handle.read(8))[0]
            header = json.loads(handle.read(n_bytes))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = 8 + n_bytes + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
            listed = {name: Tensor(entry["dtype"], tuple(entry["shape"]), file.name) for name, entry in entries.items()}
        except (struct.error, ValueError, OverflowError, MemoryError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(
                f"{file}: expected a safetensors file, found no valid header ({error}); fetch or save it again"
            ) from error
    size = file.stat().st_size
    if size < end:
        raise ModelLoadError(
            f"{file}: expected {end:,} bytes, found {size:,}: the file is cut off; fetch or save it again"
        )
    return listed


def n_parameters(folder: Path) -> int:
    """Returns the number of elements of all tensors in the model's weight files.

    Args:
        folder: a local model folder.

    Raises:
        ModelLoadError: a weight file is missing or damaged (see `tensors`).
    """
    return sum(tensor.n_elements for tensor in tensors(folder).values())


def weight_bytes(folder: Path, float_bytes: int) -> int:
    """Returns the memory of the model's weights once they are loaded, in bytes.

    Floats of 16 bits and more are loaded in the dtype of the forward pass. Quantised numbers stay as they are stored.

    Args:
        folder: a local model folder.
        float_bytes: bytes of a number in the dtype of the forward pass.

    Raises:
        ModelLoadError: a weight file is missing or damaged (see `tensors`).
    """
    return sum(
        tensor.n_elements * (float_bytes if tensor.dtype in _FLOATS else _STORED_BYTES.get(tensor.dtype, 1))
        for tensor in tensors(folder).values()
    )


def weights_hash(folder: Path) -> str:
    """The hash of everything that the model computes with: weights, config and own code, or the .gguf file.

    Other files in the folder do not count and may change.

    Args:
        folder: a local model folder; or one converted from a .gguf file, whose hash then counts.

    Returns:
        32 hex digits.

    Raises:
        ModelLoadError: a weight file is missing, or the index of the weight files is damaged.
    """
    source = folder / SOURCE_FILE
    if source.is_file():
        record = json.loads(source.read_text(encoding="utf-8"))
        carried = record.get("carried")
        if not carried:
            return str(record["sha256"])[:32]
        return hashlib.sha256(json.dumps([record["sha256"], carried], sort_keys=True).encode()).hexdigest()[:32]
    # The model's own code counts too, since trust_remote_code may run it.
    files = [*weight_files(folder), *sorted(folder.glob("*.py")), folder / "config.json"]
    digests = [(file.name, sha256_of(file)) for file in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]


def sha256_of(path: Path) -> str:
    """Hashes a file, and keeps the result in the node's cache by path, size and modification time.

    Args:
        path: a local file.

    Returns:
        The SHA-256, 64 hex digits.
    """
    status = path.stat()
    record = storage.cache_folder() / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    stamp = [status.st_size, status.st_mtime_ns]
    try:
        cached = json.loads(record.read_text(encoding="utf-8"))
        if cached["stamp"] == stamp:
            return str(cached["sha256"])
    except (OSError, ValueError, KeyError):
        pass
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    storage.write_json(str(record), {"stamp": stamp, "sha256": digest, "path": str(path)})
    return digest
