"""The file that `miniplm init` writes runs to its end without an edit: odd field names, an own teacher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import make_model_folder
from tests.support.user_corpus import make_documents

DOCUMENTS = 150


@pytest.mark.long
def test_the_written_config_runs_to_its_end(tmp_path: Path) -> None:
    teacher = make_model_folder(tmp_path, "qwen2", name="teacher")
    rows = [{"body": d["text"], "meta": json.dumps({"set": d["source"]})} for d in make_documents(DOCUMENTS, seed=8)]
    texts = tmp_path / "my texts" / "a.jsonl"
    texts.parent.mkdir()
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def miniplm(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
        command = [sys.executable, "-m", "jobs.cli", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert miniplm("init", "--input", "my texts", "--teacher", str(teacher), "--root", "root").returncode == 0
    done = miniplm("run", "-c", "experiment.yaml")
    assert done.returncode == 0, done.stderr[-6000:]
    summary: dict[str, Any] = json.loads((tmp_path / "root" / "summary.json").read_text())
    assert summary["rejected"] == 0
    assert summary["kept"]["difference"] > 0
    assert set(summary["students"]) == {"llama_difference", "llama_random", "qwen2_difference", "qwen2_random"}
