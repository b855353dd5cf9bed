"""Build toy data: pictures and manifests with exact truth, and a page to look at them. The same as `llmga world`.

    python data_tools/build_world.py --out data/toy                       # what `make stage1` trains on
    python data_tools/build_world.py --out data/base --kind base --rows 36000
    python data_tools/build_world.py --out data/dense --preset dense --seed 1

Writes train.jsonl, validation.jsonl, test.jsonl, pictures/, world.json and index.html. A folder that holds exactly
this data already is left as it is; exit code 2 when it holds anything else.
"""

import sys
from collections.abc import Sequence

from llmga.cli import app


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        app(["world", *(sys.argv[1:] if argv is None else argv)], prog_name="llmga")
    except SystemExit as done:
        return int(done.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
