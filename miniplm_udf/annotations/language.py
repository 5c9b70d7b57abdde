"""The language of a text, by py3langid, whose package contains its model. Runs on executors.

Input: a frame with `text`; output: the frame with `language` (ISO 639 code) and `language_confidence` (0 to 1, from
py3langid). A Python worker loads the model once.
Source: Lui and Baldwin, langid.py, ACL 2012.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame


def with_language(rows: "DataFrame") -> "DataFrame":
    """Returns the rows with `language` and `language_confidence` of the column `text`.

    Args:
        rows: a frame with `text`.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    ddl = "struct<language: string, language_confidence: double>"
    identified = arrow_udf(languages, ddl, ArrowUDFType.SCALAR)(F.col("text"))
    named = rows.withColumn("_identified", identified)
    return named.withColumns({name: F.col(f"_identified.{name}") for name in ("language", "language_confidence")}).drop(
        "_identified"
    )


def languages(texts: "pa.Array") -> "pa.Array":
    """Identifies the language of each text.

    Args:
        texts: string array.

    Returns:
        struct<language: string, language_confidence: double>, one per text.
    """
    import pyarrow as pa

    identifier = _identifier()
    results = [identifier.classify(text) for text in texts.to_pylist()]
    columns = [
        pa.array([language for language, _ in results], pa.string()),
        pa.array([float(confidence) for _, confidence in results], pa.float64()),
    ]
    return pa.StructArray.from_arrays(columns, names=["language", "language_confidence"])


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
