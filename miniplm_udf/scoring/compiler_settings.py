"""Settings of torch's compiler: the folder of its cache, and the number of its processes.

Input: environment variables of the user, which are kept, and this node's cache folder. Output: environment variables of
this process and of the processes that it starts. Executor side (and the trainer's evaluation).
"""

import os
import tempfile

import torch

from miniplm_udf import storage

# Compiling processes of torch. There are few functions to compile, and others need the cores too.
_MOST_PROCESSES = 4


def use_disk_cache() -> None:
    """Makes torch and Triton keep compiled code in this node's cache, unless their environment variables say where.

    Sets `TORCHINDUCTOR_CACHE_DIR` and `TRITON_CACHE_DIR`, which processes started from here inherit.
    """
    folder = storage.cache_folder().absolute() / "compiled" / f"torch-{torch.__version__}"
    # Torch sets the variable to its default, /tmp/torchinductor_USER, when transformers imports it.
    default = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default).startswith(default):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def limit_processes() -> None:
    """Lets torch start few compiling processes for this process, unless its environment variable says how many.

    torch's default is one for each core, up to 32, in each process that compiles. Sets `TORCHINDUCTOR_COMPILE_THREADS`,
    which processes started from here inherit.
    """
    from torch._inductor import config

    if "TORCHINDUCTOR_COMPILE_THREADS" in os.environ:
        return
    # torch has read the variable when it was imported.
    config.compile_threads = min(_MOST_PROCESSES, config.compile_threads or _MOST_PROCESSES)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(config.compile_threads)
