"""Commands for people. Every heavy import waits until its command runs, so `--help` answers at once."""

import typer

from llmga.commands import data, runs, use, weights
from llmga.commands.common import SHIPPED_MODELS, newest_model

__all__ = ["SHIPPED_MODELS", "app", "newest_model"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes as long to import as all else
    context_settings={"max_content_width": 120},
)


@app.callback()
def llmga() -> None:
    """Train and use an LLMGA: a multimodal LLM that writes generation prompts."""


for _command in (
    runs.stage1,
    runs.stage2,
    runs.plan,
    runs.preflight,
    runs.preview,
    data.world,
    data.check,
    use.ask,
    use.sample,
    use.restore,
    weights.merge,
    weights.convert,
    weights.release,
    weights.pull,
):
    app.command()(_command)
app.command("config")(runs.show_config)
