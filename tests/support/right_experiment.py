"""An experiment that every check before a command takes, with a teacher that is written by hand: no torch, no JVM."""

import json
import struct
from pathlib import Path
from typing import Any

import yaml

from miniplm_udf.packing.tokenizers import train_bpe
from miniplm_udf.storage import Json

SEPARATOR = "<|endoftext|>"
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
         "num_hidden_layers": 2, "intermediate_size": 64}  # fmt: skip
CONTEXT, N_IDS = 128, 320


class Place:
    """A folder with a right experiment: texts, a teacher, and a config that a case may change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self.texts, self.teacher = folder / "texts", folder / "teacher"
        self.texts.mkdir()
        rows = [{"text": f"text {n} about something else", "meta": {"set": "web"}} for n in range(200)]
        (self.texts / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.write_model(self.teacher)
        model = {"context_tokens": 64}
        self.config: Json = {
            "root": str(self.root),
            "models": {"teacher": {**model, "path": str(self.teacher)}, "reference": dict(model)},
            "ingest": {
                "input": str(self.texts / "*.jsonl"),
                "chunking": {"max_tokens": 65},
                "split": {"reference": 0.3},
            },
            "reference": {"architecture": dict(LLAMA)},
            "refine": {"corpora": {"best": {"where": "teacher_n_tokens >= 8", "select": {"ratio": 0.5}}}},
            "tokenizers": {"bpe": {"vocab_size": 300}},
            "pack": {"sequence_length": 64},
            "train": {"steps": 4, "batch_sequences": 2},
            "students": {"small": {"corpus": "best", "tokenizer": "bpe", "architecture": dict(LLAMA)}},
        }

    def write_model(self, folder: Path, eos: str = SEPARATOR, **changes: Any) -> None:
        """A model folder without weights: the checks read headers only."""
        folder.mkdir(exist_ok=True)
        facts = {
            **LLAMA,
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": CONTEXT,
            "vocab_size": N_IDS,
        }
        (folder / "config.json").write_text(json.dumps(facts | changes))
        self.write_weights(folder, {})
        (folder / "tokenizer.json").write_bytes(train_bpe(iter(["some text " * 9]), 300, SEPARATOR))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))

    @staticmethod
    def write_weights(folder: Path, header: Json) -> None:
        """A safetensors file that ends after its header."""
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)

    def set(self, key: str, value: Any) -> None:
        """Sets a dotted key of the config."""
        *sections, last = key.split(".")
        section = self.config
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value

    def file(self) -> Path:
        """The config as a file."""
        file = self.folder / "experiment.yaml"
        file.write_text(yaml.safe_dump(self.config))
        return file
