"""Table 1: text to image, every system with short captions and with refined prompts.

    python eval/text_to_image.py configs/eval/text_to_image_toy.yaml
    torchrun --nproc_per_node 8 eval/text_to_image.py configs/eval/text_to_image_coco.yaml
    python eval/text_to_image.py my.yaml systems.1.pictures=runs/elsewhere     # pictures that are painted already
    python eval/text_to_image.py my.yaml --rank 3 --world-size 16              # processes started by hand

Below `out` it writes result.json (every number with its interval, and the protocol) and items.jsonl for each system
under each condition, then comparisons.json and table.md. Processes never wait for each other; the last one done writes
the results. Killed or stopped, the same command goes on.

Exit codes: 0 done, 1 failed, 2 bad input or settings, 130 interrupted with everything measured kept.
"""

import sys

from llmga.evaluation.command import run_evaluation
from llmga.evaluation.table_configs import TextToImageConfig

if __name__ == "__main__":
    sys.exit(run_evaluation(TextToImageConfig, __doc__, "text_to_image"))
