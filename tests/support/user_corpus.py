"""A user's own files, and the command line that works on them: `miniplm` as a process, in a folder elsewhere."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "models.teacher.context_tokens=64",
    "models.teacher.window_overlap_tokens=16",
    "models.reference.context_tokens=64",
    "models.reference.window_overlap_tokens=16",
    "ingest.chunking.max_tokens=65",
    "reference.architecture={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2, tie_word_embeddings: true}",
    "reference.train={steps: 6, warmup_steps: 1}",
    "train={steps: 6, batch_sequences: 4, micro_batch_sequences: 4, learning_rate: 1.0e-3, warmup_steps: 1, "
    "save_every_steps: 3, log_every_steps: 1}",
    "refine.corpora.difference.where=teacher_n_tokens >= 8 and duplicate_of is null and n_words > 0",
    "refine.corpora.random.where=teacher_n_tokens >= 8",
    "tokenizers.bpe8k.vocab_size=400",
    "pack.sequence_length=64",
    "annotate={duplicates: true, near_duplicates: {}, language: true, quality: true}",
]


WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards quietly box with",
    "naïve 日本 judges and many more words",
)


def make_documents(n: int, seed: int) -> list[dict[str, Any]]:
    """Documents of 1 to 40 sentences, no two alike, from three sources."""
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(" ".join(WORDS).split(), k=rng.randint(3, 12))) + rng.choice(".!?;\n")

    return [
        {
            "id": f"{seed}-{i}",
            "text": " ".join(sentence() for _ in range(rng.randint(1, 40))),
            "source": ["web", "books", "code"][i % 3],
        }
        for i in range(n)
    ]


def write_jsonl(path: Path, documents: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")


@dataclasses.dataclass
class Experiment:
    """A root, its input folder, and the command line that works on them."""

    home: Path
    root: Path
    texts: Path
    teacher: Path

    @property
    def overrides(self) -> list[str]:
        return [
            f"root={self.root}",
            f"ingest.input={self.texts}/*.jsonl",
            f"models.teacher.path={self.teacher}",
            *SMALL,
        ]

    def command_line(self, command: str, *arguments: str) -> list[str]:
        """The words after `miniplm` on a command line; later arguments win."""
        return [command, "-c", str(REPOSITORY / "conf/demo.yaml"), *self.overrides, *arguments]

    def miniplm(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "jobs.cli", *self.command_line(command, *arguments))

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs Python in the home folder, with no MLflow server configured."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.home,
            env={**os.environ, "MLFLOW_TRACKING_URI": ""},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "summary.json").read_text())
        return found
