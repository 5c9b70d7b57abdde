"""Reads one experiment, a YAML file, into an `ExperimentConfig` of sections (sections.py), and checks it.

Input: a YAML file and dotted overrides (`ingest.input=/texts/*.jsonl`). Output: an `ExperimentConfig`. jsonargparse
makes the dataclasses and checks types; this module checks the links between sections; keys.py refuses unknown keys, and
student_models.py fills in the keys that models inherit. Other functions take these dataclasses, never a dict. The
library reads four environment variables: MLFLOW_TRACKING_URI (`mlflow_uri`), MINIPLM_CACHE (storage.py),
MINIPLM_LOG_LEVEL (progress.py) and MINIPLM_SPARK_LOG_LEVEL (streams/spark_log.py). Imports nothing heavy at module
level, and jsonargparse only inside `load_config`.
"""

import dataclasses
import hashlib
import json
import os
import re
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.annotate import AnnotateConfig
from miniplm_udf.config.evaluate import EvaluateConfig
from miniplm_udf.config.generate import GENERATED, GenerateConfig
from miniplm_udf.config.keys import check_keys, nearest
from miniplm_udf.config.object_storage import StorageConfig
from miniplm_udf.config.overrides import apply_override
from miniplm_udf.config.refine import CorpusConfig, RefineConfig
from miniplm_udf.config.rules import DEFAULT, load_rules, resolve
from miniplm_udf.config.sections import (
    IngestConfig,
    ModelConfig,
    PackConfig,
    ProxyConfig,
    ReportConfig,
    ScoreConfig,
    SparkConfig,
    StreamConfig,
    TokenizerConfig,
    check,
    check_name,
)
from miniplm_udf.config.student_models import fill_in
from miniplm_udf.config.tracking import MlflowConfig, TensorboardConfig, WandbConfig
from miniplm_udf.config.training import ReferenceConfig, StudentConfig, TrainConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.layout import Root, is_tokenizer_folder
from miniplm_udf.storage import Json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
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
        check(bool(self.root), "root: where the tables go; set it in the file or as root=PATH")
        object.__setattr__(self, "root", storage.to_uri(self.root))
        storage.check_location("root", self.root)
        if self.report.folder is not None:
            storage.check_location("report.folder", storage.to_uri(self.report.folder))
        for kind, names in (("model", self.models), ("tokenizer", self.tokenizers), ("student", self.students)):
            for name in names:
                check_name(kind, name)
        for name in self.students:
            check(
                name not in self.models and not is_tokenizer_folder(name),
                f"student {name!r}: <root>/models has a folder of that name for another model; choose another name",
            )
        check(
            self.mlflow.parent_run not in {*self.students, *self.models, "comparison"},
            f"mlflow.parent_run: other runs are named {self.mlflow.parent_run!r}; choose another name",
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
            links += [(f"students.{name}.corpus", student.corpus, self.trainable_corpora)]
            links += [(f"students.{name}.tokenizer", student.tokenizer, self.tokenizers)]
            if student.train.kd_ratio:
                # The reference that this experiment trains is no teacher.
                links += [
                    (f"students.{name}.train.kd_teacher", student.train.kd_teacher, self.models.keys() - {trained})
                ]
        if self.generate:
            links += [("generate.model", self.generate.model, self.models)]
        for key, found, known in links:
            check(found in known, f"{key}: expected one of {sorted(known)}, found {found!r}{nearest(found, known)}")
        for name, student in self.students.items():
            check(
                student.train.kd_ratio == 0 or self.tokenizers[student.tokenizer].path is not None,
                f"students.{name}.tokenizer: expected the tokenizer of the teacher models.{student.train.kd_teacher}, "
                f"found {student.tokenizer!r}, which is trained on the corpus; set tokenizers.{student.tokenizer}.path "
                "to the teacher's path, or kd_ratio: 0 for this student",
            )
        if self.generate:
            self._check_generate(self.generate)
        self._check_placement()
        for alias, model in self.models.items():
            check(
                model.path is not None or alias == trained,
                f"models.{alias}.path: expected a folder, a hub name or a .gguf file, found nothing "
                "(only the model that the section reference trains needs none)",
            )

    def _check_placement(self) -> None:
        """Checks that models which do more than score can be loaded where that happens, and that servers differ."""
        servers = {alias: model.server for alias, model in self.models.items() if model.server is not None}
        distilled = {name: each.train for name, each in self.students.items() if each.train.kd_ratio}
        loaded = {f"students.{name}.train.kd_teacher": train.kd_teacher for name, train in distilled.items()}
        if self.generate:
            loaded["generate.model"] = self.generate.model
        if self.reference:
            loaded["reference.alias"] = self.reference.alias
        for key, alias in loaded.items():
            check(
                alias not in servers,
                f"{key}: expected a model with `backend: local`, since a server only scores, found models.{alias}",
            )
        for name, train in distilled.items():
            check(
                self.models[train.kd_teacher].device_map is None,
                f"students.{name}.train.kd_teacher: expected a model that fits on one GPU next to the student "
                f"(device_map: null), found models.{train.kd_teacher} with device_map: auto",
            )
        by_name: dict[tuple[str, str], str] = {}
        for alias, server in servers.items():
            if alias not in self.scored_aliases:
                continue
            first = by_name.setdefault((server.model, server.revision), alias)
            check(
                servers[first].url.rstrip("/") == server.url.rstrip("/"),
                f"models.{alias}.server.revision: expected another than models.{first}.server.revision, since scores "
                f"are kept by the server's model and revision and these are two servers, found {server.revision!r} in "
                "both",
            )

    def _check_generate(self, generate: GenerateConfig) -> None:
        """Checks the lengths of `generate` against the model's context and the instances."""
        check(
            self.models[generate.model].path is not None,
            f"generate.model: expected a model with a path, found {generate.model!r}, which this experiment trains",
        )
        context, n_tokens = self.models[generate.model].context_tokens, generate.prompt_tokens + generate.new_tokens
        check(
            n_tokens <= context,
            f"generate: expected prompt_tokens + new_tokens of at most models.{generate.model}.context_tokens "
            f"({context}), found {n_tokens}: lower generate.prompt_tokens or generate.new_tokens, or name a model with "
            "a longer context in generate.model",
        )
        chunking = self.ingest.chunking
        check(
            chunking.tokenizer != generate.model or generate.prompt_tokens < chunking.max_tokens,
            f"generate.prompt_tokens: expected less than ingest.chunking.max_tokens ({chunking.max_tokens}), found "
            f"{generate.prompt_tokens}: no instance would be longer than its prompt; lower generate.prompt_tokens",
        )
        check(
            GENERATED not in self.refine.corpora,
            f"refine.corpora.{GENERATED}: expected another name, because the section generate makes a corpus of this "
            "name; rename it",
        )

    def _rule_links(self, place: str, corpus: CorpusConfig) -> list[tuple[str, str, Collection[str]]]:
        """Checks that the rule of a corpus exists; returns the links of its models, which must be scored."""
        if corpus.rule is None:
            return []
        rules = load_rules()
        check(
            corpus.rule in rules,
            f"{place}.rule: expected one of {sorted(rules)}, found {corpus.rule!r}{nearest(corpus.rule, rules)}",
        )
        # A resolved corpus, read from a version's provenance, has both a rule and a score.
        without_score = dataclasses.replace(corpus, score=None)
        check(
            corpus.score is None or corpus.score == resolve(without_score).score,
            f"{place}: expected a rule or a score, found rule {corpus.rule!r} and score {corpus.score!r}",
        )
        roles = rules[corpus.rule].models
        links: list[tuple[str, str, Collection[str]]] = [(f"{place}.aliases", role, roles) for role in corpus.aliases]
        return links + [
            (f"{place}.rule: {corpus.rule}: {role}", corpus.aliases.get(role, role), self.scored_aliases)
            for role in roles
        ]

    @property
    def scored_aliases(self) -> list[str]:
        """Aliases of the models that score, in the order of `models`."""
        return [alias for alias in self.models if not self.score.models or alias in self.score.models]

    @property
    def trainable_corpora(self) -> list[str]:
        """Names of the corpora that a student may name: refined ones, and `generated` with the section `generate`."""
        return [*self.refine.corpora, *([GENERATED] if self.generate else [])]

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
        ConfigError: there is no such file, it is not YAML, a key is unknown (the message names the nearest key), or a
            value has the wrong type or range.
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
        apply_override(raw, override, ExperimentConfig)
    raw = {key: value for key, value in raw.items() if value is not None}
    check_keys(raw, ExperimentConfig)
    check(bool(raw.get("root")), "root: where the tables go; set it in the file or as root=PATH")
    fill_in(raw)
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
