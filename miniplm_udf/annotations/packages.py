"""Packages that groups of annotations need on executors: whether they are there, before any work; a small Spark job."""

import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from miniplm_udf.errors import ConfigError
from miniplm_udf.workers.remote import run_on_executor

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# By key of the section `annotate`; names to import and to install.
NEEDED = {"language": "py3langid", "near_duplicates": "datasketch"}


def on_executors(spark: "SparkSession", groups: Iterable[str]) -> dict[str, str]:
    """Asks an executor for its versions of the packages that some groups of annotations need.

    Args:
        spark: any session.
        groups: names of groups. Groups that `NEEDED` does not name need no package.

    Returns:
        Versions by name of the package.

    Raises:
        ConfigError: a package cannot be imported there.
    """
    needed = {group: NEEDED[group] for group in groups if group in NEEDED}
    if not needed:
        return {}
    return run_on_executor(spark, lambda: {name: _version(group, name) for group, name in needed.items()})


def _version(group: str, name: str) -> str:
    """The version of an installed package.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        importlib.import_module(name)
        return importlib.metadata.version(name)
    except ImportError as error:
        raise ConfigError(
            f"annotate.{group}: expected the package {name} on every executor, found that it cannot be imported "
            f"({error}); pip install 'miniplm[annotate]' there, or leave the key out"
        ) from error
