"""Input rows, configs and a tiny byte-level tokenizer for the tests of ingestion, and what they read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ChunkingConfig, IngestConfig, ModelConfig, SplitConfig
from miniplm_udf.store import tables

Make = Callable[..., ExperimentConfig]


ROWS = [
    {
        "id": f"d{i}",
        "text": f"Document {i} says: héllo, wörld. It goes on; and on!\nUntil 终 {i * i}.",
        "source": f"s{i % 2}",
    }
    for i in range(40)
]


SENTENCE = "This is one of very many sentences in a line without end, 终. "


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that passes for a model as far as tokenizers go: a byte-level BPE of 400 entries."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*(row["text"] for row in ROWS), SENTENCE * 40], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: Path) -> Make:
    """Makes configs that share a root in a temporary folder; keywords are `IngestConfig`'s, or `mode` and the like."""

    def made(
        input: str, mode: str = "packed", root: str = "root", max_tokens: int = 33, **ingest: Any
    ) -> ExperimentConfig:
        chunking = ChunkingConfig(mode=mode, max_tokens=max_tokens, split_bytes=ingest.pop("split_bytes", 128 * 1024))
        split = ingest.pop("split", SplitConfig(reference=0.3, heldout=0.2))
        return ExperimentConfig(
            root=str(tmp_path / root),
            models={"teacher": ModelConfig(path=str(tokenizer_folder), document_separator="<|endoftext|>")},
            ingest=IngestConfig(input=input, chunking=chunking, split=split, state_partitions=1, **ingest),
        )

    return made


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def instances(spark: Any, config: ExperimentConfig) -> list[Any]:
    return tables.read(spark, config.layout.table("instances")).orderBy("stream_id", "ordinal", "instance_id").collect()


def rejects(spark: Any, config: ExperimentConfig) -> list[Any]:
    return tables.read(spark, config.layout.table("rejects")).orderBy("reason", "source_file").collect()


def documents(rows: list[Any]) -> dict[str, str]:
    """Document texts, put together again from the slices of instances by id and byte offset."""
    parts: dict[str, list[tuple[int, bytes]]] = {}
    for row in rows:
        raw, bounds = row.text.encode(), [0, *row.segment_ends, row.n_bytes]
        for i, document in enumerate(row.document_ids):
            start = row.start_byte if i == 0 else 0
            parts.setdefault(document, []).append((start, raw[bounds[i] : bounds[i + 1]]))
    joined = {}
    for document, slices in parts.items():
        text = b""
        for start, part in sorted(slices):
            assert start == len(text), f"{document}: a gap or an overlap at byte {start}"
            text += part
        joined[document] = text.decode()
    return joined
