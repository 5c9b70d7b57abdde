"""Reads the footers of Parquet files: rows, the wanted columns with their types, and whether Spark can read the file.

Input: files. Output: a `Footer` or a `Damage` for each. Spark's own Parquet library reads the footers through Hadoop,
so every storage that Spark supports works; it reads some kilobytes of each file, several files at a time. The types of
other columns are not read and do not matter. A footer does not show damage in the pages before it; readability.py finds
that. Driver only. Writes nothing; a retry reads again.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from miniplm_udf.ingestion.nested import same_name

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import DataType

    from miniplm_udf.ingestion.listing import InputFile

_THREADS = 16
_ROW_METADATA = "org.apache.spark.sql.parquet.row.metadata"


@dataclasses.dataclass(frozen=True)
class ParquetColumn:
    """A column of one file.

    Attributes:
        name: name in the file.
        type: Spark's type; None if Spark cannot read the column.
        stated: type as the file states it.
        is_null: whether the column has no type and holds nulls alone.
    """

    name: str
    type: "DataType | None"
    stated: str
    is_null: bool = False


@dataclasses.dataclass(frozen=True)
class Footer:
    """The footer of one file.

    Attributes:
        n_rows: rows of the file.
        names: names of all columns.
        columns: the wanted columns that the file has, by wanted name.
    """

    n_rows: int
    names: tuple[str, ...]
    columns: dict[str, ParquetColumn]


@dataclasses.dataclass(frozen=True)
class Damage:
    """A file that cannot be read.

    Attributes:
        file: the file.
        detail: what is wrong with the file.
        n_rows: rows of the file; None if they are not known.
    """

    file: "InputFile"
    detail: str
    n_rows: int | None = None


def read_footers(
    spark: "SparkSession", files: Sequence["InputFile"], wanted: Sequence[str]
) -> list[tuple["InputFile", Footer | Damage]]:
    """Reads the footers of the files, in their order.

    Args:
        spark: a session.
        files: Parquet files.
        wanted: names of top-level columns; as in Spark, upper and lower case may differ.

    Returns:
        Each file with its footer, or with its damage.
    """
    reader = _Reader(spark, wanted)
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(zip(files, threads.map(reader.read, files), strict=True))


class _Reader:
    """Reads footers; converts each stated column type to Spark's type once."""

    def __init__(self, spark: "SparkSession", wanted: Sequence[str]) -> None:
        state = spark._jsparkSession.sessionState()
        self._jvm: Any = spark._jvm
        self._wanted = wanted
        self._conf = state.newHadoopConf()
        parquet = self._jvm.org.apache.spark.sql.execution.datasources.parquet
        self._converter = parquet.ParquetToSparkSchemaConverter(state.conf())
        self._types: dict[str, DataType | None] = {}

    def read(self, file: "InputFile") -> Footer | Damage:
        from py4j.protocol import Py4JJavaError

        if not file.n_bytes:
            return Damage(file, "expected a Parquet file, found one of 0 bytes")
        parquet = self._jvm.org.apache.parquet.hadoop
        path = self._jvm.org.apache.hadoop.fs.Path(self._jvm.java.net.URI(file.path))
        try:
            source = parquet.util.HadoopInputFile.fromPath(path, self._conf)
            opened = parquet.ParquetFileReader.open(source)
            try:
                return self._footer(file, opened)
            finally:
                opened.close()
        except Py4JJavaError as error:
            message = str(error.java_exception.toString()).splitlines()[0]
            return Damage(file, f"its footer cannot be read: {message}")

    def _footer(self, file: "InputFile", opened: Any) -> Footer | Damage:
        facts = opened.getFileMetaData()
        n_rows, fields = int(opened.getRecordCount()), list(facts.getSchema().getFields())
        names = tuple(str(field.getName()) for field in fields)
        row_metadata = facts.getKeyValueMetaData().get(_ROW_METADATA)
        columns = {}
        for wanted in self._wanted:
            name = same_name(wanted, names)
            if name is not None:
                columns[wanted] = self._column(fields[names.index(name)], name, row_metadata)
        codec = self._missing_codec(opened, {column.name for column in columns.values()})
        if codec is not None:
            detail = f"codec {codec} is not supported by this Spark; rewrite the file, for example with zstd"
            return Damage(file, detail, n_rows)
        return Footer(n_rows, names, columns)

    def _column(self, field: Any, name: str, row_metadata: str | None) -> ParquetColumn:
        stated = " ".join(str(field.toString()).split())
        key = f"{stated} {row_metadata}"
        if key not in self._types:
            self._types[key] = self._stated_type(name, row_metadata) or self._converted_type(field)
        return ParquetColumn(name, self._types[key], stated, "(UNKNOWN)" in stated)

    def _stated_type(self, name: str, row_metadata: str | None) -> "DataType | None":
        """The type that Spark recorded in the file, if Spark wrote it."""
        from pyspark.sql.types import StructType

        if row_metadata is None:
            return None
        schema = StructType.fromJson(json.loads(row_metadata))
        return schema[name].dataType if name in schema.names else None

    def _converted_type(self, field: Any) -> "DataType | None":
        from pyspark.errors import AnalysisException
        from pyspark.sql.types import StructType

        alone = self._jvm.java.util.Collections.singletonList(field)
        message = self._jvm.org.apache.parquet.schema.MessageType("column", alone)
        try:
            return StructType.fromJson(json.loads(self._converter.convert(message).json())).fields[0].dataType
        except AnalysisException:
            return None

    def _missing_codec(self, opened: Any, wanted: set[str]) -> str | None:
        """A codec of a wanted column that this Spark cannot read; None if it can read all of them."""
        groups = opened.getRowGroups()
        if groups.isEmpty():
            return None
        # One call to Java for all columns, because wide files have thousands.
        stated = str(groups.get(0).getColumns().toString())
        codecs = {codec for codec, path in re.findall(r"ColumnMetaData\{(\w+) \[([^\]]*)\]", stated)
                  if path.split(",")[0].strip() in wanted}  # fmt: skip
        known = self._jvm.org.apache.parquet.hadoop.metadata.CompressionCodecName
        for codec in sorted(codecs):
            name = known.valueOf(codec).getHadoopCompressionCodecClassName()
            if name is not None and self._conf.getClassByNameOrNull(name) is None:
                return codec.lower()
        return None
