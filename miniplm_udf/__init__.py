"""MiniPLM on Spark: the library behind the jobs and the trainer.

Owns the tables' schemas, chunking, scoring, the Arrow UDF, refinement and corpus versions. Imports run one way:
errors, schemas, progress, storage -> config -> chunking, scoring -> udf -> tables, refine, corpora -> jobs.
Importing this package loads nothing heavy: no pyspark, no torch, and no pyarrow until `miniplm_udf.nll_udf` is asked
for.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["nll_udf"]


def __getattr__(name: str) -> Any:
    if name == "nll_udf":
        from miniplm_udf.nll import nll_udf

        return nll_udf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
