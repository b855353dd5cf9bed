"""`python -m llmga` and the `llmga` command."""

import sys

from llmga.cli import app


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="llmga")
    except SystemExit as end:
        if "llmga.runtime" not in sys.modules or not isinstance(end.code, int):
            raise  # nothing was joined, and nobody waits for torch to hear that
        from llmga.runtime import leave

        leave(end.code)


if __name__ == "__main__":
    main()
