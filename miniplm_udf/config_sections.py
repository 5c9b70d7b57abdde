"""The sections of an experiment, one frozen dataclass each, validated where they are made.

Ours are the names, the defaults (the paper's recipe, arXiv 2410.17215) and the checks. Defaults stand here and nowhere
else. A section never looks at another: links between them are `config.ExperimentConfig`'s to check. Imports nothing
heavy.
"""

import dataclasses
import re
from typing import Any, Literal

from miniplm_udf.errors import ConfigError

_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_name(kind: str, name: str) -> None:
    check(
        bool(name) and set(name) <= _NAME_CHARACTERS and not name[0].isdigit(),
        f"{kind} {name!r}: names become column and table names, so use letters, digits and _ (no leading digit)",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal LM that scores.

    Attributes:
        path: a folder, a hub name, a `.gguf` file, or `package:NAME/FILE` for a file in an installed Python package;
            null for a model that this experiment trains (the reference): `<root>/models/<alias>`.
        revision: commit of a hub model; null takes the newest, and records which that was.
        dtype: of the forward pass; auto is bfloat16 on a GPU and float32 on a CPU, settled at the first scoring.
        document_separator: the model's pre-training end-of-document token, never a chat token; null takes the
            tokenizer's `eos_token` where that is no chat token.
        prefix_token: put in front with `context_prefix: token`; null takes `document_separator`.
        context_prefix: none is the official arithmetic; token scores every byte (DESIGN, "Scoring").
        context_tokens: longest input of one forward pass.
        window_overlap_tokens: context that consecutive windows of a longer text share.
    """

    path: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    document_separator: str | None = None
    prefix_token: str | None = None
    context_prefix: Literal["none", "token"] = "none"
    context_tokens: int = 1024
    window_overlap_tokens: int = 256
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check(self.context_tokens >= 2, f"context_tokens: expected at least 2, found {self.context_tokens}")
        check(
            0 <= self.window_overlap_tokens < self.context_tokens,
            f"window_overlap_tokens: expected 0 to context_tokens - 1 ({self.context_tokens - 1}), "
            f"found {self.window_overlap_tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkConfig:
    """The session of a command; a file run by spark-submit takes master and conf from there.

    `schema` (or catalog.schema): where each stage registers the root's tables, for sessions that share the catalog.
    """

    master: str | None = None
    conf: dict[str, str] = dataclasses.field(default_factory=dict)
    schema: str | None = None

    def __post_init__(self) -> None:
        check(
            self.schema is None or re.fullmatch(r"\w+(\.\w+)?", self.schema) is not None,
            f"spark.schema: expected schema or catalog.schema, found {self.schema!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldsConfig:
    """Names of the input's fields. `id` and `source` may be absent from the input; `metadata` are carried along."""

    id: str = "id"
    text: str = "text"
    source: str = "source"
    metadata: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkingConfig:
    """How documents become instances (DESIGN, "Chunking"). `tokenizer` is a model alias; sizes are in its tokens."""

    mode: Literal["document", "packed"] = "packed"
    tokenizer: str = "teacher"
    max_tokens: int = 1025
    split_bytes: int = 128 * 1024 * 1024

    def __post_init__(self) -> None:
        check(self.max_tokens >= 2, f"chunking.max_tokens: expected at least 2, found {self.max_tokens}")
        check(self.split_bytes >= 1024, f"chunking.split_bytes: expected at least 1024, found {self.split_bytes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of documents that are set aside, by a hash of their text; the rest is `pool`."""

    reference: float = 0.05
    heldout: float = 0.01

    def __post_init__(self) -> None:
        check(
            self.reference >= 0 and self.heldout >= 0 and self.reference + self.heldout < 1,
            f"split: expected shares of at least 0 that sum to less than 1, found {self.reference} + {self.heldout}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Where the corpus is and how it is cut.

    Attributes:
        input: paths, folders or globs of files (one format), or the location of one Delta table.
        format: auto goes by the file names (.jsonl[.gz|.zst], .parquet) and by a `_delta_log`.
        state_partitions: partitions of the deduplication state, fixed when the query first starts.
        max_files_per_trigger: files in one micro-batch.
        max_reject_share: above this share of rejected rows, the command ends with exit code 3.
    """

    input: list[str] | str = dataclasses.field(default_factory=list)
    format: Literal["auto", "jsonl", "parquet", "delta"] = "auto"
    fields: FieldsConfig = dataclasses.field(default_factory=FieldsConfig)
    default_source: str = "unknown"
    chunking: ChunkingConfig = dataclasses.field(default_factory=ChunkingConfig)
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    state_partitions: int = 8
    max_files_per_trigger: int = 1000
    max_reject_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("state_partitions", "max_files_per_trigger"):
            check(getattr(self, name) >= 1, f"ingest.{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How instances are scored.

    Attributes:
        models: aliases to score with; empty means all of `models`.
        sample: share of the pool that is scored, by a hash of the instance's id: a larger one holds a smaller one, so
            that raising it later scores only what is missing. The rest is for a proxy (section `proxy`).
        workers: concurrent scorers: one a GPU; 1 on a single machine without.
        workers_per_gpu: worker processes that may hold a model on one GPU at a time; others wait. Null: no bound.
        tokens_per_batch: token budget of one forward pass; null takes what is best on the device.
        compile: whether models run through torch.compile; null does on a GPU.
        attention: attention backend of transformers; auto leaves it to transformers.
        max_bytes_per_trigger: size of a micro-batch, as bytes of the instances' files.
    """

    models: list[str] = dataclasses.field(default_factory=list)
    sample: float = 1.0
    workers: int = 1
    workers_per_gpu: int | None = 1
    tokens_per_batch: int | None = None
    compile: bool | None = None
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    max_bytes_per_trigger: str = "1g"
    max_reject_share: float = 0.01

    def __post_init__(self) -> None:
        check(0 < self.sample <= 1, f"score.sample: expected a share above 0 and at most 1, found {self.sample}")
        check(
            self.tokens_per_batch is None or self.tokens_per_batch >= 1,
            f"score.tokens_per_batch: expected at least 1, found {self.tokens_per_batch}",
        )
        for name in ("workers", "workers_per_gpu"):
            found = getattr(self, name)
            check(found is None or found >= 1, f"score.{name}: expected at least 1, found {found}")
        check(
            re.fullmatch(r"\d+[bkmgt]?b?", self.max_bytes_per_trigger.lower()) is not None,
            f"score.max_bytes_per_trigger: expected a size such as 512m or 1g, found {self.max_bytes_per_trigger!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxyConfig:
    """A small regressor that predicts, from the text alone, the score of instances that no model has scored.

    Attributes:
        score: what it predicts, SQL over `score_matrix`; null is the rule miniplm.
        rows: about so many scored instances are drawn, by a hash of their ids, to fit it and to try it on. One task
            fits it, so that it comes out the same again; hence the bound.
        heldout: share of these that it is tried on, and never fitted on.
        features: n-grams of words are hashed to so many numbers.
    """

    score: str | None = None
    rows: int = 100_000
    heldout: float = 0.2
    features: int = 2**18

    def __post_init__(self) -> None:
        check(0 < self.heldout < 1, f"proxy.heldout: expected a share between 0 and 1, found {self.heldout}")
        check(1 <= self.rows <= 10**6, f"proxy.rows: expected 1 to 1000000, found {self.rows}")
        check(1 <= self.features <= 2**24, f"proxy.features: expected 1 to {2**24}, found {self.features}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How the streaming queries of ingest and score run.

    Attributes:
        trigger: available_now runs to the end of what is there; processing_time keeps running.
        interval_seconds: processing_time looks for new rows so often.
        stalled_seconds: a micro-batch in which nothing has moved for so long is reported.
        metrics_port: of the driver, for Prometheus; null serves nothing (`miniplm status --prometheus` prints it too).
    """

    trigger: Literal["available_now", "processing_time"] = "available_now"
    interval_seconds: float = 10.0
    stalled_seconds: float = 600.0
    metrics_port: int | None = None

    def __post_init__(self) -> None:
        found = self.interval_seconds
        check(found >= 0, f"stream.interval_seconds: expected at least 0, found {found}")
        check(self.stalled_seconds > 0, f"stream.stalled_seconds: expected more than 0, found {self.stalled_seconds}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A student's tokenizer: one from `path` (folder or hub name), or a byte-level BPE trained on `pool` text.

    Attributes:
        train_bytes: text that the BPE is trained on at most.
        document_separator: end-of-document token; a trained BPE gets it as its one special token.
    """

    path: str | None = None
    revision: str | None = None
    vocab_size: int = 8192
    train_bytes: int = 100_000_000
    document_separator: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        # 256 bytes and the separator.
        check(self.vocab_size >= 257, f"tokenizer vocab_size: expected at least 257, found {self.vocab_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Token sequences for training.

    Attributes:
        sequence_length: tokens a model sees at once.
        shards: streams that are packed independently; each ends in one padded sequence.
    """

    sequence_length: int = 1024
    shards: int = 1

    def __post_init__(self) -> None:
        check(self.sequence_length >= 2, f"sequence_length: expected at least 2, found {self.sequence_length}")
        check(self.shards >= 1, f"pack.shards: expected at least 1, found {self.shards}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser and schedule; the defaults are the paper's. `loss: official` is the mean per sequence of the mean over
    targets whose input is not the separator; token_mean is the mean over all targets."""

    steps: int = 100_000
    batch_sequences: int = 512
    micro_batch_sequences: int = 8
    learning_rate: float = 6e-4
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int = 2000
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-6
    weight_decay: float = 0.01
    gradient_clip_norm: float = 1.0
    loss: Literal["official", "token_mean"] = "official"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_every_steps: int = 1000
    keep_checkpoints: int = 2
    log_every_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_sequences", "micro_batch_sequences", "save_every_steps", "log_every_steps"):
            check(getattr(self, name) >= 1, f"train.{name}: expected at least 1, found {getattr(self, name)}")
        check(
            0 <= self.warmup_steps <= self.steps,
            f"train.warmup_steps: expected 0 to steps ({self.steps}), found {self.warmup_steps}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """A student: any `AutoConfig` keyword in `architecture` (with `model_type`), a refined corpus, a tokenizer.

    `train` inherits every key that it does not set from the experiment's `train` section.
    """

    architecture: dict[str, Any]
    corpus: str
    tokenizer: str
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The reference LM: trained once on the `reference` split with the tokenizer of the model `tokenizer`, then frozen.

    `train` inherits every key that it does not set from the experiment's `train` section.
    """

    alias: str = "reference"
    tokenizer: str = "teacher"
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Held-out loss. `max_instances_per_source` bounds the work (0: no bound)."""

    tokens_per_batch: int = 8192
    max_instances_per_source: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Where the summary and the report go (local paths), and how many texts are shown of each kind.

    `folder` null: under `root`, which must then be local.
    """

    folder: str | None = None
    examples: int = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """Null `tracking_uri`: `MLFLOW_TRACKING_URI` where that is set, else SQLite at `<root>/mlflow.db`."""

    tracking_uri: str | None = None
    experiment: str = "miniplm"
