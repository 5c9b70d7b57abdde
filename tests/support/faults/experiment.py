"""The small experiment of the fault trials: its input, its config, and stand-ins for models and tokenizer.

Owns what a trial runs on: two files (one micro-batch each) of short documents, with a line that is no JSON, a
document that the scorers refuse, one that was in an earlier file already, and one that is in the file twice. The
stand-ins make executors load no torch: texts are cut at spaces, and a score is a function of the text, to which
`varying` scorers add a number that differs with every call. Used on the driver and on executors; a retried task scores
by the same rule.
"""

import dataclasses
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, ModelConfig, ScoreConfig, SplitConfig
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.results import Failure, Score

SCALES = {"teacher": 1.0, "reference": 2.5}
CORPUS = "best"
RATIO = 0.5
Mode = Literal["document", "packed"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_TOKENS = 20
N_FILES = 2
TOKENIZER_HASH = "0" * 32
REFUSED = "refused"
_SECONDS_A_ROW = 0.02


class VaryingScorer:
    """Takes its time over each row. The same text has the same score from two scorers, unless they vary."""

    def __init__(self, scale: float, varying: bool) -> None:
        self._scale, self._noise = scale, random.SystemRandom() if varying else None

    def score(
        self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> list[Any]:
        return [self._one(str(text)) for text in texts]

    def _one(self, text: str) -> Score | Failure:
        time.sleep(_SECONDS_A_ROW)
        if REFUSED in text:
            return Failure("no_tokens", "the fake refuses it")
        raw = text.encode()
        # The place of each byte counts: two texts of the same words differ.
        total = self._scale * sum((place % 7 + 1) * byte for place, byte in enumerate(raw)) / 1000
        noise = self._noise.random() / 1000 if self._noise is not None else 0.0
        return Score(total + noise, len(text.split()), len(raw))


@dataclasses.dataclass(frozen=True)
class VaryingFactory:
    """Makes a scorer in the Spark worker, for it has no `key`."""

    scale: float
    varying: bool

    def __call__(self) -> VaryingScorer:
        return VaryingScorer(self.scale, self.varying)


@dataclasses.dataclass(frozen=True)
class KeyedVaryingFactory(VaryingFactory):
    """Makes a scorer that is kept by its key: in a process of its own, where there is one."""

    @property
    def key(self) -> str:
        return f"fake/{self.scale}/{self.varying}"


def factories(varying: bool, keyed: bool) -> dict[str, VaryingFactory]:
    made = KeyedVaryingFactory if keyed else VaryingFactory
    return {alias: made(scale, varying) for alias, scale in SCALES.items()}


def descriptions() -> dict[str, ModelDescription]:
    """Descriptions of models that do not exist."""
    return {
        alias: ModelDescription(
            model_id=alias, tokenizer_hash=TOKENIZER_HASH, dtype="float32", context_tokens=64,
            window_overlap_tokens=0, context_prefix="none", document_separator="<s>", document_separator_id=0,
            prefix_token_id=None, vocab_size=2, n_parameters=1, weights_hash=alias, path="fake",
        )
        for alias in SCALES
    }  # fmt: skip


def encode(texts: list[str]) -> list[list[tuple[int, int]]]:
    """Stands in for a tokenizer: a token is a word with the spaces before it."""
    return [[match.span() for match in re.finditer(r"\s*\S+\s*$|\s*\S+", text)] for text in texts]


def ingest_function(ingest: IngestConfig, model: ModelConfig, spec: Any) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """In place of `miniplm_udf.ingestion.splits.make_ingest_function`: the same, without a tokenizer's folder."""

    def ingest_split(batches: Iterator[Any]) -> Iterator[Any]:
        from miniplm_udf.ingestion.documents import DocumentReader
        from miniplm_udf.ingestion.splits import ingest_batches

        reader = DocumentReader(ingest.fields, ingest.default_source, ingest.split)
        yield from ingest_batches(batches, encode, reader, spec)

    return ingest_split


def pack_function(ingest: IngestConfig, model: ModelConfig, spec: Any) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """In place of `miniplm_udf.ingestion.copies.pack_function`: the same, without a tokenizer's folder."""

    def pack(batches: Iterator[Any]) -> Iterator[Any]:
        from miniplm_udf.ingestion.copies import pack_documents

        yield from pack_documents(batches, encode, spec)

    return pack


def config(
    root: str | Path, input_folder: Path, models: Sequence[str] = (), mode: Mode = "document"
) -> ExperimentConfig:
    """The experiment in a root: one file a micro-batch of ingest, and one of its commits a micro-batch of score.

    Args:
        models: aliases to score with; all of them by default.
        mode: of chunking.
    """
    best = CorpusConfig(where="teacher_n_tokens > 0", select=SelectConfig(ratio=RATIO))
    return ExperimentConfig(
        root=str(root),
        models={alias: ModelConfig(path="fake", document_separator="<s>") for alias in SCALES},
        ingest=IngestConfig(
            input=f"{input_folder}/*.jsonl*",
            chunking=ChunkingConfig(mode=mode, max_tokens=MAX_TOKENS),
            split=SplitConfig(reference=0.1, heldout=0.1),
            state_partitions=1,
            max_files_per_trigger=1,
            max_reject_share=1.0,
        ),
        # More than one file of `scores` has, less than one of `instances`: of these a micro-batch is one commit.
        score=ScoreConfig(
            models=list(models), workers=2, max_bytes_per_trigger="8k", max_reject_share=1.0, workers_per_gpu=1
        ),
        # With one model alone, no corpus can be refined.
        refine=RefineConfig(corpora={} if models else {CORPUS: best}),
    )


def document(number: int, file: int = 0) -> dict[str, str]:
    """A document of about two instances, the same for the same numbers."""
    words = random.Random(number * 1000 + file)
    text = " ".join(f"w{words.randrange(10_000)}" for _ in range(30 + number % 9))
    if number in (0, 4):
        text = f"{REFUSED} {text}"
    return {"id": f"d{file}.{number}", "text": text, "source": f"s{number % 2}"}


def write_input(folder: Path, documents_a_file: int = 9) -> None:
    """Two files. Each has a line that is no JSON and a document twice; the second has a document of the first."""
    folder.mkdir(parents=True)
    for file in range(N_FILES):
        rows = [document(number, file) for number in range(documents_a_file)]
        rows += [document(2, file)]
        rows += [document(1, file - 1)] if file else []
        lines = [json.dumps(row) for row in rows] + [f"no JSON in file {file}"]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
