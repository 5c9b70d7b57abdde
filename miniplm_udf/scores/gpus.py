"""The GPUs that a scoring stage asks the cluster for, in addition to what the application asks for.

Input: the session's properties, which say where GPUs are. Output: a resource profile for `mapInArrow`, or None. Stages
that run no model ask for no GPU, so that they use all cores: leave `spark.task.resource.gpu.amount` unset.

    spark.executor.resource.gpu.amount   every executor has GPUs: scoring tasks ask for a GPU on those executors
    spark.miniplm.gpu.amount             (also discoveryScript, vendor) with dynamic allocation: executors with GPUs are
                                         started for scoring only and given back; the others have none

A task gets the GPUs that it asks for: a share of one, or all GPUs of an executor if a model is split over them. Whether
several tasks would wait for the GPUs of one machine is known on the executor (`workers.model_scorers`).

Driver only. A retried micro-batch uses the same profile.
"""

from typing import TYPE_CHECKING

from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    from pyspark import SparkConf
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

_SHARED, _OWN = "spark.executor.resource.gpu", "spark.miniplm.gpu"
# Profiles by application and GPUs of a task. Spark never frees a profile, and with dynamic allocation starts executors
# for each, so equal profiles are made once.
_PROFILES: dict[tuple[str, float], "ResourceProfile"] = {}


def scoring_profile(
    spark: "SparkSession", workers_per_gpu: int | None, split_model: str | None = None
) -> "ResourceProfile | None":
    """The resource profile of scoring tasks: their GPUs, and with dynamic allocation executors with GPUs.

    Args:
        spark: a session; a micro-batch's own will do.
        workers_per_gpu: tasks that may share a GPU; None for any number.
        split_model: alias of a model that is split over all GPUs of its task; None if there is none.

    Returns:
        The profile; None if the session's properties name no GPUs, if any number of tasks may share one, and in local
        mode.

    Raises:
        ConfigError: dynamic allocation is on and every executor has GPUs (the executors that score would wait for ever
            for executors that hold shuffled rows), or it is off and scoring shall have executors of its own; or several
            tasks shall share GPUs that Spark assigns to a task of a split model.
    """
    context = spark.sparkContext
    conf = context.getConf()
    is_local = context.master.startswith("local")
    has_shared, has_own = (float(conf.get(f"{key}.amount", "0") or 0) > 0 for key in (_SHARED, _OWN))
    if split_model is not None and (has_shared or has_own) and not is_local and (workers_per_gpu or 1) > 1:
        raise ConfigError(
            f"score.workers_per_gpu: expected 1, because Spark assigns whole GPUs to a task with several of them "
            f"(models.{split_model} with device_map: auto), found {workers_per_gpu}"
        )
    any_number = workers_per_gpu is None and split_model is None
    if not (has_shared or has_own) or any_number or is_local:
        return None
    is_dynamic = str(conf.get("spark.dynamicAllocation.enabled", "false")).lower() == "true"
    if is_dynamic != has_own or (has_shared and has_own):
        raise ConfigError(
            f"{_SHARED}.amount is for a fixed number of executors, {_OWN}.amount for dynamic allocation; found "
            f"dynamic allocation {'on' if is_dynamic else 'off'} and {_OWN if has_own else _SHARED}.amount set; see "
            "docs/cluster.md"
        )
    share = 1 / (workers_per_gpu or 1)
    if split_model is not None:
        share = float(conf.get(f"{_OWN if has_own else _SHARED}.amount", "1") or 1)
    key = (str(context.applicationId), share)
    if key not in _PROFILES:
        _PROFILES[key] = _profile(conf, share, has_own)
    return _PROFILES[key]


def _profile(conf: "SparkConf", share: float, own_executors: bool) -> "ResourceProfile":
    from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests

    # A profile with task resources only runs on the application's own executors.
    builder = ResourceProfileBuilder().require(TaskResourceRequests().resource("gpu", share))
    if own_executors:
        executors = ExecutorResourceRequests().resource(
            "gpu", int(str(conf.get(f"{_OWN}.amount"))), str(conf.get(f"{_OWN}.discoveryScript", "")),
            str(conf.get(f"{_OWN}.vendor", "")),
        )  # fmt: skip
        builder = builder.require(executors)
    return builder.build
