"""Copies and removes whole roots, on a local disk or on object storage.

Input: paths or URIs of roots. Copies all files in one process, without Spark; on object storage the server copies.
Nobody may write to the roots meanwhile.
"""

import fnmatch
from collections.abc import Sequence

import fsspec

from miniplm_udf import storage


def copy_root(source: str, target: str, without: Sequence[str] = ()) -> None:
    """Copies the files of a root.

    Args:
        target: a root that does not exist yet.
        without: patterns of paths below the root; `*` matches slashes as well. Files that fit one are left out.
    """
    filesystem, path = fsspec.core.url_to_fs(source)
    filesystem.invalidate_cache()
    _, copy = fsspec.core.url_to_fs(target)
    # Hadoop marks an empty folder on S3 by an object whose name ends with a slash; s3fs can list it but not copy it.
    names = [file.removeprefix(f"{path}/") for file in filesystem.find(path) if not file.endswith("/")]
    for name in names:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in without):
            filesystem.makedirs(f"{copy}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.cp_file(f"{path}/{name}", f"{copy}/{name}")


def remove_root(root: str) -> None:
    """Removes a root; does nothing if there is none."""
    fsspec.core.url_to_fs(root)[0].invalidate_cache()
    storage.remove_folder(root)
