"""Scores sets of texts with a trained model: token mean, mean of instance means, official loss, bits per byte.

Input: a model folder and `EvaluationSet`s. Output: a `SetEvaluation` for each. A set is scored twice. First with
`context_prefix: token`: the separator stands in front, and every byte counts, so bits per byte compare tokenizers:
nats_per_token = sum(nll) / sum(n_tokens); bits_per_byte = sum(nll) / (ln 2 * sum(n_bytes)). Then with
`context_prefix: none`, the official arithmetic of arXiv 2410.17215, on official instances, for official_loss alone.
Windows have the length that the model was trained on. In memory: the model, and a few hundred texts at a time. Writes
nothing.
"""

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch

from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.config.targets import Target
from miniplm_udf.errors import CorpusError
from miniplm_udf.ingestion.text_sets import BadRow
from miniplm_udf.progress import progress
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.results import Failure, Score
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.store.model_records import SetEvaluation, TextLoss
from trainer.evaluation.texts import EvaluationSet, InstanceCutter, TextRow
from trainer.loader.data import read_tokenizer

LOGGER = logging.getLogger("miniplm.trainer.evaluation")
METHOD = 2  # raise it when the meaning of a number changes: models are then evaluated again
Result = Score | Failure
_TEXTS_AT_ONCE = 256
_SHOWN = 3


@dataclasses.dataclass
class Totals:
    """Sums over scored instances.

    Attributes:
        nll_sum_nats: sum of -log p over all tokens, in nats.
        instance_means_nats: sum over instances of their nats per token.
        n_instances, n_tokens, n_bytes: scored instances, and their tokens and UTF-8 bytes.
        official_means_nats: sum over official instances of their nats per token, by the official arithmetic.
        n_official: official instances with a prediction.
    """

    nll_sum_nats: float = 0.0
    instance_means_nats: float = 0.0
    n_instances: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    official_means_nats: float = 0.0
    n_official: int = 0

    def add(self, score: Score) -> None:
        """Adds the `score` of an instance whose every byte was scored."""
        self.nll_sum_nats += score.nll_sum_nats
        self.instance_means_nats += score.nll_sum_nats / score.n_tokens
        self.n_instances += 1
        self.n_tokens += score.n_tokens
        self.n_bytes += score.n_bytes

    def add_official(self, score: Score) -> None:
        """Adds the `score` of an instance by the official arithmetic."""
        self.official_means_nats += score.nll_sum_nats / score.n_tokens
        self.n_official += 1

    def loss(self) -> TextLoss:
        """Returns the means, None where nothing was scored."""
        some = self.n_instances > 0
        return TextLoss(
            nats_per_token=self.nll_sum_nats / self.n_tokens if some else None,
            nats_per_instance_mean=self.instance_means_nats / self.n_instances if some else None,
            official_loss=self.official_means_nats / self.n_official if self.n_official else None,
            bits_per_byte=self.nll_sum_nats / (math.log(2) * self.n_bytes) if some else None,
            n_instances=self.n_instances,
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
        )


class _Sums:
    """Sums over the texts of a set: totals of all texts and by source; failures and bad rows by reason."""

    def __init__(self) -> None:
        self.overall = Totals()
        self.by_source: dict[str, Totals] = collections.defaultdict(Totals)
        self.failed = collections.Counter[str]()
        self.bad_rows = collections.Counter[str]()
        self._places: list[str] = []

    def add_scores(self, rows: Sequence[TextRow], results: Sequence[Result]) -> None:
        """Adds texts whose every byte was scored, or that failed."""
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Score):
                for totals in (self.overall, self.by_source[row.source]):
                    totals.add(result)
            else:
                self.failed[result.reason] += 1

    def add_official(self, rows: Sequence[TextRow], results: Sequence[Result]) -> None:
        """Adds official instances.

        An instance without a score has a single token, so no prediction, or has already failed in `add_scores`.
        """
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, Score):
                for totals in (self.overall, self.by_source[row.source]):
                    totals.add_official(result)

    def add_bad_rows(self, rows: Sequence[BadRow]) -> None:
        """Counts bad rows, and remembers the places of the first bad rows."""
        self.bad_rows.update(row.reason for row in rows)
        self._places += [f"{row.reason} in {row.place}" for row in rows[: _SHOWN - len(self._places)]]

    def warn(self, model: str, texts: str) -> None:
        """Logs how many texts failed, and how many rows are bad and where."""
        if self.failed:
            LOGGER.warning(
                "%s: %d texts of %s cannot be scored: %s", model, self.failed.total(), texts, dict(self.failed)
            )
        if self.bad_rows:
            count, shown = self.bad_rows.total(), "; ".join(self._places)
            LOGGER.warning("%s: %d bad rows are left out: %s (%s)", texts, count, dict(self.bad_rows), shown)


class EvaluatedModel:
    """A trained model that is to be scored; its weights are read when the first set is scored.

    Args:
        config: the experiment.
        target: the model, whose tokenizer names the separator.
        folder: path or URI of the model's folder.
        sequence_length: tokens of one input in its training.
        compiled: whether to use torch.compile; None uses it on a GPU.

    Attributes:
        name: name of the model.
        folder: local path of its folder.
        revision: hash of the weights and of all that changes a score.

    Raises:
        ModelLoadError: the folder is not a whole model.
    """

    def __init__(
        self, config: ExperimentConfig, target: Target, folder: str, sequence_length: int, compiled: bool | None = None
    ):
        self.name, self._compiled = target.name, compiled
        self._tokens_per_batch = config.evaluate.tokens_per_batch
        separator = read_tokenizer(config.layout.tokenizer(target.tokenizer)).document_separator
        self._every_byte = _model_config(folder, separator, sequence_length, "token")
        self._official = _model_config(folder, separator, sequence_length, "none")
        self._description = describe(target.name, self._every_byte)
        self.folder = model_folder(self._every_byte)
        self._tokenizer = load_tokenizer(self.folder)
        self.revision = self._description.model_revision
        self._scorers: tuple[Scorer, Scorer] | None = None

    def fingerprint_of(self, texts: EvaluationSet) -> str:
        """Returns a hash of everything that the losses on a set depend on.

        Args:
            texts: the set.
        """
        return fingerprint(METHOD, self.revision, texts.fingerprint)

    def score(self, texts: EvaluationSet) -> SetEvaluation:
        """Scores a set.

        Args:
            texts: the set.

        Returns:
            The losses over the whole set and by source. Texts that cannot be scored and bad rows are counted, and
            named in a warning.

        Raises:
            ModelLoadError: the model cannot be loaded whole.
            ConfigError, CorpusError: the set cannot be read, or none of its texts could be scored.
        """
        every_byte, official = self._load()
        sums, cutter = _Sums(), InstanceCutter(texts, self._encode, self._official.context_tokens + 1)
        with progress(f"evaluate {self.name} on {texts.name}", total=texts.n_bytes, unit="byte") as shown:
            rows = texts.rows()
            while part := list(itertools.islice(rows, _TEXTS_AT_ONCE)):
                good = [row for row in part if isinstance(row, TextRow)]
                sums.add_bad_rows([row for row in part if isinstance(row, BadRow)])
                sums.add_scores(good, _scores(every_byte, good))
                instances = cutter.feed(good)
                sums.add_official(instances, _scores(official, instances))
                shown.update(sum(row.n_bytes for row in good))
            instances = cutter.close()
            sums.add_official(instances, _scores(official, instances))
        sums.warn(self.name, texts.name)
        if not sums.overall.n_instances:
            raise CorpusError(
                f"{self.name}: expected texts in the set {texts.name} ({texts.location}) that can be scored, found "
                f"none: failed {dict(sums.failed)}, bad rows {dict(sums.bad_rows)}; correct the texts"
            )
        return SetEvaluation(
            **dataclasses.asdict(sums.overall.loss()),
            location=texts.location,
            version=texts.version,
            by_source={source: sums.by_source[source].loss() for source in sorted(sums.by_source)},
            failed=dict(sums.failed),
            bad_rows=dict(sums.bad_rows),
            fingerprint=self.fingerprint_of(texts),
        )

    def _encode(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """The spans of the tokens of each text, in characters."""
        return [encoding.offsets for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _load(self) -> tuple[Scorer, Scorer]:
        """The two scorers of the model, on the GPU if there is one."""
        if self._scorers is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = load_model(self._every_byte, self._description, device)
            official = describe(self.name, self._official, self._description.dtype)
            self._scorers = (self._scorer(model, self._description), self._scorer(model, official))
        return self._scorers

    def _scorer(self, model: Any, description: ModelDescription) -> Scorer:
        return Scorer(model, self._tokenizer, description, self._tokens_per_batch, model.device, self._compiled)


def _model_config(folder: str, separator: str, sequence_length: int, prefix: Literal["token", "none"]) -> ModelConfig:
    """How the scorer loads and windows the model; windows overlap by a quarter of the training length."""
    return ModelConfig(
        path=folder,
        document_separator=separator,
        context_prefix=prefix,
        context_tokens=sequence_length,
        window_overlap_tokens=sequence_length // 4,
    )


def _scores(scorer: Scorer, rows: Sequence[TextRow]) -> list[Result]:
    return scorer.score(
        [row.text for row in rows], [row.segment_ends for row in rows], [row.ends_document for row in rows]
    )
