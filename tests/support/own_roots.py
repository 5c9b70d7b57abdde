"""The trainer's command on ranks that see different folders: `torchrun -m tests.support.own_roots FOLDER`.

Rank r runs `python -m trainer train` with `FOLDER/rank<r>/experiment.yaml`.
"""

import os
import sys

from trainer.__main__ import main

if __name__ == "__main__":
    folder = f"{sys.argv[1]}/rank{os.environ['RANK']}"
    uri = f"mlflow.tracking_uri=sqlite:///{folder}/root/mlflow.db"
    sys.exit(main(["train", "-c", f"{folder}/experiment.yaml", "--student", "small", uri]))
