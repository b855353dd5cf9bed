"""`python -m llmga` and the `llmga` command."""

from llmga.cli import app


def main() -> None:
    """Run the command line."""
    app(prog_name="llmga")


if __name__ == "__main__":
    main()
