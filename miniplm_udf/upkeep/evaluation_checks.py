"""Checks of evaluation data before a command starts: external sets, contamination files, names of tasks. No Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy. Opens the first file of each external
set (`evaluate.inputs`), as the evaluation does; lists the files of `annotate.contamination.files`. Sets below the root
are left out, because the command may make them. The names of lm-eval's tasks are searched in the text of its files,
since it takes ten seconds to parse all of them. Reports only what is certain; a damaged file is reported by its stage.
Driver only; writes nothing.
"""

import functools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from miniplm_udf import object_storage, storage
from miniplm_udf.annotations.contamination import KEY as CONTAMINATION
from miniplm_udf.annotations.contamination import is_evaluation_file, no_evaluation_file
from miniplm_udf.config.evaluate import LM_EVAL_MISSING, EvaluateConfig, TextInputConfig
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.keys import nearest
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.text_sets import open_text_set
from miniplm_udf.storage_errors import explain
from miniplm_udf.upkeep.input_checks import is_object_store, is_seen_alike, seen_files, within_seconds
from miniplm_udf.upkeep.storage_probe import connect

_CONNECT_SECONDS = 2.0
_TASK = re.compile(rb"""^[ \t]*(?:-[ \t]+)?["']?task["']?:[ \t]*["']?([^"'#\s]+)""", re.MULTILINE)


def evaluation_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the external sets and with the tasks.

    Args:
        config: the experiment.
    """
    yield from _task_problems(config.evaluate)
    for name, section in config.evaluate.inputs.items():
        uri = storage.to_uri(section.path)
        if config.root and f"{uri}/".startswith(f"{config.root}/"):
            continue

        def problems(name: str = name, section: TextInputConfig = section) -> list[str]:
            return list(_set_problems(name, section))

        if storage.is_local(section.path):
            yield from problems()
        elif is_object_store(section.path):
            yield from within_seconds(problems)


def _task_problems(section: EvaluateConfig) -> Iterator[str]:
    """Names that no task has; a folder of tasks, or the package that runs them, that is missing."""
    folder = None if section.tasks_folder is None else Path(section.tasks_folder).expanduser()
    if not section.tasks:
        return
    if folder is not None and not folder.is_dir():
        yield (
            "evaluate.tasks_folder: expected a local folder with YAML files of tasks, found no "
            f"{section.tasks_folder}; correct the path, or remove the key"
        )
        return
    library = find_spec("lm_eval")
    if library is None:
        if find_spec("torch") is not None:  # else nothing is trained or evaluated on this machine
            yield LM_EVAL_MISSING
        return
    own = [Path(place) / "tasks" for place in library.submodule_search_locations or ()]
    known: set[str] = set()
    for each in ([folder] if folder else []) + own:
        known |= _task_names(each)
        if known >= set(section.task_names):
            return
    for name in section.task_names:
        if name not in known:
            yield f"evaluate.tasks: expected names of lm-eval tasks or paper, found {name!r}{nearest(name, known)}"


def _task_names(folder: Path) -> set[str]:
    """The names that the YAML files below a folder give to tasks, and further texts that look like them."""
    names = {name for file in folder.rglob("*.yaml") for name in _TASK.findall(file.read_bytes())}
    return {name.decode("utf-8", "replace") for name in names}


def contamination_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields paths of evaluation files that match no file.

    Args:
        config: the experiment.
    """
    if config.annotate is None or config.annotate.contamination is None:
        return
    for path in config.annotate.contamination.paths:
        if storage.is_local(path):
            yield from _file_problems(path)
        elif is_seen_alike(config, path):
            yield from within_seconds(functools.partial(_file_problems, path))


def _file_problems(path: str) -> list[str]:
    try:
        files = seen_files(CONTAMINATION, path)
    except ConfigError as error:
        return [str(error)]
    return [no_evaluation_file(path)] if files and not any(is_evaluation_file(file.place) for file in files) else []


def _set_problems(name: str, section: TextInputConfig) -> Iterator[str]:
    try:
        if object_storage.is_s3(section.path):
            connect(_CONNECT_SECONDS)
        open_text_set(name, section).check_columns()
    except ConfigError as error:
        key = f"evaluate.inputs.{name}"
        shown = storage.redact(section.path)
        yield str(error) if str(error).startswith(key) else f"{key}.path: {shown} cannot be listed: {error}"
    except Exception as error:  # a package that is not installed here, or a damaged file
        if object_storage.is_s3(section.path) and not isinstance(error, ImportError) and (sentence := explain(error)):
            yield f"evaluate.inputs.{name}.path: {storage.redact(section.path)} cannot be read: {sentence}"
