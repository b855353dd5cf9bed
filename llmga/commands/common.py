"""What commands share: their first arguments, one clear message for what was foreseen, and a quiet stdout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

SHIPPED_MODELS = Path(__file__).parents[1] / "toyworld" / "checkpoints"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/stage1/toy.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as optim.lr=1e-5.")
]


@contextmanager
def one_clear_message() -> Iterator[None]:
    """What we foresaw is told on stderr without a traceback; exit codes as in `llmga.config`."""
    from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED

    # By name, because importing llmga.runtime here would import torch.
    codes = {
        "llmga.runtime.Interrupted": EXIT_INTERRUPTED,
        "llmga.runtime.RunFailed": EXIT_FAILED,
        "llmga.release.hub.HubError": EXIT_FAILED,
    }
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        name = f"{type(error).__module__}.{type(error).__name__}"
        ours = isinstance(error, ValueError) and name.startswith("llmga.")
        code = codes.get(name, EXIT_BAD_INPUT if ours else None)
        if code is None:
            raise
        from llmga.problem import sentence_of

        typer.echo(sentence_of(error), err=True)
        raise typer.Exit(code) from None


def log_to_stderr() -> None:
    """What the library tells on the way, as it is; reports alone go to stdout."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")


def quiet_libraries() -> None:
    """Keep stdout for the reply."""
    from transformers.utils.logging import disable_progress_bar

    import llmga.runtime  # noqa: F401 (tells DeepSpeed its device; accelerate would let it guess aloud)

    disable_progress_bar()


def newest_model() -> Path:
    """What `make stage1` made, else the shipped tuned model, else the shipped base model, which writes no tags."""
    candidates = (Path("runs/stage1_toy/final"), SHIPPED_MODELS / "tuned" / "mllm")
    return next((path for path in candidates if path.is_dir()), SHIPPED_MODELS / "base" / "mllm")


def newest_restorer() -> Path:
    """What `make diffrir` made, else the shipped toy restorer."""
    made = Path("runs/diffrir_toy/final")
    return made if made.is_dir() else SHIPPED_MODELS / "tuned" / "restorer"
