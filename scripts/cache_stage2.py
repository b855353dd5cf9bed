"""Make the latents of a stage-2 config once, so that training need not; or mend a cache that is not whole.

    python scripts/cache_stage2.py configs/stage2/sd15_text_to_image.yaml cache.path=data/cache
    torchrun --nproc_per_node 8 scripts/cache_stage2.py configs/stage2/sd15_text_to_image.yaml cache.path=data/cache
    python scripts/cache_stage2.py configs/stage2/sd15_text_to_image.yaml cache.path=data/cache --dry-run

Each process makes its own shards and waits for nobody; any number may be started, killed and started again. What is
whole is kept, what is damaged or made from pictures that have changed since is made again.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with whole shards kept.
"""

import sys
from functools import partial
from typing import Any

from llmga.config import load_config
from llmga.recipe import print_plan, recipe_parser, run_recipe
from llmga.stage2.config import Stage2Config


def main() -> int:
    """Read the settings, make this process's share, and say in one sentence what went wrong if anything did."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--anew", action="store_true", help="forget a cache that was made with other settings")
    options = parser.parse_intermixed_args()
    if options.dry_run:
        return print_plan(lambda: _plan(options))
    return run_recipe(Stage2Config, options, partial(_make, anew=options.anew))


def _make(cfg: Stage2Config, anew: bool) -> Any:
    from llmga.runtime import ranks_from_environment, setup_logging
    from llmga.stage2.make_cache import make_cache

    ranks = ranks_from_environment()
    setup_logging(ranks)
    return make_cache(cfg, ranks, anew)


def _plan(options: Any) -> str:
    from llmga.stage2.plan_cache import plan_cache, plan_text

    cfg = load_config(Stage2Config, options.config, options.overrides, check_machine=False)
    return plan_text(plan_cache(cfg, options.anew))


if __name__ == "__main__":
    sys.exit(main())
