"""Table 2: edited pictures against their targets, beside the copied input.

    python eval/editing.py configs/eval/editing_magicbrush.yaml
    python eval/editing.py configs/eval/editing_magicbrush.yaml magicbrush.turns=multi
    python eval/editing.py configs/eval/editing_toy.yaml systems.0.pictures=runs/edits

It takes folders of results. What it writes, processes and exit codes are as for eval/text_to_image.py.
"""

import sys

from llmga.evaluation.command import run_evaluation
from llmga.evaluation.table_configs import EditingConfig

if __name__ == "__main__":
    sys.exit(run_evaluation(EditingConfig, __doc__, "editing"))
