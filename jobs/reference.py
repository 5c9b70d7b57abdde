"""Trains the reference LM on the reference split, once, with the teacher's tokenizer; then it is frozen.

Reads `instances` (split = reference); writes `packed/reference/<alias>` and `<root>/models/<reference>`. The packing is
Spark's; the training is a process of its own. A reference that exists is left as it is, whatever came or changed.

    miniplm reference -c conf/demo.yaml [--retrain-reference] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/reference.py -c conf/demo.yaml
"""

import sys
from collections.abc import Sequence

from jobs import pipeline


def main(argv: Sequence[str] | None = None) -> int:
    return pipeline.main(argv, stage="reference")


if __name__ == "__main__":
    sys.exit(main())
