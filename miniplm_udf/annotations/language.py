"""The language of a text, by py3langid, whose package contains its model. Runs on executors.

Input: a frame with `text`; output: the frame with `language` (ISO 639 code) and `language_confidence` (0 to 1, from
py3langid). A Python worker loads the model once.
Source: Lui and Baldwin, langid.py, ACL 2012.
"""

import functools
from typing import TYPE_CHECKING, Any

from miniplm_udf.workers.ddl import schema_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

_COLUMNS = ("language", "language_confidence")
_LANGUAGE_DDL = "language string, language_confidence double"


def with_language(rows: "DataFrame") -> "DataFrame":
    """Returns the rows with `language` and `language_confidence` of the column `text`.

    Args:
        rows: a frame with `text`.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    identified = arrow_udf(languages, _LANGUAGE_DDL, ArrowUDFType.SCALAR)(F.col("text"))
    named = rows.withColumn("_identified", identified)
    return named.withColumns({name: F.col(f"_identified.{name}") for name in _COLUMNS}).drop("_identified")


def languages(texts: "pa.Array") -> "pa.Array":
    """Identifies the language of each text.

    Args:
        texts: string array.

    Returns:
        A struct with the fields of _LANGUAGE_DDL per text.
    """
    import pyarrow as pa

    identifier = _identifier()
    results = [identifier.classify(text) for text in texts.to_pylist()]
    rows = [{"language": language, "language_confidence": float(confidence)} for language, confidence in results]
    return pa.array(rows, pa.struct(list(schema_of(_LANGUAGE_DDL))))


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
