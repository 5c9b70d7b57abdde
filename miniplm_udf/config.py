"""One experiment = one YAML file. Frozen dataclasses, one per owner, validated where they are made.

Inputs: a YAML file and dotted overrides (`ingest.input=/texts/*.jsonl`). Output: an `ExperimentConfig`. Reading is
jsonargparse's; ours are the names, the defaults (the paper's recipe, arXiv 2410.17215) and the checks. Functions take
these dataclasses, never a dict and never an environment variable. Defaults stand here and nowhere else.
Imports nothing heavy at module level, and jsonargparse only inside `load_config`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError

_NAME_CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_name(kind: str, name: str) -> None:
    _check(
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
        _check(self.context_tokens >= 2, f"context_tokens: expected at least 2, found {self.context_tokens}")
        _check(
            0 <= self.window_overlap_tokens < self.context_tokens,
            f"window_overlap_tokens: expected 0 to context_tokens - 1 ({self.context_tokens - 1}), "
            f"found {self.window_overlap_tokens}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkConfig:
    """The session of a command; a file run by spark-submit takes master and conf from there."""

    master: str | None = None
    conf: dict[str, str] = dataclasses.field(default_factory=dict)


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
        _check(self.max_tokens >= 2, f"chunking.max_tokens: expected at least 2, found {self.max_tokens}")
        _check(self.split_bytes >= 1024, f"chunking.split_bytes: expected at least 1024, found {self.split_bytes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Shares of documents that are set aside, by a hash of their text; the rest is `pool`."""

    reference: float = 0.05
    heldout: float = 0.01

    def __post_init__(self) -> None:
        _check(
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
            _check(getattr(self, name) >= 1, f"ingest.{name}: expected at least 1, found {getattr(self, name)}")

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else list(self.input)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How instances are scored.

    Attributes:
        models: aliases to score with; empty means all of `models`.
        workers: concurrent scorers: one a GPU; 1 on a single machine without.
        tokens_per_batch: token budget of one forward pass.
        trigger: available_now, or processing_time with `interval_seconds`.
        max_bytes_per_trigger: size of a micro-batch, as bytes of the instances' files.
    """

    models: list[str] = dataclasses.field(default_factory=list)
    workers: int = 1
    tokens_per_batch: int = 4096
    trigger: Literal["available_now", "processing_time"] = "available_now"
    interval_seconds: float = 10.0
    max_bytes_per_trigger: str = "1g"
    max_reject_share: float = 0.01

    def __post_init__(self) -> None:
        _check(self.tokens_per_batch >= 1, f"tokens_per_batch: expected at least 1, found {self.tokens_per_batch}")
        _check(self.workers >= 1, f"workers: expected at least 1, found {self.workers}")
        _check(
            re.fullmatch(r"\d+[bkmgt]?b?", self.max_bytes_per_trigger.lower()) is not None,
            f"score.max_bytes_per_trigger: expected a size such as 512m or 1g, found {self.max_bytes_per_trigger!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which rows are kept.

    Attributes:
        rule: top_ratio keeps the highest floor(ratio * N); threshold keeps score >= threshold; random keeps a seeded
            random floor(ratio * N), whatever the score.
        by: count instances or tokens.
    """

    rule: Literal["top_ratio", "threshold", "random"] = "top_ratio"
    ratio: float | None = None
    by: Literal["instances", "tokens"] = "instances"
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule == "threshold":
            _check(self.threshold is not None, "select.threshold: the rule threshold needs it")
        else:
            _check(
                self.ratio is not None and 0 < self.ratio <= 1,
                f"select.ratio: the rule {self.rule} needs a ratio above 0 and at most 1, found {self.ratio}",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One refined corpus: SQL over `score_matrix`.

    Attributes:
        score: expression to rank by, higher is better; null is reference minus teacher mean NLL, the paper's.
        where: condition to be a candidate; null is at least 32 scored tokens of the first model.
    """

    score: str = "reference_nll_mean - teacher_nll_mean"
    where: str | None = None
    select: SelectConfig = dataclasses.field(default_factory=lambda: SelectConfig(ratio=0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """`tokens_of` is the model whose tokens a selection by tokens counts."""

    tokens_of: str = "teacher"
    corpora: dict[str, CorpusConfig] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.corpora:
            _check_name("corpus", name)
            _check(name != "reference", "corpus 'reference': that name is the reference split's; choose another")


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
        _check(self.vocab_size >= 257, f"tokenizer vocab_size: expected at least 257, found {self.vocab_size}")


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
        _check(self.sequence_length >= 2, f"sequence_length: expected at least 2, found {self.sequence_length}")
        _check(self.shards >= 1, f"pack.shards: expected at least 1, found {self.shards}")


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
            _check(getattr(self, name) >= 1, f"train.{name}: expected at least 1, found {getattr(self, name)}")
        _check(
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole experiment, a section per stage. See each section's class."""

    root: str
    models: dict[str, ModelConfig] = dataclasses.field(default_factory=dict)
    spark: SparkConfig = dataclasses.field(default_factory=SparkConfig)
    ingest: IngestConfig = dataclasses.field(default_factory=IngestConfig)
    reference: ReferenceConfig | None = None
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    tokenizers: dict[str, TokenizerConfig] = dataclasses.field(default_factory=dict)
    pack: PackConfig = dataclasses.field(default_factory=PackConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    students: dict[str, StudentConfig] = dataclasses.field(default_factory=dict)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    mlflow: MlflowConfig = dataclasses.field(default_factory=MlflowConfig)

    def __post_init__(self) -> None:
        _check(bool(self.root), "root: where the tables go; set it in the file or as root=PATH")
        object.__setattr__(self, "root", storage.to_uri(self.root))
        for kind, names in (("model", self.models), ("tokenizer", self.tokenizers), ("student", self.students)):
            for name in names:
                _check_name(kind, name)
        for name in self.students:
            _check(
                name not in self.models and not name.startswith("tokenizer_"),
                f"student {name!r}: a model's folder has that name under <root>/models; choose another",
            )
        self._check_links()

    def _check_links(self) -> None:
        trained = self.reference.alias if self.reference else None
        links: list[tuple[str, str, Collection[str]]] = []
        links += [("score.models", alias, self.models) for alias in self.score.models]
        if self.ingest.inputs:
            links += [("ingest.chunking.tokenizer", self.ingest.chunking.tokenizer, self.models)]
        if self.reference:
            links += [("reference.alias", self.reference.alias, self.models)]
            links += [("reference.tokenizer", self.reference.tokenizer, self.models)]
        if self.refine.corpora:
            links += [("refine.tokens_of", self.refine.tokens_of, self.scored_aliases)]
        for name, student in self.students.items():
            links += [(f"students.{name}.corpus", student.corpus, self.refine.corpora)]
            links += [(f"students.{name}.tokenizer", student.tokenizer, self.tokenizers)]
        for key, found, known in links:
            _check(found in known, f"{key}: expected one of {sorted(known)}, found {found!r}{_nearest(found, known)}")
        for alias, model in self.models.items():
            _check(
                model.path is not None or alias == trained,
                f"models.{alias}.path: expected a folder, a hub name or a .gguf file, found nothing "
                "(only the model that the reference section trains goes without)",
            )

    @property
    def scored_aliases(self) -> list[str]:
        """Aliases that are scored, in the order of `models`."""
        return [alias for alias in self.models if not self.score.models or alias in self.score.models]

    def table_uri(self, name: str) -> str:
        return storage.join(self.root, "tables", name)

    def checkpoint_uri(self, query: str) -> str:
        return storage.join(self.root, "_checkpoints", query)

    def model_uri(self, name: str) -> str:
        return storage.join(self.root, "models", name)

    def report_folder(self) -> Path:
        """Local folder of `summary.json`, `report.html` and, by default, `mlflow.db`."""
        if self.report.folder is not None:
            return Path(self.report.folder).expanduser().absolute()
        _check(
            storage.is_local(self.root),
            f"report.folder: root {storage.redact(self.root)} is not local, so a local folder for the report is needed",
        )
        return Path(storage.local_path(self.root))

    def mlflow_uri(self) -> str:
        """MLflow's store: `mlflow.tracking_uri`, else `MLFLOW_TRACKING_URI`, else SQLite in the report folder.

        Give it to `MlflowClient(tracking_uri=...)`: `mlflow.set_tracking_uri` also sets that environment variable,
        which would then hold for every later experiment of the process.
        """
        given = self.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return given or f"sqlite:///{self.report_folder()}/mlflow.db"

    def artifact_uri(self) -> str | None:
        """Where a new MLflow experiment keeps its artifacts: in the report folder, or (None) where a server says.

        SQLite has no place of its own for them: MLflow would take the current folder.
        """
        return (self.report_folder() / "mlartifacts").as_uri() if self.mlflow_uri().startswith("sqlite:") else None


def _nearest(found: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _dataclass_in(annotation: Any) -> tuple[type | None, bool]:
    """(the dataclass that an annotation holds or None, whether as values of a dict)."""
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation), False
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    in_dict = origin is dict
    candidates = arguments[1:] if in_dict else arguments if origin in (types.UnionType, typing.Union) else ()
    found = [argument for argument in candidates if dataclasses.is_dataclass(argument)]
    return (typing.cast(type, found[0]), in_dict) if found else (None, False)


def _check_keys(raw: Any, owner: type, prefix: str = "") -> None:
    """Refuses keys that no dataclass has, with the nearest that one has. Values are jsonargparse's to check."""
    if raw is None:
        return
    _check(isinstance(raw, dict), f"{prefix.rstrip('.') or 'config'}: expected a mapping, found {type(raw).__name__}")
    hints = typing.get_type_hints(owner)
    known = [field.name for field in dataclasses.fields(owner)]
    for key, value in raw.items():
        _check(
            key in known,
            f"unknown key {prefix}{key}{_nearest(str(key), known)} (known here: {', '.join(known)})",
        )
        inner, in_dict = _dataclass_in(hints[key])
        if inner and in_dict and isinstance(value, dict):
            for name, item in value.items():
                _check_keys(item, inner, f"{prefix}{key}.{name}.")
        elif inner:
            _check_keys(value, inner, f"{prefix}{key}.")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one `a.b.c=value`; the value is YAML, or, where it is none (a glob may look like an alias), plain text."""
    import yaml

    key, equals, text = override.partition("=")
    _check(bool(equals and key), f"override {override!r}: expected key=value, for example root=/data/run1")
    *parents, last = key.removeprefix("--").split(".")
    target = raw
    for name in parents:
        if not isinstance(target.get(name), dict):
            target[name] = {}
        target = target[name]
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        target[last] = text


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object: YAML anchors make such, and an override of one would be of all."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _inherit_train(raw: dict[str, Any]) -> None:
    """Lays each student's and the reference's `train` over the experiment's."""
    shared = raw.get("train") or {}
    owners = [raw["reference"]] if raw.get("reference") else []
    owners += [student for student in (raw.get("students") or {}).values() if isinstance(student, dict)]
    for owner in owners:
        owner["train"] = {**shared, **(owner.get("train") or {})}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads an experiment.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, applied in order; values are YAML.

    Raises:
        ConfigError: no such file, no YAML, an unknown key (named with the nearest), a value of the wrong kind.
    """
    import yaml
    from jsonargparse import ArgumentParser

    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config {path}: no such file; conf/demo.yaml is a complete example") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: cannot be read as YAML: {error}") from error
    _check(isinstance(raw, dict), f"config {path}: expected a mapping of sections, found {type(raw).__name__}")
    raw = _unshared(raw)
    for override in overrides:
        _apply_override(raw, override)
    raw = {key: value for key, value in raw.items() if value is not None}
    _check_keys(raw, ExperimentConfig)
    _check(bool(raw.get("root")), "root: where the tables go; set it in the file or as root=PATH")
    _inherit_train(raw)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--experiment", type=ExperimentConfig)
    try:
        return typing.cast(ExperimentConfig, parser.instantiate(parser.parse_object({"experiment": raw})).experiment)
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse's errors have no common base but Exception
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise ConfigError(f"config {path}: {cause or error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain data, as it goes into provenance."""
    return dataclasses.asdict(config)


def printable(value: Any) -> Any:
    """Plain data fit for a terminal: URIs without their keys, and no value of a key that names a secret."""
    if isinstance(value, dict):
        return {
            key: "(hidden)"
            if re.search(r"secret|password|access\.key|(^|\.)token$", str(key), re.I)
            else printable(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [printable(item) for item in value]
    return storage.redact(value) if isinstance(value, str) and "://" in value else value


def fingerprint(*parts: Any) -> str:
    """32 hexadecimal digits of a hash of plain data or dataclasses, stable across processes and key order."""
    plain = [to_dict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]
