"""The code's revision is the checkout's revision, where there is a checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

import miniplm_udf
from miniplm_udf import __version__

PACKAGE = Path(miniplm_udf.__file__).parent


def revision(folder: Path) -> str:
    code = "from miniplm_udf.revision import code_revision; print(code_revision())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.strip()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_checkout_names_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    copied = tmp_path / "miniplm_udf"
    copied.mkdir()
    for name in ("__init__.py", "revision.py"):
        shutil.copy(PACKAGE / name, copied)
    assert revision(tmp_path) == __version__
    git(tmp_path, "init", "-q")
    assert revision(tmp_path) == __version__
    git(tmp_path, "add", "miniplm_udf/__init__.py", "miniplm_udf/revision.py")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert revision(tmp_path) == f"{__version__}+g{commit}"
    with (copied / "revision.py").open("a") as file:
        file.write("# changed\n")
    assert revision(tmp_path) == f"{__version__}+g{commit}.dirty"
