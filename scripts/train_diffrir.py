"""Train a restorer phase after phase (DiffRIR), or go on with a training that stopped.

    python scripts/train_diffrir.py configs/diffrir/toy.yaml
    torchrun --nproc_per_node 8 --shutdown_timeout 900 scripts/train_diffrir.py configs/diffrir/x1.yaml run.seed=1

Each phase has a run folder of its own below run.output_dir; the last one's result is also in final/. Ctrl-C or SIGTERM
saves and stops; the same command goes on. `make diffrir` starts several processes.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with the state saved.
"""

import argparse
import os
import sys
from pathlib import Path

from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from llmga.diffrir.config import DiffRIRConfig
from llmga.nodes.settings import load_config_together
from llmga.problem import sentence_of


def main() -> int:
    """Read the settings, train, and say in one sentence what went wrong if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file with the settings that differ from the defaults")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings on top of the file's")
    options = parser.parse_intermixed_args()
    cfg = load_config_together(DiffRIRConfig, options.config, options.overrides)

    from llmga.diffrir.train import train  # torch only now that the settings are sound
    from llmga.nodes.meeting import MeetingError
    from llmga.nodes.preflight import give_up
    from llmga.runtime import Interrupted, RunFailed, close_distributed

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


def _tell(message: str, code: int) -> int:
    """Print the sentence, once where all ranks would say it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or code == EXIT_BAD_INPUT:
        print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
