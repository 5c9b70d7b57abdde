"""The language of a text, by py3langid, whose package contains its model. Runs on executors.

Input: a frame with `text`; output: the frame with `language` (ISO 639 code) and `language_confidence` (0 to 1, from
py3langid). A Python worker loads the model once.
Source: Lui and Baldwin, langid.py, ACL 2012.
"""

import functools
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from miniplm_udf.workers.messages import ddl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_LANGUAGE_SCHEMA = pa.schema([("language", pa.string()), ("language_confidence", pa.float64())])


def with_language(rows: "DataFrame") -> "DataFrame":
    """Returns the rows with `language` and `language_confidence` of the column `text`.

    Args:
        rows: a frame with `text`.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    identified = arrow_udf(languages, ddl(_LANGUAGE_SCHEMA), ArrowUDFType.SCALAR)(F.col("text"))
    named = rows.withColumn("_identified", identified)
    return named.withColumns({name: F.col(f"_identified.{name}") for name in _LANGUAGE_SCHEMA.names}).drop(
        "_identified"
    )


def languages(texts: pa.Array) -> pa.Array:
    """Identifies the language of each text.

    Args:
        texts: string array.

    Returns:
        A struct with the fields of _LANGUAGE_SCHEMA per text.
    """
    identifier = _identifier()
    results = [identifier.classify(text) for text in texts.to_pylist()]
    rows = [{"language": language, "language_confidence": float(confidence)} for language, confidence in results]
    return pa.array(rows, pa.struct(list(_LANGUAGE_SCHEMA)))


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
