"""The plan of a scoring run: its models, the factories of their scorers and its tables. Driver only; plain data."""

import dataclasses
from collections.abc import Callable, Mapping

from miniplm_udf.schemas import SCORE_STAGE
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.workers.worker_scorers import ScorerLike

ScorerFactory = Callable[[], ScorerLike]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """The models to score with, and the tables of the rows.

    Attributes:
        models: one for each revision; two aliases of one model are scored once, under the first alias.
        factories: makers of the models' scorers, by alias.
        instances_uri: table of the instances.
        scores_uri: table of the scores.
        rejects_uri: table of the rejects.
        workers: concurrent scorers.
        workers_per_gpu: scorers that may share a GPU; None for any number.
        split_model: alias of a model that is split over all GPUs of its process; None if there is none.
        run_id: id of the command that scores.
    """

    models: tuple[ModelDescription, ...]
    factories: Mapping[str, ScorerFactory]
    instances_uri: str
    scores_uri: str
    rejects_uri: str
    workers: int
    workers_per_gpu: int | None
    run_id: str
    split_model: str | None = None

    @property
    def revisions(self) -> list[str]:
        """Revisions of the models, in the order of `models`."""
        return [model.model_revision for model in self.models]

    @property
    def stages(self) -> list[str]:
        """Values of the column `stage` that mark the models' rows in `rejects`, in the order of `models`."""
        return [SCORE_STAGE + revision for revision in self.revisions]
