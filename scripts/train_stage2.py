"""Teach Stable Diffusion to follow long prompts (stage 2), or go on with a run that stopped.

    python scripts/train_stage2.py configs/stage2/toy.yaml
    torchrun --nproc_per_node 2 --shutdown_timeout 900 scripts/train_stage2.py configs/stage2/toy.yaml optim.lr=1e-4
    python scripts/train_stage2.py configs/stage2/sd15_text_to_image.yaml --dry-run

Ctrl-C or SIGTERM saves and stops; the same command goes on. `make stage2` starts it on one device or many machines.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with the state saved.
"""

from typing import Any

from llmga.config import load_config
from llmga.recipe import launched_devices, print_plan, recipe_parser, run_recipe
from llmga.stage2.config import Stage2Config


def main() -> int:
    """Read the settings, train, and say in one sentence what went wrong if anything did."""
    options = recipe_parser(__doc__).parse_intermixed_args()
    if options.dry_run:
        return print_plan(lambda: _plan(options))
    return run_recipe(Stage2Config, options, _train)


def _train(cfg: Stage2Config) -> Any:
    from llmga.stage2.train import train

    return train(cfg)


def _plan(options: Any) -> str:
    """For as many devices as the launcher started processes; nothing has to be here yet."""
    from llmga.stage2.plan import make_plan, plan_text

    cfg = load_config(Stage2Config, options.config, options.overrides, check_machine=False)
    return plan_text(make_plan(cfg, launched_devices()))


if __name__ == "__main__":
    code = main()
    from llmga.runtime import leave

    leave(code)
