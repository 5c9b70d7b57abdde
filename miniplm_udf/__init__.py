"""MiniPLM on Spark: the library behind the jobs and the trainer.

The public names are listed in `__all__`; each is imported when it is first used, so that importing this package loads
no pyspark, no torch and no pyarrow. CONTRIBUTING.md describes the rooms; setup.cfg has the contracts between them.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_config", "nll_udf", "read_corpus", "register_tables"]

_MODULES = {
    "load_config": "miniplm_udf.config.experiment",
    "nll_udf": "miniplm_udf.scores.nll",
    "read_corpus": "miniplm_udf.store.corpus_records",
    "register_tables": "miniplm_udf.store.catalog",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
