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

import sys
from pathlib import Path
from typing import Any

from llmga.recipe import launched_devices, print_plan, recipe_parser, run_recipe
from llmga.stage1.config import Stage1Config


def main() -> int:
    """Read the settings, train, and say in one sentence what went wrong if anything did."""
    options = recipe_parser(__doc__).parse_intermixed_args()
    if options.dry_run:
        return print_plan(lambda: _plan(options))
    return run_recipe(Stage1Config, options, _train)


def _train(cfg: Stage1Config) -> Path:
    from llmga.stage1.train import train  # torch only now that the settings are sound

    return train(cfg)


def _plan(options: Any) -> str:
    """For as many devices as the launcher started processes; nothing has to be here yet."""
    from llmga.stage1.plan.plan import Asked, make_plan
    from llmga.stage1.plan.text import plan_text

    plan = make_plan(options.config, options.overrides, Asked(devices=launched_devices()))
    return plan_text(plan, colour=sys.stdout.isatty())


if __name__ == "__main__":
    code = main()
    from llmga.runtime import leave

    leave(code)
