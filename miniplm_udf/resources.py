"""What a stage of a job asks of the cluster, beside what the whole application asks: a GPU for each task that scores.

Input: the session's properties, which say where GPUs are. Output: a resource profile for `mapInArrow`, or None. Stages
that run no model ask for nothing, so that they use all cores: leave `spark.task.resource.gpu.amount` unset.

    spark.executor.resource.gpu.amount   every executor has GPUs: scoring asks for tasks with one, on those executors
    spark.miniplm.gpu.amount             (discoveryScript, vendor) with dynamic allocation: executors with GPUs are
                                         started for scoring alone, and given back; the others have none

Driver only. A retried micro-batch uses the same profile.
"""

from typing import TYPE_CHECKING

from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    from pyspark import SparkConf
    from pyspark.resource import ResourceProfile
    from pyspark.sql import SparkSession

_SHARED, _OWN = "spark.executor.resource.gpu", "spark.miniplm.gpu"
# By application and share: Spark keeps each profile for good, and with dynamic allocation starts executors of its own.
_PROFILES: dict[tuple[str, float], "ResourceProfile"] = {}


def scoring_profile(spark: "SparkSession", workers_per_gpu: int | None) -> "ResourceProfile | None":
    """What a task that scores asks for: its share of a GPU, and the executors that have some.

    Args:
        spark: the session; of a micro-batch, or any.
        workers_per_gpu: tasks that may share a GPU; None is no bound.

    Returns:
        None where there are no GPUs to ask for, where tasks share them without bound, and in local mode.

    Raises:
        ConfigError: with dynamic allocation, every executor is to have GPUs: those that score would wait for ever for
            those that hold shuffled rows. Or scoring is to have executors of its own without dynamic allocation.
    """
    context = spark.sparkContext
    conf = context.getConf()
    has_shared, has_own = (float(conf.get(f"{place}.amount", "0") or 0) > 0 for place in (_SHARED, _OWN))
    if not (has_shared or has_own) or workers_per_gpu is None or context.master.startswith("local"):
        return None
    is_dynamic = str(conf.get("spark.dynamicAllocation.enabled", "false")).lower() == "true"
    if is_dynamic != has_own or (has_shared and has_own):
        raise ConfigError(
            f"{_SHARED}.amount is for a fixed number of executors, {_OWN}.amount for dynamic allocation; found "
            f"dynamic allocation {'on' if is_dynamic else 'off'} and {_OWN if has_own else _SHARED}.amount set; see "
            "docs/cluster.md"
        )
    place = (str(context.applicationId), 1 / workers_per_gpu)
    if place not in _PROFILES:
        _PROFILES[place] = _profile(conf, place[1], has_own)
    return _PROFILES[place]


def _profile(conf: "SparkConf", share: float, own_executors: bool) -> "ResourceProfile":
    from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests

    # Of tasks alone, it runs on the executors that are there.
    builder = ResourceProfileBuilder().require(TaskResourceRequests().resource("gpu", share))
    if own_executors:
        executors = ExecutorResourceRequests().resource(
            "gpu", int(str(conf.get(f"{_OWN}.amount"))), str(conf.get(f"{_OWN}.discoveryScript", "")),
            str(conf.get(f"{_OWN}.vendor", "")),
        )  # fmt: skip
        builder = builder.require(executors)
    return builder.build
