"""Reads the metadata at the beginning of a .gguf file, vocabulary included, in a fraction of a second.

The reader of the package gguf takes seconds for a vocabulary, which is too long for a check before a command starts.
Input: a local .gguf file. Output: its values by key. Reads no tensor; needs no package. Pure.
Source: the specification of the format in ggml, docs/gguf.md.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from miniplm_udf.errors import ModelLoadError
from miniplm_udf.storage import Json

# Formats of struct by the number of a value's type; 8 is a text, 9 a list.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def read_header(path: Path) -> Json:
    """Returns the metadata of a .gguf file.

    Args:
        path: the file.

    Raises:
        ModelLoadError: the file does not begin as a .gguf file does, or ends too early.
    """
    with path.open("rb") as file:
        magic, version = file.read(4), file.read(4)
        if magic != b"GGUF" or int.from_bytes(version, "little") not in (2, 3):
            raise ModelLoadError(
                f"{path}: expected a .gguf file of version 2 or 3, found a file that begins with {magic + version!r}; "
                "download it again, or convert it with a current llama.cpp"
            )
        try:
            _number(file, "Q")  # the number of tensors
            return dict(_pair(file) for _ in range(_number(file, "Q")))
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
            raise ModelLoadError(f"{path}: its metadata cannot be read ({error!r}); download the file again") from error


def _pair(file: BinaryIO) -> tuple[str, object]:
    key = _text(file)
    return key, _value(file, _number(file, "I"))


def _number(file: BinaryIO, form: str) -> int:
    value: int = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]
    return value


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    content = file.read(length)
    if len(content) < length:
        raise struct.error("the file ends in a text")
    return content.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> object:
    if kind == _TEXT:
        return _text(file)
    if kind != _LIST:
        return _number(file, _NUMBERS[kind])
    inner, n = _number(file, "I"), _number(file, "Q")
    if inner in (_TEXT, _LIST):
        return [_value(file, inner) for _ in range(n)]
    form = f"<{n}{_NUMBERS[inner]}"
    return list(struct.unpack(form, file.read(struct.calcsize(form))))
