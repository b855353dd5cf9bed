"""Train a restorer phase after phase (DiffRIR), or go on with a training that stopped.

    python scripts/train_diffrir.py configs/diffrir/toy.yaml
    torchrun --nproc_per_node 8 --shutdown_timeout 900 scripts/train_diffrir.py configs/diffrir/x1.yaml run.seed=1
    python scripts/train_diffrir.py configs/diffrir/x1.yaml --dry-run

Each phase has a run folder of its own below run.output_dir; the last one's result is also in final/. Ctrl-C or SIGTERM
saves and stops; the same command goes on. `make diffrir` starts several processes.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with the state saved.
"""

from typing import Any

from llmga.config import load_config
from llmga.diffrir.config import DiffRIRConfig
from llmga.recipe import launched_devices, print_plan, recipe_parser, run_recipe


def main() -> int:
    """Read the settings, train, and say in one sentence what went wrong if anything did."""
    options = recipe_parser(__doc__).parse_intermixed_args()
    if options.dry_run:
        return print_plan(lambda: _plan(options))
    return run_recipe(DiffRIRConfig, options, _train)


def _train(cfg: DiffRIRConfig) -> Any:
    from llmga.diffrir.train import train  # torch only now that the settings are sound

    return train(cfg)


def _plan(options: Any) -> str:
    """For as many devices as the launcher started processes; nothing has to be here yet."""
    from llmga.diffrir.plan import make_plan, plan_text

    cfg = load_config(DiffRIRConfig, options.config, options.overrides, check_machine=False)
    return plan_text(make_plan(cfg, launched_devices()))


if __name__ == "__main__":
    code = main()
    from llmga.runtime import leave

    leave(code)
