"""Table 3: in- and outpainting, narrow and wide, without a prompt, with an inferred one, or with the true one.

    python eval/painting.py configs/eval/painting_toy.yaml
    torchrun --nproc_per_node 8 eval/painting.py configs/eval/painting_places.yaml

The first run cuts the pictures and draws the masks below out/inputs, for `make record` and for whoever paints
elsewhere; then it says what is missing. What it writes, processes and exit codes are as for eval/text_to_image.py, with
a folder for each kind of hole.
"""

import sys

from llmga.evaluation.command import run_evaluation
from llmga.evaluation.table_configs import PaintingConfig

if __name__ == "__main__":
    sys.exit(run_evaluation(PaintingConfig, __doc__, "painting"))
