"""One experiment = one YAML file: an `ExperimentConfig` of sections (config_sections.py), and reading it.

Inputs: a YAML file and dotted overrides (`ingest.input=/texts/*.jsonl`). Output: an `ExperimentConfig`. Reading is
jsonargparse's; ours are the unknown keys, the inheritance of `train` and the links between sections. Functions take
these dataclasses, never a dict and never an environment variable.
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
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config_annotate import AnnotateConfig, ContaminationConfig, NearDuplicatesConfig
from miniplm_udf.config_refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config_sections import (
    ChunkingConfig,
    EvaluateConfig,
    FieldsConfig,
    IngestConfig,
    MlflowConfig,
    ModelConfig,
    PackConfig,
    ProxyConfig,
    ReferenceConfig,
    ReportConfig,
    ScoreConfig,
    SparkConfig,
    SplitConfig,
    StreamConfig,
    StudentConfig,
    TokenizerConfig,
    TrainConfig,
    check,
    check_name,
)
from miniplm_udf.errors import ConfigError
from miniplm_udf.rules import DEFAULT, load_rules, resolve

__all__ = [
    "AnnotateConfig",
    "ChunkingConfig",
    "ContaminationConfig",
    "CorpusConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "FieldsConfig",
    "IngestConfig",
    "MlflowConfig",
    "ModelConfig",
    "NearDuplicatesConfig",
    "PackConfig",
    "ProxyConfig",
    "ReferenceConfig",
    "RefineConfig",
    "ReportConfig",
    "ScoreConfig",
    "SelectConfig",
    "SparkConfig",
    "SplitConfig",
    "StreamConfig",
    "StudentConfig",
    "TokenizerConfig",
    "TrainConfig",
    "fingerprint",
    "load_config",
    "printable",
    "to_dict",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """A whole experiment, a section per stage. See each section's class."""

    root: str
    models: dict[str, ModelConfig] = dataclasses.field(default_factory=dict)
    spark: SparkConfig = dataclasses.field(default_factory=SparkConfig)
    ingest: IngestConfig = dataclasses.field(default_factory=IngestConfig)
    annotate: AnnotateConfig | None = None
    reference: ReferenceConfig | None = None
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    proxy: ProxyConfig | None = None
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    tokenizers: dict[str, TokenizerConfig] = dataclasses.field(default_factory=dict)
    pack: PackConfig = dataclasses.field(default_factory=PackConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    students: dict[str, StudentConfig] = dataclasses.field(default_factory=dict)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    mlflow: MlflowConfig = dataclasses.field(default_factory=MlflowConfig)

    def __post_init__(self) -> None:
        check(bool(self.root), "root: where the tables go; set it in the file or as root=PATH")
        object.__setattr__(self, "root", storage.to_uri(self.root))
        for kind, names in (("model", self.models), ("tokenizer", self.tokenizers), ("student", self.students)):
            for name in names:
                check_name(kind, name)
        for name in self.students:
            check(
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
        if self.refine.corpora or self.proxy:
            links += [("refine.tokens_of", self.refine.tokens_of, self.scored_aliases)]
        if self.proxy and self.proxy.score is None:
            links += [("proxy.score: miniplm", role, self.scored_aliases) for role in load_rules()[DEFAULT].models]
        for name, corpus in self.refine.corpora.items():
            links += self._rule_links(f"refine.corpora.{name}", corpus)
            check(
                self.proxy is not None or not corpus.is_of_proxy,
                f"refine.corpora.{name}.candidates: expected the section proxy, which makes proxy_scores, found none "
                "(`proxy: {}` takes the defaults)",
            )
        for name, student in self.students.items():
            links += [(f"students.{name}.corpus", student.corpus, self.refine.corpora)]
            links += [(f"students.{name}.tokenizer", student.tokenizer, self.tokenizers)]
        for key, found, known in links:
            check(found in known, f"{key}: expected one of {sorted(known)}, found {found!r}{_nearest(found, known)}")
        for alias, model in self.models.items():
            check(
                model.path is not None or alias == trained,
                f"models.{alias}.path: expected a folder, a hub name or a .gguf file, found nothing "
                "(only the model that the reference section trains goes without)",
            )

    def _rule_links(self, place: str, corpus: CorpusConfig) -> list[tuple[str, str, Collection[str]]]:
        """What a rule that the config names is asked for: that it exists, and that its models are scored."""
        if corpus.rule is None:
            return []
        known = load_rules()
        check(
            corpus.rule in known,
            f"{place}.rule: expected one of {sorted(known)}, found {corpus.rule!r}{_nearest(corpus.rule, known)}",
        )
        # A resolved corpus, out of a version's provenance, has both.
        given = dataclasses.replace(corpus, score=None)
        check(
            corpus.score is None or corpus.score == resolve(given).score,
            f"{place}: expected a rule or a score, found rule {corpus.rule!r} and score {corpus.score!r}",
        )
        roles = known[corpus.rule].models
        links: list[tuple[str, str, Collection[str]]] = [(f"{place}.aliases", role, roles) for role in corpus.aliases]
        return links + [
            (f"{place}.rule: {corpus.rule}: {role}", corpus.aliases.get(role, role), self.scored_aliases)
            for role in roles
        ]

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

    @property
    def exports_uri(self) -> str:
        """Where exports go that are given no other place."""
        return storage.join(self.root, "exports")

    def report_folder(self) -> Path:
        """Local folder of `summary.json`, `report.html` and, by default, `mlflow.db`."""
        if self.report.folder is not None:
            return Path(self.report.folder).expanduser().absolute()
        check(
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
    check(isinstance(raw, dict), f"{prefix.rstrip('.') or 'config'}: expected a mapping, found {type(raw).__name__}")
    hints = typing.get_type_hints(owner)
    known = [field.name for field in dataclasses.fields(owner)]
    for key, value in raw.items():
        check(
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
    check(bool(equals and key), f"override {override!r}: expected key=value, for example root=/data/run1")
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
    check(isinstance(raw, dict), f"config {path}: expected a mapping of sections, found {type(raw).__name__}")
    raw = _unshared(raw)
    for override in overrides:
        _apply_override(raw, override)
    raw = {key: value for key, value in raw.items() if value is not None}
    _check_keys(raw, ExperimentConfig)
    check(bool(raw.get("root")), "root: where the tables go; set it in the file or as root=PATH")
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
