"""Scores a trained model on tasks of lm-evaluation-harness (lm-eval), zero-shot.

Input: a model folder, names of tasks, and perhaps a folder with YAML files of tasks, whose `data_files` are relative to
that folder. Output: a `TaskEvaluation`: `acc_norm` where a task has it, else `acc`, with the versions of the task and
of the library. lm-eval makes the prompts, computes the likelihoods and the metrics; this module chooses tasks, model
and settings. The data of lm-eval's own tasks comes from the Hugging Face hub or its local cache; tasks of the folder
need no network. Needs the extra `eval`. Writes nothing but the cache of `datasets`.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from miniplm_udf import storage
from miniplm_udf.config.evaluate import EvaluateConfig
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.errors import ConfigError
from miniplm_udf.scoring.loading import load_causal_lm
from trainer.evaluation.losses import EvaluatedModel
from trainer.evaluation.records import TaskEvaluation, TaskScore

LOGGER = logging.getLogger("miniplm.trainer.evaluation")
_METHOD = 1  # raise it when the meaning of a number changes: models are then evaluated again
_METRICS = ("acc_norm", "acc")
# lm-eval logs every choice that it makes, and datasets every file.
_NOISY = ("lm_eval", "lm-eval", "datasets", "evaluate", "fsspec")


def require_library() -> None:
    """Refuses tasks if lm-eval is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluate.tasks: expected the package lm-eval, which runs the tasks, found none; install it with "
            "`pip install 'miniplm[eval]'`, or remove the key"
        )


def fingerprint_of(config: ExperimentConfig, model: EvaluatedModel) -> str:
    """Hashes all that the scores depend on: the model, the tasks, the files of the tasks' folder, and the library.

    Args:
        config: the experiment.
        model: the model.
    """
    section = config.evaluate
    files = storage.folder_state(section.tasks_folder) if section.tasks_folder else []
    return fingerprint(_METHOD, model.revision, section.task_names, files, importlib.metadata.version("lm-eval"))


def evaluate_tasks(config: ExperimentConfig, model: EvaluatedModel, sequence_length: int) -> TaskEvaluation:
    """Evaluates a model on the tasks of the config.

    Args:
        config: the experiment.
        model: the model.
        sequence_length: tokens of one input in its training; longer prompts lose their start.

    Returns:
        The scores by task, in the config's order.

    Raises:
        ConfigError: a task does not exist, has no accuracy, or its data cannot be loaded.
        ModelLoadError: the model cannot be loaded whole.
    """
    with _quiet():
        tasks = _load_tasks(config.evaluate)
        from lm_eval import simple_evaluate

        LOGGER.info("%s: evaluating on %s", model.name, ", ".join(tasks))
        results: Any = simple_evaluate(
            model=_language_model(config, model, sequence_length),
            tasks=list(tasks.values()),
            num_fewshot=0,
            bootstrap_iters=0,
            log_samples=False,
        )
    scores = {name: _score(name, results) for name in tasks}
    return TaskEvaluation(
        scores=scores,
        average=sum(score.value for score in scores.values()) / len(scores),
        lm_eval_version=importlib.metadata.version("lm-eval"),
        fingerprint=fingerprint_of(config, model),
    )


def _load_tasks(section: EvaluateConfig) -> dict[str, Any]:
    """The tasks of lm-eval with their data, by name."""
    from lm_eval.tasks import TaskManager

    folder = _folder(section)
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
    if manager is None or not set(section.task_names) <= set(manager.all_subtasks):
        # Reading the thousands of files of lm-eval's own tasks takes seconds.
        manager = TaskManager(include_path=str(folder) if folder else None)
    known = set(manager.all_subtasks)
    loaded = {}
    for name in section.task_names:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"evaluate.tasks: expected names of lm-eval tasks or paper, found {name!r}{hint}")
        loaded[name] = _load_task(manager, name, folder)
    return loaded


def _load_task(manager: Any, name: str, folder: Path | None) -> Any:
    try:
        with contextlib.chdir(folder or Path.cwd()):
            (task,) = manager.load([name])["tasks"].values()
    except Exception as error:  # of datasets, the hub's client, or a task's own code
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"evaluate.tasks: the task {name} cannot be loaded with its data ({type(error).__name__}: {reason}); load "
            "it once with a network, or put a YAML file of the task with data_files into evaluate.tasks_folder "
            "(docs/evaluation.md)"
        ) from error
    return task


def _folder(section: EvaluateConfig) -> Path | None:
    if section.tasks_folder is None:
        return None
    folder = Path(section.tasks_folder).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"evaluate.tasks_folder: expected a local folder with YAML files of tasks, found no {folder}")
    return folder


def _language_model(config: ExperimentConfig, model: EvaluatedModel, sequence_length: int) -> Any:
    """The model as lm-eval takes it: without a BOS, in bfloat16 on a GPU and float32 on a CPU."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    on_gpu = torch.cuda.is_available()
    loaded = load_causal_lm(model.folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    # For some model types AutoTokenizer would split words differently (`tokenizer_files.check_auto_tokenizer`).
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.folder)
    return HFLM(
        pretrained=loaded.to("cuda" if on_gpu else "cpu").eval(),
        tokenizer=tokenizer,
        backend="causal",
        max_length=sequence_length,
        batch_size=max(1, config.evaluate.tokens_per_batch // sequence_length),
        add_bos_token=False,
    )


def _score(name: str, results: Any) -> TaskScore:
    numbers = results["results"][name]
    metric = next((metric for metric in _METRICS if f"{metric},none" in numbers), None)
    if metric is None:
        raise ConfigError(
            f"evaluate.tasks: expected a task with {' or '.join(_METRICS)}, found {name} with "
            f"{', '.join(key for key in numbers if ',' in key)}; take it out of the list"
        )
    stderr = numbers.get(f"{metric}_stderr,none")
    return TaskScore(
        metric=metric,
        value=float(numbers[f"{metric},none"]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        n_questions=int(results["n-samples"][name]["effective"]),
        version=str(results["versions"].get(name)),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what lm-eval and datasets log below a warning; their progress bars stay on terminals only."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
