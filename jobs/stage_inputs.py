"""Inputs and outputs of the stages: the data of their fingerprints, names of their tables and files. Driver only.

A fingerprint shows whether a stage must run again: it is made of the stage's own config and of the state of its inputs,
as plain data. Versions of tables are read from their logs and files are listed by fsspec, without Spark; only files of
the user are listed by Spark, which reads them. Owns no stage (`stages.py`). Writes nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, to_dict
from miniplm_udf.config.generate import GENERATED
from miniplm_udf.config.rules import resolve
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.ingestion import text_sets
from miniplm_udf.layout import EVALUATION_FILE, TRAINING_FILE
from miniplm_udf.schemas import table_names
from miniplm_udf.storage import Json
from miniplm_udf.store.delta_log import newest_version
from miniplm_udf.store.model_records import read_training

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def _versions(config: ExperimentConfig, names: Sequence[str]) -> list[int | None]:
    return [newest_version(config.layout.table(name)) for name in names]


def _tokenizer_facts(model: ModelConfig) -> Json:
    """The config of a model whose tokenizer is used: without where it runs."""
    return {key: value for key, value in to_dict(model).items() if key not in ("backend", "server", "device_map")}


def _model_facts(model: ModelConfig) -> Json:
    """The config of a model without what changes no score: where it runs, and how its server is asked."""
    served = {} if model.server is None else {"server": [model.server.model, model.server.revision]}
    return _tokenizer_facts(model) | served


def ingest_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `ingest`, and the model whose tokenizer cuts the text."""
    tokenizer_model = config.models.get(config.ingest.chunking.tokenizer)
    return [to_dict(config.ingest), _tokenizer_facts(tokenizer_model) if tokenizer_model else None]


def ingest_files(spark: "SparkSession | None", config: ExperimentConfig) -> list[Any] | None:
    """Lists the input files, so that a change of a file is noticed.

    Args:
        spark: the command's session; None if there is none yet.
        config: the experiment.

    Returns:
        Names, times and sizes of the files, or the version of the input table; None without a session.
    """
    from miniplm_udf.ingestion.inputs import input_state

    return None if spark is None else input_state(spark, config.ingest)


def annotate_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `annotate` and the version of `instances`."""
    return [to_dict(config.annotate), *_versions(config, ["instances"])]


def evaluation_files(spark: "SparkSession | None", config: ExperimentConfig) -> list[Any] | None:
    """Lists the evaluation files of `annotate.contamination`, so that a change of a file is noticed.

    Args:
        spark: the command's session; None if there is none yet.
        config: the experiment.

    Returns:
        The files; empty if the config names none; None if it names some and there is no session.
    """
    from miniplm_udf.annotations.contamination import files_of

    contamination = config.annotate.contamination if config.annotate else None
    if contamination is None:
        return []
    return None if spark is None else [to_dict(file) for file in files_of(spark, contamination)]


def reference_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `reference` and the length of a packed sequence."""
    return [to_dict(config.reference) if config.reference else None, config.pack.sequence_length]


def weights(config: ExperimentConfig) -> dict[str, str]:
    """Finds the scored models.

    Args:
        config: the experiment.

    Returns:
        Path, URI or hub name by alias; for a model that this experiment trains, the URI of its folder.
    """
    return {alias: config.models[alias].path or config.layout.model(alias) for alias in config.scored_aliases}


def score_inputs(config: ExperimentConfig) -> list[Any]:
    """Lists what the scores depend on, so that a change is noticed.

    Args:
        config: the experiment.

    Returns:
        Configs of the scored models, the version of `instances`, the states of the weights' files by alias, and the two
        settings of `score` that change the outcome.
    """
    # Weights may change under an old path. A hub name or a file of a package is not a path: its state is empty.
    states = {alias: storage.folder_state(place) for alias, place in weights(config).items()}
    # Settings of speed are left out: a score does not depend on the budget, the workers or the trigger.
    return [
        {alias: _model_facts(config.models[alias]) for alias in config.scored_aliases},
        *_versions(config, ["instances"]),
        {alias: [file for file in state if not file[0].endswith(EVALUATION_FILE)] for alias, state in states.items()},
        [config.score.max_reject_share, config.score.sample],
    ]


def proxy_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `proxy` and the versions of its tables."""
    versions = _versions(config, ["instances", "score_matrix"])
    return [to_dict(config.proxy) if config.proxy else None, config.refine.tokens_of, versions]


def refine_reads(config: ExperimentConfig) -> list[str]:
    """The tables that refinement reads."""
    return ["score_matrix", "annotations", *(["proxy_scores"] if config.proxy else [])]


def refine_inputs(config: ExperimentConfig) -> list[Any]:
    """The corpora, their resolved scores and the versions of their tables."""
    # The definition of a named rule is part of the corpus's config.
    scores = {name: resolve(corpus).score for name, corpus in config.refine.corpora.items()}
    return [to_dict(config.refine), scores, _versions(config, refine_reads(config))]


def generate_inputs(config: ExperimentConfig) -> list[Any]:
    """Lists what the generated texts depend on: settings, the model with the state of its files, and `instances`."""
    generate = config.generate
    if generate is None:
        return []
    model = config.models[generate.model]
    state = storage.folder_state(model.path or "")
    settings = [generate.settings, generate.sample, config.score.max_reject_share]
    return [settings, _model_facts(model), state, *_versions(config, ["instances"])]


def generate_reads(config: ExperimentConfig) -> list[str]:
    """The table of instances and the model that continues them."""
    model = config.models[config.generate.model].path if config.generate else None
    return ["instances", *([model] if model else [])]


def _pairs(config: ExperimentConfig) -> list[tuple[str, str]]:
    """Each (corpus, tokenizer) that a student trains on."""
    return sorted({(student.corpus, student.tokenizer) for student in config.students.values()})


def student_corpora(config: ExperimentConfig) -> list[str]:
    """Names of the tables of the corpora that students train on."""
    return sorted({_table_of(config, corpus) for corpus, _ in _pairs(config)})


def _table_of(config: ExperimentConfig, corpus: str) -> str:
    """Name of the table that a corpus is packed from."""
    return "generations" if config.generate and corpus == GENERATED else table_names.refined(corpus)


def packed(config: ExperimentConfig) -> list[str]:
    """Names of the packed tables."""
    return [table_names.packed(corpus, tokenizer) for corpus, tokenizer in _pairs(config)]


def pack_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `pack`, the students' tokenizers and the versions of their corpora."""
    corpora = sorted({corpus for corpus, _ in _pairs(config)})
    tables = [_table_of(config, corpus) for corpus in corpora]
    versions: Json = dict(zip(corpora, _versions(config, tables), strict=True))
    if "generations" in tables:
        versions["generation"] = generate_inputs(config)
    tokenizers = {name: to_dict(config.tokenizers[name]) for _, name in _pairs(config)}
    return [to_dict(config.pack), _pairs(config), versions, tokenizers]


def train_inputs(config: ExperimentConfig) -> list[Any]:
    """The students, their teachers, the section `mlflow` and the versions of the packed tables.

    How long a training waits for MLflow changes nothing that it writes.
    """
    names = packed(config)
    students = {name: to_dict(student) for name, student in config.students.items()}
    return [
        students,
        dict(zip(names, _versions(config, names), strict=True)),
        {key: value for key, value in to_dict(config.mlflow).items() if key != "wait_seconds"},
        *_teachers(config),
    ]


def _teachers(config: ExperimentConfig) -> list[Any]:
    """The configs of the models that students are distilled from, and the states of their files; empty without any."""
    aliases = sorted({student.train.kd_teacher for student in config.students.values() if student.train.kd_ratio})
    models = [config.models[alias] for alias in aliases]
    return [[_model_facts(model), storage.folder_state(model.path)] for model in models if model.path is not None]


def has_evaluation(config: ExperimentConfig) -> bool:
    """Whether there are students, and something to evaluate them on."""
    has_texts = config.ingest.split.heldout > 0 or bool(config.evaluate.inputs)
    return bool(config.students) and (has_texts or bool(config.evaluate.tasks))


def evaluate_reads(config: ExperimentConfig) -> list[str]:
    """The held-out text, the external sets, the folder of tasks, and the students."""
    heldout = ["instances"] if config.ingest.split.heldout > 0 else []
    external = [section.path for section in config.evaluate.inputs.values()]
    tasks = [config.evaluate.tasks_folder] if config.evaluate.tasks_folder else []
    return [*heldout, *external, *tasks, *(config.layout.model(name) for name in config.students)]


def evaluate_inputs(config: ExperimentConfig) -> list[Any]:
    """The section `evaluate`, the files that it names, the trainings and the version of `instances`."""
    names = [*config.students, *([config.reference.alias] if config.reference else [])]
    trainings = {name: read_training(config, name) for name in names}
    # A training without a run id of MLflow is identified by its fingerprint.
    runs = {name: each and (each.run_id or each.fingerprint) for name, each in trainings.items()}
    sets = {name: text_sets.state_of(section) for name, section in config.evaluate.inputs.items()}
    tasks = storage.folder_state(config.evaluate.tasks_folder) if config.evaluate.tasks_folder else []
    return [to_dict(config.evaluate), runs, sets, tasks, *_versions(config, ["instances"])]


def model_files(config: ExperimentConfig, file: str) -> list[str]:
    """Returns the URIs of a file of every student.

    Args:
        config: the experiment.
        file: name of the file in the model's folder.
    """
    return [config.layout.model(name, file) for name in config.students]


def trained_files(config: ExperimentConfig) -> list[str]:
    """URIs of the records of the trained students, and of their registrations if they are registered."""
    registered = model_files(config, "registration.json") if config.mlflow.registered_model else []
    return [*model_files(config, TRAINING_FILE), *registered]


def reference_files(config: ExperimentConfig) -> list[str]:
    """URI of the file that a trained reference has."""
    return [config.layout.model(config.reference.alias, "config.json")] if config.reference else []
