"""Virtual environments with the built wheel and single extras; their commands run in a folder outside the clone."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def uv(*words: str) -> None:
    """Runs uv."""
    subprocess.run(["uv", *words], check=True, timeout=1200, cwd=REPOSITORY, capture_output=True)


def build(folder: Path) -> tuple[Path, Path]:
    """Builds the source distribution, and the wheel from it; returns their paths."""
    uv("build", "--out-dir", str(folder), ".")
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


class Environment:
    """A virtual environment, whose commands run in a folder outside the clone."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Runs a program of the environment in `home`."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "JAVA_HOME") if name in os.environ}
        return subprocess.run(
            [str(self.folder / "bin" / words[0]), *words[1:]],
            cwd=self.home,
            env={**kept, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=900,
        )

    def output(self, *words: str) -> str:
        """The output of a program that must end with exit code 0."""
        done = self.run(*words)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout


@contextlib.contextmanager
def environment(folder: Path, package: Path, extras: str = "", python: str = "3.11") -> Iterator[Environment]:
    """An environment with a distribution file of miniplm and its extras; removed afterwards."""
    folder.mkdir()
    try:
        uv("venv", "--no-python-downloads", "--python", python, str(folder / "venv"))
        requirement = f"miniplm{f'[{extras}]' if extras else ''} @ {package.as_uri()}"
        uv("pip", "install", "--link-mode", "hardlink", "--python", str(folder / "venv" / "bin" / "python"),
           "-c", "constraints.txt", requirement)  # fmt: skip
        (folder / "home").mkdir()
        yield Environment(folder / "venv", folder / "home")
    finally:
        shutil.rmtree(folder)
