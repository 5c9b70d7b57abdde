"""Surveys the Parquet files of an input: their common schema, files that differ from it, files that cannot be read.

Input: files. Output: a `Survey`. Only footers are read (footers.py). A file whose text column holds no text counts as
damaged; if no file has the column, `field_checks.py` refuses the config. Driver only. Writes nothing; a retry surveys
again.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.ingestion.footers import Damage, Footer, read_footers
from miniplm_udf.ingestion.parquet_columns import fits, holds_text, unify, wanted_columns

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructType

    from miniplm_udf.ingestion.listing import InputFile

LOGGER = logging.getLogger("miniplm.ingest")


@dataclasses.dataclass(frozen=True)
class Survey:
    """The common properties of Parquet files.

    Attributes:
        schema: schema of the wanted columns, with which Spark reads; None if no file has a footer.
        types: types of the columns of all files, by name; "" for columns that are not wanted.
        odd: files whose wanted columns have types that Spark cannot read under `schema`.
        damaged: files that cannot be read.
        rows_per_byte: mean of the files with a footer; 0 if there is none.
    """

    schema: "StructType | None" = None
    types: dict[str, str] = dataclasses.field(default_factory=dict)
    odd: "tuple[InputFile, ...]" = ()
    damaged: tuple[Damage, ...] = ()
    rows_per_byte: float = 0.0


def survey_parquet(spark: "SparkSession", files: "Sequence[InputFile]", fields: FieldsConfig) -> Survey:
    """Returns the combined footers of files.

    Args:
        spark: a session.
        files: Parquet files.
        fields: names of the wanted columns.
    """
    wanted = wanted_columns(fields)
    results = read_footers(spark, files, wanted)
    footers = [(file, footer) for file, footer in results if isinstance(footer, Footer)]
    readable = [(file, footer) for file, footer in footers if _has_text(footer, fields)]
    schema = unify(readable or footers, wanted) if footers else None
    damaged = [damage for _, damage in results if isinstance(damage, Damage)]
    damaged += [_no_text(file, footer, fields) for file, footer in footers if not _has_text(footer, fields)]
    odd = tuple(file for file, footer in readable if schema is not None and not fits(footer, schema))
    if odd:
        LOGGER.info("ingest: %d of %d files have other column types than most: %s", len(odd), len(files), odd[0].path)
    n_bytes = sum(file.n_bytes for file, _ in footers)
    rate = sum(footer.n_rows for _, footer in footers) / n_bytes if n_bytes else 0.0
    return Survey(schema, _types(footers, schema), odd, tuple(damaged), rate)


def _has_text(footer: Footer, fields: FieldsConfig) -> bool:
    column = footer.columns.get(fields.text)
    return column is None or holds_text(column)


def _no_text(file: "InputFile", footer: Footer, fields: FieldsConfig) -> Damage:
    stated = footer.columns[fields.text].stated
    return Damage(file, f"its column {fields.text!r} holds no text: {stated}", footer.n_rows)


def _types(footers: "Sequence[tuple[InputFile, Footer]]", schema: "StructType | None") -> dict[str, str]:
    types = dict.fromkeys((name for _, footer in footers for name in footer.names), "")
    for _, footer in footers:
        types |= {name: column.stated for name, column in footer.columns.items()}
    return types | {field.name: field.dataType.simpleString() for field in (schema.fields if schema else [])}
