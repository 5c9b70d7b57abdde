"""A small `root` as the pack stage leaves it, for the trainer's tests: tokenizers, packed tables, instances, a config.

Written with delta-rs alone, so no JVM is needed. The text is made from a few words: a model of some thousand weights
learns it in a few steps.
"""

import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.scoring.tokenizer import tokenizer_hash
from tests.support.packed_tables import packed_batch, write_rows
from tests.support.tracking_store import write_empty_store

# A fixture that makes the config of a copied root, with overrides.
MakeConfig = Callable[..., ExperimentConfig]

SEPARATOR = "<|endoftext|>"
LENGTH = 16
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TRAIN = {
    "steps": 6,
    "batch_sequences": 4,
    "micro_batch_sequences": 2,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "save_every_steps": 2,
    "log_every_steps": 1,
}


def some_texts(n: int, seed: int = 0) -> list[str]:
    """`n` texts of 5 to 40 words; some with characters of several bytes."""
    words = ["stone", "river", "walks", "häuser", "日本", "and", "the", "green", "\n", "tea."]
    draw = random.Random(seed)
    return [" ".join(draw.choice(words) for _ in range(draw.randint(5, 40))) for _ in range(n)]


def write_tokenizer(folder: Path, vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE in the folder, with `miniplm.json`, as the pack stage writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(some_texts(50), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SEPARATOR}))
    info = {
        "document_separator": SEPARATOR,
        "document_separator_id": tokenizer.token_to_id(SEPARATOR),
        "tokenizer_hash": tokenizer_hash(folder),
        "vocab_size": tokenizer.get_vocab_size(),
        "fingerprint": "f" * 32,
    }
    (folder / "miniplm.json").write_text(json.dumps(info))
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str], length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping sequences of `length` + 1 ids with their target masks; the last one padded."""
    separator = tokenizer.token_to_id(SEPARATOR)
    ids = [i for text in texts for i in [*tokenizer.encode(text).ids, separator]]
    n = max(1, -(-(len(ids) - 1) // length))
    padded = np.full(n * length + 1, separator, dtype="<i4")
    padded[: len(ids)] = ids
    tokens = np.stack([padded[i * length : i * length + length + 1] for i in range(n)])
    targets = np.arange(1, n * length + 1).reshape(n, length) < len(ids)
    return tokens, targets.astype("u1")


def write_packed(
    path: Path, tokens: np.ndarray, mask: np.ndarray, metadata: dict[str, Any] | None, mode: Any = "overwrite"
) -> None:
    """One commit to a packed table; `metadata` stands where Spark's `userMetadata` does."""
    write_rows(path, [packed_batch(0, tokens, mask)], metadata, mode)


def packed_metadata(folder: Path, **changes: Any) -> dict[str, Any]:
    info = json.loads((folder / "miniplm.json").read_text())
    found = {
        "corpus": "kept",
        "refined_version": 3,
        "refined_metadata": {"inputs": {"model_revisions": {"teacher": "a" * 32}}},
        "tokenizer": "bpe",
        "tokenizer_hash": info["tokenizer_hash"],
        "sequence_length": LENGTH,
        "document_separator_id": info["document_separator_id"],
    }
    return {**found, **changes}


def write_instances(path: Path, texts: list[str], sources: list[str], splits: list[str]) -> None:
    rows = []
    for number, (text, source, split) in enumerate(zip(texts, sources, splits, strict=True)):
        values: dict[str, Any] = {"instance_id": f"{number:032x}", "stream_id": "s", "ordinal": number}
        values |= {"document_ids": [str(number)], "start_byte": 0, "source": source, "text": text, "segment_ends": []}
        values |= {"starts_document": True, "ends_document": True, "n_bytes": len(text.encode())}
        values |= {"content_hash": "c", "split": split, "metadata": None, "query_id": "q", "batch_id": 0}
        values["ingested_at"] = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        rows.append(values)
    write_deltalake(str(path), pa.Table.from_pylist(rows, schema=schemas.INSTANCES.arrow_schema()), mode="append")


def write_config(folder: Path, root: Path, **train: Any) -> Path:
    """A config file with one student and a reference."""
    model = {"document_separator": SEPARATOR, "context_tokens": 32, "window_overlap_tokens": 8}
    raw = {
        "root": str(root),
        "models": {"teacher": {"path": "/nowhere", **model}, "reference": model},
        "reference": {"alias": "reference", "tokenizer": "teacher", "architecture": LLAMA},
        "refine": {"corpora": {"kept": {}}},
        "tokenizers": {"bpe": {}},
        "pack": {"sequence_length": LENGTH},
        "train": {**TRAIN, **train},
        "students": {"small": {"corpus": "kept", "tokenizer": "bpe", "architecture": LLAMA}},
        "mlflow": {"system_metrics": False},
    }
    path = folder / "experiment.yaml"
    # By a rename, because each rank of a test may write it while another reads it. JSON is YAML.
    storage.write_text(str(path), json.dumps(raw))
    return path


def make_root(folder: Path, **train: Any) -> ExperimentConfig:
    """Tokenizers, packed tables, instances, a config and an empty MLflow store, all under `folder`."""
    root = folder / "root"
    for name, corpus in (("bpe", "kept"), ("teacher", "reference")):
        tokenizer_folder = root / "models" / f"tokenizer_{name}"
        tokenizer = write_tokenizer(tokenizer_folder, vocab_size=300 if name == "bpe" else 320)
        tokens, mask = pack(tokenizer, some_texts(12))
        metadata = packed_metadata(tokenizer_folder, corpus=corpus, tokenizer=name)
        write_packed(root / "tables" / "packed" / corpus / name, tokens, mask, metadata)
    texts = some_texts(9, seed=1)
    splits = ["heldout", "heldout", "pool"] * 3
    write_instances(root / "tables" / "instances", texts, ["web", "books", "web"] * 3, splits)
    write_empty_store(root)
    return load_config(write_config(folder, root, **train))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    "mamba": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
}
