"""Settings for a process that may be one of many: what only one machine lacks is told to the others.

Nothing here imports torch until there is something to tell.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from llmga.config import ConfigError, Schema, load_config, load_config_or_exit


def load_config_together(schema: type[Schema], path: Path | None, overrides: Sequence[str] = ()) -> Schema:
    """`load_config_or_exit`; a file or package that is missing here alone ends the run on the other machines as well.

    They would otherwise wait for this process, and not know why it did not come.
    """
    try:
        return load_config_or_exit(schema, path, overrides)
    except SystemExit:
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            _excuse(schema, path, overrides)
        raise


def _excuse(schema: type[Schema], path: Path | None, overrides: Sequence[str]) -> None:
    with contextlib.suppress(ConfigError):
        load_config(schema, path, overrides, check_machine=False)  # a mistake that all have they find by themselves
        try:
            load_config(schema, path, overrides)
        except ConfigError as error:
            from llmga.nodes.preflight import excuse

            excuse("; ".join(error.mistakes))
