"""Teach an MLLM to write generation prompts (stage 1), or go on with a run that stopped.

    python scripts/train_stage1.py configs/stage1/toy.yaml
    torchrun --nproc_per_node 2 --shutdown_timeout 900 scripts/train_stage1.py configs/stage1/toy.yaml optim.lr=1e-4
    deepspeed scripts/train_stage1.py configs/stage1/toy.yaml run.deepspeed=configs/deepspeed/zero3.json
    python scripts/train_stage1.py configs/stage1/toy.yaml --dry-run

Ctrl-C or SIGTERM saves and stops; the same command goes on. Without --shutdown_timeout, torchrun kills its processes 30
s after a signal, and so does deepspeed, whose patience cannot be changed: a model that needs longer to save wants
torchrun, which starts ZeRO runs as well. `make stage1` sets the timeout.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with the state saved.
"""

import argparse
import os
import sys
from pathlib import Path

from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from llmga.nodes.settings import load_config_together
from llmga.problem import sentence_of
from llmga.stage1.config import Stage1Config


def main() -> int:
    """Read the settings, train, and say in one sentence what went wrong if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with the settings that differ from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings on top of the file's")
    parser.add_argument(
        "--dry-run", action="store_true", help="tell what would be done, as `llmga plan` does, and stop"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = parser.parse_intermixed_args()
    if options.dry_run:
        return _dry_run(options.config, options.overrides)
    cfg = load_config_together(Stage1Config, options.config, options.overrides)

    from llmga.nodes.meeting import MeetingError  # torch only now that the settings are sound
    from llmga.nodes.preflight import give_up
    from llmga.runtime import Interrupted, RunFailed, close_distributed
    from llmga.stage1.train import train

    try:
        train(cfg)
    except Interrupted as stop:
        code = _tell(sentence_of(stop), EXIT_INTERRUPTED)
    except RunFailed as failure:
        return _tell(sentence_of(failure), EXIT_FAILED)  # other ranks may be gone: leave without waiting for them
    except MeetingError as error:
        return give_up(error)
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise  # nothing that we foresaw
        return _tell(sentence_of(error), EXIT_BAD_INPUT)
    else:
        code = EXIT_OK
    close_distributed()
    return code


def _dry_run(config: Path, overrides: list[str]) -> int:
    """Print the plan for as many devices as the launcher started processes, once."""
    from llmga.stage1.plan.plan import Asked, make_plan
    from llmga.stage1.plan.text import plan_text

    if os.environ.get("RANK", "0") != "0":
        return EXIT_OK
    try:
        plan = make_plan(config, overrides, Asked(devices=int(os.environ.get("WORLD_SIZE", "1"))))
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise
        return _tell(sentence_of(error), EXIT_BAD_INPUT)
    print(plan_text(plan, colour=sys.stdout.isatty()), end="")
    return EXIT_OK


def _tell(message: str, code: int) -> int:
    """Print the sentence, once where all ranks would say it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or code == EXIT_BAD_INPUT:
        print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    code = main()
    from llmga.runtime import leave

    leave(code)
