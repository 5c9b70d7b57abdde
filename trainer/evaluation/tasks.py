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
import io
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from miniplm_udf import storage
from miniplm_udf.config.evaluate import LM_EVAL_MISSING, EvaluateConfig
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.errors import ConfigError
from miniplm_udf.scoring.loading import load_causal_lm
from miniplm_udf.store.model_records import TaskEvaluation, TaskScore
from trainer.evaluation.losses import EvaluatedModel

LOGGER = logging.getLogger("miniplm.trainer.evaluation")
_METHOD = 1  # raise it when the meaning of a number changes: models are then evaluated again
_METRICS = ("acc_norm", "acc")
# lm-eval logs every choice that it makes, and datasets every file.
_NOISY = ("lm_eval", "lm-eval", "datasets", "evaluate", "fsspec")


class Tasks:
    """The tasks of an experiment. Their data is loaded once, for all models.

    Args:
        config: the experiment.

    Raises:
        ConfigError: lm-eval is not installed, or `evaluate.tasks_folder` is no folder.
    """

    def __init__(self, config: ExperimentConfig):
        _require_library()
        self._section, self._folder = config.evaluate, _folder(config.evaluate)
        self._version = importlib.metadata.version("lm-eval")
        self._manager: Any = None
        self._loaded: Mapping[str, Any] = {}

    def fingerprint_of(self, model: EvaluatedModel) -> str:
        """Returns a hash of all that the scores of a model depend on: its weights, the tasks' files and the library.

        Args:
            model: the model.
        """
        files = storage.folder_state(str(self._folder)) if self._folder else []
        return fingerprint(_METHOD, model.revision, self._section.task_names, files, self._version)

    def load(self) -> None:
        """Loads the tasks with their data, unless they are loaded.

        Raises:
            ConfigError: a task does not exist, or its data cannot be loaded.
        """
        names = self._section.task_names
        if self._loaded:
            return
        with _quiet():
            self._manager = self._make_manager()
            known = set(self._manager.all_subtasks)
            for name in names:
                if name not in known:
                    close = difflib.get_close_matches(name, sorted(known), n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise ConfigError(f"evaluate.tasks: expected names of lm-eval tasks or paper, found {name!r}{hint}")
            self._loaded = {name: _load_task(self._manager, name, self._folder) for name in names}

    def evaluate(self, model: EvaluatedModel, sequence_length: int) -> TaskEvaluation:
        """Evaluates a model.

        Args:
            model: the model.
            sequence_length: tokens of one input in its training; longer prompts lose their start.

        Returns:
            The scores by task, in the config's order.

        Raises:
            ConfigError: a task does not exist, its data cannot be loaded, or it has no accuracy.
            ModelLoadError: the model cannot be loaded whole.
        """
        self.load()
        LOGGER.info("%s: evaluating on %s", model.name, ", ".join(self._loaded))
        with _quiet():
            from lm_eval import simple_evaluate

            results: Any = simple_evaluate(
                model=_language_model(model, sequence_length, self._section.tokens_per_batch),
                tasks=list(self._loaded.values()),
                task_manager=self._manager,  # simple_evaluate would read all of lm-eval's tasks again
                num_fewshot=0,
                bootstrap_iters=0,
                log_samples=False,
            )
        scores = {name: _score(name, results) for name in self._loaded}
        return TaskEvaluation(
            scores=scores,
            average=sum(score.value for score in scores.values()) / len(scores),
            lm_eval_version=self._version,
            fingerprint=self.fingerprint_of(model),
        )

    def _make_manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        if self._folder is not None:
            manager = TaskManager(include_path=str(self._folder), include_defaults=False)
            if set(self._section.task_names) <= set(manager.all_subtasks):
                return manager  # reading the thousands of files of lm-eval's own tasks takes seconds
        return TaskManager(include_path=str(self._folder) if self._folder else None)


def _require_library() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(LM_EVAL_MISSING)


def _load_task(manager: Any, name: str, folder: Path | None) -> Any:
    try:
        with contextlib.chdir(folder or Path.cwd()):
            (task,) = manager.load([name])["tasks"].values()
    except Exception as error:  # raised by datasets, the hub's client, or a task's own code
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


def _language_model(model: EvaluatedModel, sequence_length: int, tokens_per_batch: int) -> Any:
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
        batch_size=max(1, tokens_per_batch // sequence_length),
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
    value, n_questions = float(numbers[f"{metric},none"]), int(results["n-samples"][name]["effective"])
    return TaskScore(
        metric=metric,
        value=value,
        # As lm-eval computes it for a share. It would also resample perplexities for minutes, and print to stdout.
        stderr=math.sqrt(value * (1 - value) / (n_questions - 1)) if n_questions > 1 else None,
        n_questions=n_questions,
        version=str(results["versions"].get(name)),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what lm-eval and datasets log below an error, and their bars unless stderr is a terminal.

    stdout holds only results, so what they print goes to stderr. The libraries also report each data set that they
    load, local files too, to a counter on the internet; that is switched off.
    """
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # read when lm-eval imports its metrics
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield
    finally:
        datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
