"""Figure 5: the same picture asked for again and again in one conversation, with other talk between.

    python eval/turns.py configs/eval/turns_toy.yaml
    torchrun --nproc_per_node 8 eval/turns.py configs/eval/turns_coco.yaml

What it writes, processes and exit codes are as for eval/text_to_image.py, with an entry for each turn; comparisons are
slopes over the turns.
"""

import sys

from llmga.evaluation.command import run_evaluation
from llmga.evaluation.table_configs import TurnsConfig

if __name__ == "__main__":
    sys.exit(run_evaluation(TurnsConfig, __doc__, "turns"))
