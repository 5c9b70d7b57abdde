"""Threads that put one file under a condition at the same time, of which one may succeed."""

import threading

from miniplm_udf import conditional_files


def winners(uri: str, tag: str | None, n_takers: int) -> int:
    """The number of threads whose put succeeded.

    Args:
        uri: the file.
        tag: the tag of the file that they replace; None: they create it.
        n_takers: number of threads.
    """
    barrier, tags = threading.Barrier(n_takers), []

    def take(number: int) -> None:
        barrier.wait()
        text = f"taker {number} after {tag}"
        tags.append(conditional_files.create(uri, text) if tag is None else conditional_files.replace(uri, text, tag))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(n_takers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tags) == n_takers
    return sum(tag is not None for tag in tags)
