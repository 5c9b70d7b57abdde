"""What the proxy sees of a text: hashed words and pairs of words, and three numbers. Driver; it runs in the JVM.

    text -> words (lower case, marks one by one) -> words and pairs, present or not, hashed -> vector of length 1
         -> beside it: ln of the bytes, words a byte, share of different words

All stages are Spark ML's own, and none is fitted: a text has the same vector in any micro-batch, on any machine, ever.
Presence in place of counts, so that a ridge does not give all its weight to commas and articles. Owns no coefficient.
Scripts without spaces between words are taken sign by sign.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# Raised with every change of what `with_features` makes: a proxy that was fitted before is then fitted anew.
VERSION = 1
_WITHOUT_SPACES = "".join(rf"\p{{Is{script}}}" for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer"))
# Plain letters first: Java looks a sign's script up in a table.
_WORD = rf"[a-z0-9_[\p{{L}}\p{{M}}\p{{N}}&&[^{_WITHOUT_SPACES}]]]+|\S"
_NUMBERS = ("ln_bytes", "words_per_byte", "different_words")


def with_features(rows: "DataFrame", n_features: int) -> "DataFrame":
    """The rows with `features`, a vector, and `n_grams`, how many different words and pairs they are made of.

    Args:
        rows: with `text` and `n_bytes`, and whatever else; `text` is left out.
        n_features: words and pairs of words are hashed to so many entries.
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
    made = VectorAssembler(inputCols=["unit", *_NUMBERS], outputCol="features").transform(unit)
    return made.select(*kept, "features", F.size(F.array_distinct("grams")).alias("n_grams"))
