"""What a launcher starts: settings from the command line, then the work, then an exit code and one sentence.

With --dry-run a recipe tells what it would do instead. Nothing here imports torch until the settings are known to be
sound.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, dump_config
from llmga.nodes.settings import load_config_together
from llmga.problem import sentence_of


def recipe_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every recipe has: a config, overrides, and whether only to tell what would be done."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with the settings that differ from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings on top of the file's")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def run_recipe(schema: type[Any], options: argparse.Namespace, work: Callable[[Any], object]) -> int:
    """Read the settings, work, and turn what went wrong into one sentence.

    Args:
        schema: of the settings.
        options: with `config` and `overrides`.
        work: is given the settings; it imports what is heavy itself.
    Returns:
        The exit code: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with the state saved.
    """
    cfg = load_config_together(schema, options.config, options.overrides)
    return exit_code_of(lambda: work(cfg))


def exit_code_of(work: Callable[[], object]) -> int:
    """Work with settings that are known to be sound, and turn what went wrong into one sentence.

    Returns:
        The exit code, as `run_recipe`.
    """
    from llmga.nodes.meeting import MeetingError
    from llmga.nodes.preflight import give_up
    from llmga.runtime import Interrupted, RunFailed, close_distributed

    try:
        work()
    except Interrupted as stop:
        code = tell(sentence_of(stop), EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        code = tell("interrupted; the same command goes on with what is done", EXIT_INTERRUPTED)
    except RunFailed as failure:
        return tell(sentence_of(failure), EXIT_FAILED)  # other ranks may be gone: leave without waiting for them
    except MeetingError as error:
        return give_up(error)
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise  # nothing that we foresaw
        return tell(sentence_of(error), EXIT_BAD_INPUT)
    else:
        code = EXIT_OK
    close_distributed()
    return code


def print_plan(plan: Callable[[], str]) -> int:
    """Print what a recipe would do, on the first of the launcher's processes.

    Args:
        plan: makes the text; it imports what is heavy itself.
    Returns:
        The exit code: 0 done, 2 bad input or settings.
    """
    if os.environ.get("RANK", "0") != "0":
        return EXIT_OK
    try:
        sys.stdout.write(plan())
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise  # nothing that we foresaw
        return tell(sentence_of(error), EXIT_BAD_INPUT)
    return EXIT_OK


def launched_devices() -> int:
    """As many as the launcher started processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan_page(cfg: Any, sections: Mapping[str, Sequence[str]], end: str) -> str:
    """A plan as text for a terminal: all settings, then the sections that have lines, then one line at the end."""
    settings = yaml.safe_dump(dump_config(cfg), sort_keys=False, allow_unicode=True).splitlines()
    told = {title: lines for title, lines in ({"settings": settings} | dict(sections)).items() if lines}
    parts = ["\n".join([f"== {title}", *lines]) for title, lines in told.items()]
    return "\n\n".join([*parts, end]) + "\n"


def tell(message: str, code: int) -> int:
    """Print a sentence, once where all ranks would say it, and give the code back."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or code == EXIT_BAD_INPUT:
        sys.stderr.write((message if rank == "0" else f"[rank {rank}] {message}") + "\n")
    return code
