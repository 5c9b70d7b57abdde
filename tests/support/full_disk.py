"""A disk that takes no more than some bytes of a file."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writing more than `n_bytes` into a file fails, as on a full disk: the kernel refuses it half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
