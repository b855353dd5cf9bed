"""Have an MLLM write the generation prompt of every row of a manifest, once; stage 2 trains on them.

    python scripts/record_prompts.py configs/record/toy.yaml
    torchrun --nproc_per_node 8 scripts/record_prompts.py configs/record/laion.yaml
    srun python scripts/record_prompts.py configs/record/laion.yaml          # any number of nodes
    python scripts/record_prompts.py my.yaml --rank 3 --world-size 16        # or started by hand, at any time
    python scripts/record_prompts.py my.yaml --merge                         # put together what is recorded
    python scripts/record_prompts.py my.yaml --dry-run                       # tell what is left to record, and stop

Processes never wait for each other; the last one done merges. Killed or stopped, the same command goes on, with any
number of processes. Exit codes: 0 done, 2 bad input or settings, 130 interrupted with everything recorded kept.
"""

import argparse
import os
import sys

from llmga.config import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_OK, load_config, load_config_or_exit
from llmga.problem import sentence_of
from llmga.recipe import print_plan, recipe_parser
from llmga.stage1.record.config import RecordConfig


def main() -> int:
    """Read the settings, record, and say in one sentence what went wrong if anything did."""
    parser = recipe_parser(__doc__)
    parser.add_argument("--rank", type=int, help="number of this process, from 0; by default the launcher's")
    parser.add_argument("--world-size", type=int, help="how many processes there are")
    parser.add_argument("--merge", action="store_true", help="record nothing, write the manifest of what is there")
    options = parser.parse_intermixed_args()
    if (options.rank is None) != (options.world_size is None):
        parser.error("--rank and --world-size go together")
    if options.rank is not None and not 0 <= options.rank < options.world_size:
        parser.error(f"--rank is {options.rank}, expected 0 to {options.world_size - 1}, one less than --world-size")
    if options.dry_run:
        return print_plan(lambda: _plan(options))
    cfg = load_config_or_exit(RecordConfig, options.config, options.overrides)
    return _record(cfg, options)


def _record(cfg: RecordConfig, options: argparse.Namespace) -> int:
    import torch  # only now that the settings are sound

    from llmga.runtime import Interrupted, Ranks, ranks_from_environment, setup_logging
    from llmga.stage1.record.merge import merge_parts
    from llmga.stage1.record.run import record_prompts
    from llmga.stage1.sources import Source

    ranks = ranks_from_environment()
    if options.rank is not None:
        ranks = Ranks(options.rank, int(os.environ.get("LOCAL_RANK", 0)), options.world_size)
    setup_logging(Ranks())
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    try:
        merged = merge_parts(cfg, Source(cfg.source)) if options.merge else record_prompts(cfg, ranks)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        if not type(error).__module__.startswith("llmga."):
            raise  # nothing that we foresaw
        print(sentence_of(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    if merged is not None:
        print(merged)
    return EXIT_OK


def _plan(options: argparse.Namespace) -> str:
    from llmga.stage1.record.plan import make_plan, plan_text

    return plan_text(make_plan(load_config(RecordConfig, options.config, options.overrides, check_machine=False)))


if __name__ == "__main__":
    sys.exit(main())
