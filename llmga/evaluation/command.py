"""What the scripts in eval/ start: settings from the command line, one of any number of processes, an exit code."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, load_config_or_exit
from llmga.problem import sentence_of
from llmga.recipe import tell


def run_evaluation(schema: type[Any], description: str | None, name: str) -> int:
    """Read the settings, evaluate, print the table, and say in one sentence what went wrong if anything did.

    Args:
        schema: of the settings.
        description: for --help.
        name: of a module beside this one, whose `evaluate_<name>` takes the settings and this process's `Ranks`, and
            gives the table, or None where other processes still have work to do.
    Returns:
        The exit code: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with everything measured kept.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with the settings that differ from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings on top of the file's")
    parser.add_argument("--rank", type=int, help="number of this process, from 0; by default the launcher's")
    parser.add_argument("--world-size", type=int, help="how many processes there are")
    parser.add_argument(
        "--publish", type=Path, metavar="FOLDER", help="copy table and documents there when all is done"
    )
    options = parser.parse_intermixed_args()
    if (options.rank is None) != (options.world_size is None):
        parser.error("--rank and --world-size go together")
    if options.rank is not None and not 0 <= options.rank < options.world_size:
        parser.error(f"--rank is {options.rank}, expected 0 to {options.world_size - 1}, one less than --world-size")
    config = load_config_or_exit(schema, options.config, options.overrides)
    return _evaluate(config, options, name)


def _evaluate(config: Any, options: argparse.Namespace, name: str) -> int:
    from llmga.evaluation.documents import publish
    from llmga.runtime import Interrupted, Ranks, RunFailed, ranks_from_environment, setup_logging

    ranks = ranks_from_environment()
    if options.rank is not None:
        ranks = Ranks(options.rank, int(os.environ.get("LOCAL_RANK", 0)), options.world_size)
    setup_logging(ranks)
    evaluate = getattr(import_module(f"llmga.evaluation.{name}"), f"evaluate_{name}")  # torch only for sound settings
    try:
        table = evaluate(config, ranks)
    except Interrupted as stop:
        return tell(sentence_of(stop), EXIT_INTERRUPTED)
    except RunFailed as failure:
        return tell(sentence_of(failure), EXIT_FAILED)
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise  # nothing that we foresaw
        return tell(sentence_of(error), EXIT_BAD_INPUT)
    if options.publish is not None and table is not None:
        publish(config.out, options.publish)
    others = f"rank {ranks.rank} of {ranks.world_size} is done; others still paint or measure"
    sys.stdout.write((others if table is None else table) + "\n")
    return EXIT_OK
