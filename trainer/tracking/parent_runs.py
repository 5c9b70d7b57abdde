"""Parent runs: a run of a chosen name that groups the runs of several models, a sweep for example.

Input: MLflow's client and the name. Processes that start at the same time agree on one parent, at the latest when their
runs end: the oldest run of this name that is not itself a child. A parent has no parameters and no metrics. Its status
follows from its children.
"""

from typing import Any

_PARENT_TAG = "mlflow.parentRunId"
# Not every store keeps a run's start in more than milliseconds; the id decides between equal times.
_ORDER = ["attributes.start_time ASC", "attributes.run_id ASC"]


def find_or_create(client: Any, experiment_id: str, name: str) -> str:
    """Returns the id of the parent run of a name, which is created if there is none; its status becomes RUNNING.

    Args:
        client: an `MlflowClient`.
        experiment_id: the experiment that has the parent.
        name: name of the run.
    """
    parent = _oldest(client, experiment_id, name)
    if parent is None:
        mine = client.create_run(experiment_id, run_name=name).info.run_id
        # Another process may have created a parent run at the same time.
        parent = _oldest(client, experiment_id, name) or mine
        if parent != mine:
            client.delete_run(mine)
    client.update_run(parent, status="RUNNING")
    return str(parent)


def tag(parent: str) -> dict[str, str]:
    """Returns the tag that makes a run a child.

    Args:
        parent: id of the parent run.
    """
    return {_PARENT_TAG: parent}


def agree(client: Any, experiment_id: str, name: str, parent: str, child: str) -> str:
    """Returns the id of the oldest parent run of a name, and moves the child there if it has another parent.

    A store has no call that creates a run only if its name is free. So two processes that start at the same time can
    each create a parent run. When a child ends, both parent runs exist and the oldest one is kept.

    Args:
        client: an `MlflowClient`.
        experiment_id: the experiment that has the runs.
        name: name of the parent run.
        parent: id of the parent that the child has.
        child: id of the child.
    """
    oldest = _oldest(client, experiment_id, name) or parent
    if oldest != parent:
        client.set_tag(child, _PARENT_TAG, oldest)
        if not _children(client, experiment_id, parent):
            client.delete_run(parent)
    return oldest


def end(client: Any, experiment_id: str, parent: str) -> None:
    """Ends a parent run, unless a child is running: FINISHED if every child is, otherwise with a child's status.

    Args:
        client: an `MlflowClient`.
        experiment_id: the experiment that has the runs.
        parent: id of the parent run.
    """
    statuses = {child.info.status for child in _children(client, experiment_id, parent)}
    status = next((each for each in ("RUNNING", "FAILED", "KILLED") if each in statuses), "FINISHED")
    if status != "RUNNING":
        client.set_terminated(parent, status)


def _children(client: Any, experiment_id: str, parent: str) -> list[Any]:
    return list(client.search_runs([experiment_id], f"tags.`{_PARENT_TAG}` = '{parent}'"))


def _oldest(client: Any, experiment_id: str, name: str) -> str | None:
    """The id of the oldest run of this name that is no child; None if there is none."""
    for run in client.search_runs([experiment_id], f"attributes.run_name = '{name}'", order_by=_ORDER):
        if _PARENT_TAG not in run.data.tags:
            return str(run.info.run_id)
    return None
