"""The language of a text, by py3langid (its model comes in the package), on executors.

Input: a frame with `text`; output: `language` (an ISO 639 code) and `language_confidence` (of 0 to 1, the package's
own) beside. A Python worker loads the model once.
Source: Lui and Baldwin, langid.py, ACL 2012.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame


def with_language(rows: "DataFrame") -> "DataFrame":
    """The rows with the languages of their texts."""
    from pyspark.sql import functions as F
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    ddl = "struct<language: string, language_confidence: double>"
    found = arrow_udf(languages, ddl, ArrowUDFType.SCALAR)(F.col("text"))
    named = rows.withColumn("_found", found)
    return named.withColumns({name: F.col(f"_found.{name}") for name in ("language", "language_confidence")}).drop(
        "_found"
    )


def languages(texts: "pa.Array") -> "pa.Array":
    """Language and confidence of each text."""
    import pyarrow as pa

    identifier = _identifier()
    found = [identifier.classify(text) for text in texts.to_pylist()]
    columns = [
        pa.array([language for language, _ in found], pa.string()),
        pa.array([float(confidence) for _, confidence in found], pa.float64()),
    ]
    return pa.StructArray.from_arrays(columns, names=["language", "language_confidence"])


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
