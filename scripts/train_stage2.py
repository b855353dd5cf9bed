"""Teach Stable Diffusion to follow long prompts (stage 2), or go on with a run that stopped.

    python scripts/train_stage2.py configs/stage2/toy.yaml
    torchrun --nproc_per_node 2 --shutdown_timeout 900 scripts/train_stage2.py configs/stage2/toy.yaml optim.lr=1e-4
    python scripts/train_stage2.py configs/stage2/sd15_text_to_image.yaml --dry-run

Ctrl-C or SIGTERM saves and stops; the same command goes on. `make stage2` starts it on one device or many machines.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with the state saved.
"""

import os
from pathlib import Path
from typing import Any

from llmga.config import EXIT_BAD_INPUT, EXIT_OK, load_config
from llmga.problem import sentence_of
from llmga.recipe import recipe_parser, run_recipe, tell
from llmga.stage2.config import Stage2Config


def main() -> int:
    """Read the settings, train, and say in one sentence what went wrong if anything did."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tell what would be done, as `llmga plan` does")
    options = parser.parse_intermixed_args()
    if options.dry_run:
        return _show_plan(options.config, options.overrides)
    return run_recipe(Stage2Config, options, _train)


def _train(cfg: Stage2Config) -> Any:
    from llmga.stage2.train import train

    return train(cfg)


def _show_plan(config: Path, overrides: list[str]) -> int:
    """Print the plan for as many devices as the launcher started processes, once; nothing has to be here yet."""
    from llmga.stage2.plan import make_plan, plan_text

    if os.environ.get("RANK", "0") != "0":
        return EXIT_OK
    try:
        cfg = load_config(Stage2Config, config, overrides, check_machine=False)
        print(plan_text(make_plan(cfg, devices=int(os.environ.get("WORLD_SIZE", "1")))), end="")
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise
        return tell(sentence_of(error), EXIT_BAD_INPUT)
    return EXIT_OK


if __name__ == "__main__":
    code = main()
    from llmga.runtime import leave

    leave(code)
