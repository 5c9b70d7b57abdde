"""Reads the config of a command and checks it before anything runs: the config itself, and its files and places.

Input: the parsed options, and the stages of the command. Output: the config, with everything that is wrong on this
machine (`upkeep/preflight.py`); or one ConfigError that names what is wrong in the config and on the machine. Driver
only; starts no Spark and writes nothing.
"""

import argparse
from collections.abc import Callable, Sequence

from jobs.command import read_config
from miniplm_udf import object_storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.upkeep import preflight

StagesOf = Callable[[ExperimentConfig], Sequence[str]]


def read_checked(name: str, arguments: argparse.Namespace, stages_of: StagesOf) -> tuple[ExperimentConfig, list[str]]:
    """Reads a config and looks for everything that is wrong; logs what the command may start with.

    Args:
        name: name of the command, for messages.
        arguments: the parsed options of `add_config_arguments`.
        stages_of: returns the names of the stages that the command will run.

    Returns:
        The config; and what is wrong with it on this machine, which `require_none` refuses after a dry run has shown
        its plan.

    Raises:
        ConfigError: the config itself is wrong; the message also has the problems of its other keys on this machine.
    """
    try:
        config = read_config(name, arguments)
    except ConfigError as error:
        if error.rest is None:
            raise
        object_storage.use(error.rest.storage)
        problems = preflight.problems(error.rest, stages_of(error.rest))
        raise ConfigError.of_all([*error.problems, *problems], error.rest) from error
    stages = stages_of(config)
    problems = preflight.problems(config, stages)
    if not problems:
        preflight.warn(config, stages)
    return config, problems


def require_none(problems: Sequence[str]) -> None:
    """Refuses a command if something is wrong.

    Args:
        problems: the second result of `read_checked`.

    Raises:
        ConfigError: there are problems; the message has all of them.
    """
    if problems:
        raise ConfigError.of_all(problems)
