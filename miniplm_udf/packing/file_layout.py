"""How the files of packed tables are written, so that a trainer reads them in a random order at a low cost.

Owns the rows of a row group and of a file, and the encoding of the columns. `trainer/loader/order.py` permutes row
groups, so small row groups make a good shuffle in little memory. Files are small enough that their footers are read
quickly, and in parallel. Input: a session; while the block runs, its Parquet writer follows this layout. Driver.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

GROUP_ROWS = 512
FILE_ROWS = 128 * GROUP_ROWS
COMPRESSION = "zstd"
# No dictionary: no two sequences are alike. No minimum and maximum of bytes: they would fill the footers. zstd: files
# without compression are read twice as fast and are twice the size; a core reads more than any trainer needs anyway
# (`make bench-loader` compares the codecs).
SETTINGS = {
    "parquet.block.row.count.limit": str(GROUP_ROWS),
    "spark.sql.files.maxRecordsPerFile": str(FILE_ROWS),
    "spark.sql.parquet.compression.codec": COMPRESSION,
    "parquet.enable.dictionary#token_ids": "false",
    "parquet.column.statistics.enabled#token_ids": "false",
    "parquet.column.statistics.enabled#target_mask": "false",
    "parquet.size.statistics.enabled": "false",
}


@contextlib.contextmanager
def packed_files(spark: Any) -> Iterator[None]:
    """Writes Parquet files in the layout of packed tables while the block runs.

    Args:
        spark: the `SparkSession` of the frame that is written. The annotation does not name it, because the trainer
            imports this module without Spark.
    """
    before = {key: spark.conf.get(key, None) for key in SETTINGS}
    for key, value in SETTINGS.items():
        spark.conf.set(key, value)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)
