"""Reads one experiment, a YAML file, into an `ExperimentConfig` of sections (sections.py), and checks it.

Input: a YAML file and dotted overrides (`ingest.input=/texts/*.jsonl`). Output: an `ExperimentConfig`. collecting.py
makes the sections; it refuses unknown keys (keys.py) and wrong values, and fills in the keys that models inherit
(student_models.py). links.py checks the links between sections. Everything that is wrong in a file is reported at once.
Other functions take these dataclasses, never a dict. The library reads four environment variables: MLFLOW_TRACKING_URI
(`mlflow_uri`), MINIPLM_CACHE (storage.py), MINIPLM_LOG_LEVEL (progress.py) and MINIPLM_SPARK_LOG_LEVEL
(streams/spark_log.py). Imports nothing heavy at module level.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config import strict_yaml
from miniplm_udf.config.annotate import AnnotateConfig
from miniplm_udf.config.collecting import check_sections
from miniplm_udf.config.evaluate import EvaluateConfig
from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.links import LinkedSections
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.config.overrides import apply_override
from miniplm_udf.config.refine import RefineConfig
from miniplm_udf.config.report import ReportConfig
from miniplm_udf.config.sections import (
    IngestConfig,
    ModelConfig,
    PackConfig,
    ProxyConfig,
    ScoreConfig,
    StreamConfig,
    TokenizerConfig,
    check,
)
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.config.tracking import MlflowConfig, TensorboardConfig, WandbConfig
from miniplm_udf.config.training import ReferenceConfig, StudentConfig, TrainConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.layout import Root
from miniplm_udf.storage import Json

_NO_ROOT = "root: where the tables go; set it in the file or as root=PATH"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(LinkedSections):
    """A whole experiment, with a section for each stage; each section's class describes its keys.

    Attributes:
        root: path or URI under which everything is kept; a bare path becomes an absolute `file:` URI.
        models: the models that score, by alias.
        tokenizers: the students' tokenizers, by name.
        students: the models to train, by name.
    """

    root: str
    models: dict[str, ModelConfig] = dataclasses.field(default_factory=dict)
    storage: StorageConfig = dataclasses.field(default_factory=StorageConfig)
    spark: SparkConfig = dataclasses.field(default_factory=SparkConfig)
    ingest: IngestConfig = dataclasses.field(default_factory=IngestConfig)
    annotate: AnnotateConfig | None = None
    reference: ReferenceConfig | None = None
    score: ScoreConfig = dataclasses.field(default_factory=ScoreConfig)
    proxy: ProxyConfig | None = None
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    refine: RefineConfig = dataclasses.field(default_factory=RefineConfig)
    generate: GenerateConfig | None = None
    tokenizers: dict[str, TokenizerConfig] = dataclasses.field(default_factory=dict)
    pack: PackConfig = dataclasses.field(default_factory=PackConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    students: dict[str, StudentConfig] = dataclasses.field(default_factory=dict)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    report: ReportConfig = dataclasses.field(default_factory=ReportConfig)
    mlflow: MlflowConfig = dataclasses.field(default_factory=MlflowConfig)
    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        self._settle_root()
        self._check_report_folder()
        self._pass_on_separator()
        problems = list(self.link_problems())
        if problems:
            raise ConfigError.of_all(problems)

    def _settle_root(self) -> None:
        """Makes `root` a URI, and refuses characters that cannot stand in it."""
        check(bool(self.root), _NO_ROOT)
        object.__setattr__(self, "root", storage.to_uri(self.root))
        storage.check_location("root", self.root)

    def _check_report_folder(self) -> None:
        if self.report.folder is not None:
            storage.check_location("report.folder", storage.to_uri(self.report.folder))

    def _pass_on_separator(self) -> None:
        """Gives the model that this experiment trains the separator of the model whose tokenizer it is trained with."""
        if self.reference is None or not {self.reference.alias, self.reference.tokenizer} <= self.models.keys():
            return
        model, origin = self.models[self.reference.alias], self.models[self.reference.tokenizer]
        if model.document_separator is None and model.path is None:
            same = dataclasses.replace(model, document_separator=origin.document_separator)
            vars(self)["models"] = {**self.models, self.reference.alias: same}

    @property
    def layout(self) -> Root:
        """The places of everything under `root`."""
        return Root(self.root)

    def report_file(self, name: str) -> str:
        """Returns the place of a file of the report: a plain path, or a URI if `report.folder` or `root` is not local.

        Args:
            name: `summary.json` or `report.html`.
        """
        return storage.join(self._report_folder(), name)

    def _report_folder(self) -> str:
        uri = storage.to_uri(self.report.folder or self.root)
        return storage.local_path(uri) if storage.is_local(uri) else uri

    def local_folder(self) -> Path:
        """The folder on this machine for what cannot be elsewhere: MLflow's default store, TensorBoard, W&B.

        It is the report's folder; if that is not local, `root`; and if `root` is not local either, a folder in this
        node's cache, with a name made from `root`.
        """
        for place in (self._report_folder(), self.root):
            if storage.is_local(place):
                return Path(storage.local_path(place))
        root = storage.redact(self.root)
        readable = re.sub(r"[^A-Za-z0-9]+", "-", root.partition("://")[2]).strip("-")[-60:]
        return storage.cache_folder().absolute() / "runs" / f"{readable}-{fingerprint(root)[:12]}"

    def mlflow_uri(self) -> str:
        """URI of MLflow's store: `mlflow.tracking_uri`, else `MLFLOW_TRACKING_URI`, else SQLite in the local folder.

        Pass it to `MlflowClient(tracking_uri=...)`: `mlflow.set_tracking_uri` would also set that environment variable,
        for every later experiment of the process.
        """
        uri = self.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return uri or f"sqlite:///{self.local_folder()}/mlflow.db"

    def artifact_uri(self) -> str | None:
        """Where a new MLflow experiment keeps its artifacts: in the local folder; None lets an MLflow server decide.

        With SQLite, MLflow would otherwise keep them in the current folder.
        """
        return (self.local_folder() / "mlartifacts").as_uri() if self.mlflow_uri().startswith("sqlite:") else None


def _unshared(value: Any) -> Any:
    """A copy without shared objects: YAML anchors share them, and an override of one place would change all."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Returns the experiment in a YAML file, with overrides.

    Args:
        path: the YAML file.
        overrides: `dotted.key=value`, applied in order (overrides.py).

    Raises:
        ConfigError: there is no such file, it is not YAML, or an override is not `key=value`; or keys are unknown (the
            message names the nearest key), values have the wrong type or range, or do not fit together: all of them.
    """
    import yaml

    try:
        raw = strict_yaml.read(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config {path}: no such file; conf/demo.yaml is a complete example") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: cannot be read as YAML: {error}") from error
    check(isinstance(raw, dict), f"config {path}: expected a mapping of sections, found {type(raw).__name__}")
    raw = _unshared(raw)
    for override in overrides:
        apply_override(raw, override, ExperimentConfig)
    raw = {key: value for key, value in raw.items() if value is not None}
    checked = check_sections(raw, ExperimentConfig)
    config, problems = _linked(checked.values, is_root_wrong="root" in raw and "root" not in checked.values)
    problems = [*checked.problems, *problems]
    if problems:
        raise ConfigError.of_all(problems, config)
    return config


def _linked(sections: Json, is_root_wrong: bool) -> tuple[ExperimentConfig, list[str]]:
    """An experiment of sections that are right by themselves, and what does not fit between them.

    Its root is empty if there is none that can be used.
    """
    # The experiment's own check would raise, and leave nothing for further checks.
    config = object.__new__(ExperimentConfig)
    for field in dataclasses.fields(ExperimentConfig):
        default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        object.__setattr__(config, field.name, sections.get(field.name, default))
    problems = []
    try:
        config._settle_root()
    except ConfigError as error:
        # A root of the wrong type has been reported as that.
        problems += [] if is_root_wrong else [f"root: {str(error).removeprefix('root: ')}"]
        object.__setattr__(config, "root", "")
    try:
        config._check_report_folder()
    except ConfigError as error:
        problems.append(str(error))
    config._pass_on_separator()
    return config, [*problems, *config.link_problems()]


def to_dict(config: Any) -> Json:
    """Returns a config as plain data, as provenance records it.

    Args:
        config: an experiment, or a section.
    """
    return dataclasses.asdict(config)


# A setting of Spark may end in a token, as `spark.executorEnv.HF_TOKEN` does. The `bos_token` of a model is no secret.
_SECRET_KEY = re.compile(
    r"secret|password|credential|(access|account|private|api|encryption)[._]?key|(^|\.)token$|\..*token$", re.IGNORECASE
)


def printable(value: Any) -> Any:
    """Returns plain data without secrets, for a terminal: URIs without user and query, values of secret keys hidden.

    Args:
        value: a dictionary, a list or a single value.
    """
    if isinstance(value, dict):
        return {key: "(hidden)" if _SECRET_KEY.search(str(key)) else printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return storage.redact(value) if isinstance(value, str) and "://" in value else value


def to_yaml(config: ExperimentConfig) -> str:
    """Returns a config as a YAML file that `load_config` reads, with every key, and without secrets (`printable`)."""
    import yaml

    return str(yaml.safe_dump(printable(to_dict(config)), sort_keys=False, allow_unicode=True, width=120))


def fingerprint(*parts: Any) -> str:
    """A hash of plain data or dataclasses, as 32 hexadecimal digits, the same in every process and key order."""
    plain = [to_dict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]
