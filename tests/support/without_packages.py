"""A Python process that cannot import the packages of the extras, as where only the base install is."""

import configparser
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_BLOCK = """
import sys

class Filtered:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Filtered(finder) for finder in sys.meta_path]
"""


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(*names: str) -> set[str]:
    """Names of the installed distributions that these need, directly or through others; without extras."""
    needed: set[str] = set()
    left = list(names)
    while left:
        name = _canonical(left.pop())
        if name in needed:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needed.add(name)
        left += [_distribution(line) for line in requirements if "extra ==" not in line]
    return needed


def _distribution(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def base_distributions() -> set[str]:
    """The distributions of the base install: what setup.cfg requires without an extra, and what these require."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    return installed_with(*(_distribution(line) for line in lines if line.strip()))


def modules_of_extras() -> set[str]:
    """The top-level modules that are installed here, and would not be by the base install."""
    kept = base_distributions() | {"miniplm"}
    installed = metadata.packages_distributions()
    return {module for module, names in installed.items() if not kept & {_canonical(name) for name in names}}


def run_without(modules: set[str], program: str, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs a program in a process that cannot import some modules.

    Args:
        modules: names of top-level modules.
        program: Python code.
        folder: the folder that it runs in.
        arguments: `sys.argv[1:]` of the program.
    """
    return subprocess.run(
        [sys.executable, "-c", _BLOCK.format(names=modules) + program, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
