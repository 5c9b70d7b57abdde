"""The features that the proxy sees of a text: hashed words and pairs of words, and three numbers. Runs in the JVM.

    text -> words (lower case, each punctuation mark separate) -> words and pairs, present or not, hashed -> unit vector
         -> appended: ln of the bytes, words per byte, share of distinct words

All stages are Spark ML's own, and none is fitted, so a text has the same vector in any micro-batch on any machine.
Presence is used instead of counts, so that a ridge does not give all its weight to commas and articles. In scripts
without spaces between words, each character is a word. Owns no coefficient. Called on the driver.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Raised with every change of what `with_features` computes: a proxy that was fitted before is then fitted again.
VERSION = 1
_WITHOUT_SPACES = "".join(rf"\p{{Is{script}}}" for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer"))
# ASCII letters come first, because Java looks up the script of any other character in a table.
_WORD = rf"[a-z0-9_[\p{{L}}\p{{M}}\p{{N}}&&[^{_WITHOUT_SPACES}]]]+|\S"
_NUMBERS = ("ln_bytes", "words_per_byte", "different_words")


def with_features(rows: "DataFrame", n_features: int) -> "DataFrame":
    """Computes the features of texts.

    Args:
        rows: a frame with `text` and `n_bytes`, and any other columns.
        n_features: size of the table that words and pairs of words are hashed into.

    Returns:
        The rows without `text`, with `features`, a vector of n_features + 3 entries, and `n_grams`, the number of
        distinct words and pairs.
    """
    from pyspark.ml.feature import HashingTF, NGram, Normalizer, RegexTokenizer, VectorAssembler
    from pyspark.sql import functions as F

    kept = [name for name in rows.columns if name != "text"]
    words = RegexTokenizer(inputCol="text", outputCol="words", pattern=_WORD, gaps=False).transform(rows)
    pairs = NGram(n=2, inputCol="words", outputCol="pairs").transform(words)
    n_words, n_bytes = F.size("words"), F.greatest(F.lit(1), F.col("n_bytes"))
    described = pairs.withColumns(
        {
            "grams": F.concat("words", "pairs"),
            "ln_bytes": F.log(n_bytes.cast("double")),
            "words_per_byte": n_words / n_bytes,
            "different_words": F.size(F.array_distinct("words")) / F.greatest(F.lit(1), n_words),
        }
    )
    hashed = HashingTF(inputCol="grams", outputCol="hashed", numFeatures=n_features, binary=True).transform(described)
    unit = Normalizer(inputCol="hashed", outputCol="unit", p=2.0).transform(hashed)
    assembled = VectorAssembler(inputCols=["unit", *_NUMBERS], outputCol="features").transform(unit)
    return assembled.select(*kept, "features", F.size(F.array_distinct("grams")).alias("n_grams"))
