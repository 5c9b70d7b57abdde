"""The section `spark` of an experiment: the session of a command.

A frozen dataclass, checked when it is made, as in sections.py. Imports nothing heavy.
"""

import dataclasses
import re

from miniplm_udf.config.sections import check

# Masters of Spark, and settings that are sizes.
_MASTER = r"local(\[[\d*]+(, *\d+)?\]|-cluster\[.+\])?|(spark|k8s)://.+|yarn"
_SIZES = tuple(f"spark.{process}.{name}" for process in ("driver", "executor") for name in ("memory", "memoryOverhead"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkConfig:
    """The Spark session of a command. A master or a setting that spark-submit is given wins over the one here.

    Attributes:
        master: Spark's master URL; null is local.
        conf: Spark settings by key.
        schema: `schema` or `catalog.schema` in which each stage registers the root's tables, for sessions that share
            the catalog; null registers nothing.
    """

    master: str | None = None
    conf: dict[str, str] = dataclasses.field(default_factory=dict)
    schema: str | None = None

    def __post_init__(self) -> None:
        check(
            self.schema is None or re.fullmatch(r"\w+(\.\w+)?", self.schema) is not None,
            f"spark.schema: expected schema or catalog.schema, found {self.schema!r}",
        )
        check(
            self.master is None or re.fullmatch(_MASTER, self.master) is not None,
            f"spark.master: expected local, local[N], local[*], spark://HOST:PORT, k8s://URL or yarn, found "
            f"{self.master!r}",
        )
        for key, size in self.conf.items():
            check(
                key not in _SIZES or re.fullmatch(r"\d+[bkmgtp]?b?", size.strip().lower()) is not None,
                f"spark.conf.{key}: expected a size such as 4g or 512m, found {size!r}",
            )
