"""A fake generator, whose continuation is a function of the text, and the log of what it continued."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miniplm_udf.scoring.results import Failure, Generation


class CountingGenerator:
    """Continues a text's bytes by their sum; refuses texts that begin with `fail`."""

    tokenizer_hash = "bytes"

    def __init__(self, log: str) -> None:
        self._log = Path(log)

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[bytes]:
        return [str(text).encode() for text in texts]

    def generate(self, tokenized: Sequence[Any], ends_document: Sequence[bool], ids: Sequence[str]) -> list[Any]:
        with self._log.open("a") as handle:
            handle.writelines(f"{name}\n" for name in ids)
        return [self._result(raw) for raw in tokenized]

    def _result(self, raw: bytes) -> Generation | Failure:
        if raw.startswith(b"fail"):
            return Failure("no_tokens", "the fake refuses it")
        return Generation(np.array([*raw, sum(raw)], "<i4").tobytes(), len(raw), "length")


@dataclasses.dataclass(frozen=True)
class CountingFactory:
    """Makes a `CountingGenerator`; `log` has a line for every instance that was continued."""

    log: str

    def __call__(self) -> CountingGenerator:
        return CountingGenerator(self.log)


def calls(log: Path) -> list[str]:
    """The ids of the instances that were continued, sorted; an instance that was continued twice stands twice."""
    return sorted(log.read_text().split())
