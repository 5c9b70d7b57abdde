"""The sections of experiment tracking: `mlflow`, `tensorboard`, `wandb`. Imports nothing heavy."""

import dataclasses
import re
from typing import Literal

from miniplm_udf.config.sections import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlflowConfig:
    """MLflow.

    Attributes:
        tracking_uri: URI of the store; null takes `MLFLOW_TRACKING_URI` if that is set, else SQLite in the report
            folder.
        experiment: name of the MLflow experiment.
        wait_seconds: longest time that a finished training or evaluation waits for an answer of the store, to log the
            points that it holds back. The work itself never waits.
        parent_run: name of the run whose children the models' runs are; created if there is none. Null: no parent.
        registered_model: name under which a finished student is registered, with `{student}` for the student's name.
            Null registers none.
        system_metrics: whether a training logs the use of processors, memory, disk, network and GPUs of rank 0's
            machine.
    """

    tracking_uri: str | None = None
    experiment: str = "miniplm"
    wait_seconds: float = 180.0
    parent_run: str | None = None
    registered_model: str | None = None
    system_metrics: bool = True

    def __post_init__(self) -> None:
        check(self.wait_seconds >= 1, f"mlflow.wait_seconds: expected at least 1, found {self.wait_seconds}")
        check(
            self.parent_run is None or re.fullmatch(r"[^'\"\\]+", self.parent_run) is not None,
            f"mlflow.parent_run: expected a name without quotes and backslashes, found {self.parent_run!r}",
        )
        # MLflow refuses names of registered models with these characters.
        bare = "model" if self.registered_model is None else self.registered_model.replace("{student}", "student")
        check(
            re.fullmatch(r"[^/:{}]+", bare) is not None,
            "mlflow.registered_model: expected a name without / and :, in which {student} may stand, "
            f"found {self.registered_model!r}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorboardConfig:
    """TensorBoard: each training writes its curve.

    Attributes:
        folder: folder of the curves; null takes `tensorboard` next to MLflow's default store.
    """

    folder: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases: each training is a run of the project.

    Attributes:
        project: created if there is none.
        entity: user or team; null takes the default of the account.
        mode: offline writes files for `wandb sync`; null takes WANDB_MODE, else online.
    """

    project: str = "miniplm"
    entity: str | None = None
    mode: Literal["online", "offline"] | None = None
