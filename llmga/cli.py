"""Commands for people. Every heavy import waits until its command runs, so `--help` answers at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

SHIPPED_MODELS = Path(__file__).parent / "toyworld" / "checkpoints"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/stage1/toy.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as optim.lr=1e-5.")
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def llmga() -> None:
    """Train and use an LLMGA: a multimodal LLM that writes generation prompts."""


@app.command()
def stage1(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train the MLLM on one machine and one device; `make stage1` starts several."""
    with _one_clear_message():
        settings = _stage1_settings(config, overrides)
        from llmga.runtime import close_distributed
        from llmga.stage1.train import train

        typer.echo(f"finished: {train(settings)}")
        close_distributed()


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("runs/preview.html"),
) -> None:
    """Write a page of the examples a config trains on: picture, mask, and which tokens are trained."""
    with _one_clear_message():
        settings = _stage1_settings(config, overrides)
        from llmga.stage1.preview import write_preview

        write_preview(settings, out)
        typer.echo(f"open {out}")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the work.")] = 1,
    card: Annotated[str | None, typer.Option(help="Which, such as A100-80GB; else the one of this machine.")] = None,
    tokens_per_s: Annotated[float | None, typer.Option(min=1.0, help="Throughput of all devices, if known.")] = None,
    like: Annotated[Path | None, typer.Option(help="Folder of a former run of this shape; its throughput.")] = None,
    share_of_peak: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Of the card's bf16 peak.")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="In the run, where its data are not here.")] = None,
) -> None:
    """Tell what a run will do, need and cost, and show its first batch, without running it."""
    with _one_clear_message():
        _quiet_libraries()
        from llmga.stage1.plan.plan import Asked, make_plan
        from llmga.stage1.plan.text import plan_text

        asked = Asked(devices, card, tokens_per_s, like, share_of_peak, examples)
        typer.echo(plan_text(make_plan(config, overrides or [], asked), colour=sys.stdout.isatty()), nl=False)


@app.command("config")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every setting a config resolves to, defaults and overrides included."""
    with _one_clear_message():
        import yaml

        from llmga.config import dump_config, load_config
        from llmga.stage1.config import Stage1Config

        settings = load_config(Stage1Config, config, overrides or (), check_machine=False)
        typer.echo(yaml.safe_dump(dump_config(settings), sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def world(
    out: Annotated[Path, typer.Argument(help="Folder to make.")] = Path("data/toy"),
    rows: Annotated[int, typer.Option(min=1, help="Training rows; validation and test come on top.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    preset: Annotated[str, typer.Option(help="learnable (2x2 grid) or dense (3x3).")] = "learnable",
) -> None:
    """Build the toy data: pictures, and a manifest with rows for every task."""
    with _one_clear_message():
        from llmga.toyworld.build import build_world

        build_world(out, rows=rows, seed=seed, preset=preset)
        typer.echo(f"open {out / 'index.html'}")


@app.command()
def ask(
    picture: Annotated[str, typer.Argument(help="Picture file, or - for a question without one.")],
    text: Annotated[str, typer.Argument(help="The question or request.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of an MLLM; else what `make stage1` made, else a shipped toy model.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Ask an MLLM one thing and print its reply, generation tags included."""
    with _one_clear_message():
        from llmga.images import open_picture

        opened = None if picture == "-" else open_picture(Path(picture))
        _quiet_libraries()
        from llmga.stage1.conversation import Turn
        from llmga.stage1.model import load_mllm
        from llmga.stage1.reply import Prompt, generate_replies

        prompt = Prompt(turns=[Turn("user", text, has_picture=opened is not None)], picture=opened)
        [reply] = generate_replies(
            load_mllm(model or newest_model()), [prompt], max_new_tokens, 1, temperature=temperature, seed=seed
        )
        typer.echo(reply)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, such as final/ of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to make: a whole model, as plain transformers loads it.")],
    base: Annotated[Path | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the base's own.")] = None,
) -> None:
    """Merge a LoRA adapter into its base model."""
    with _one_clear_message():
        _quiet_libraries()
        import torch

        from llmga.stage1.lora import merge_adapter

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
        if dtype not in dtypes:
            raise typer.BadParameter(f"found {dtype}, expected float32, bfloat16 or float16", param_hint="--dtype")
        difference = merge_adapter(adapter, out, base, dtypes[dtype])
        typer.echo(f"wrote {out}; merged, no logit differs by more than {difference:.1g}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or file of a projector.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make; .safetensors for a projector.")],
    to: Annotated[str, typer.Option(help="hf: transformers' LLaVA. llava: the layout of the published code.")] = "hf",
    system_prompt: Annotated[
        Path | None, typer.Option(help="File with the system text the weights were trained with.")
    ] = None,
    vision_tower: Annotated[Path | None, typer.Option(help="Folder of the CLIP tower, if it is elsewhere.")] = None,
    family: Annotated[str | None, typer.Option(help="Row of the family table, where SRC does not say.")] = None,
    image_token: Annotated[str | None, typer.Option(help="Reserved token that stands for pictures.")] = None,
    image_token_id: Annotated[int | None, typer.Option(help="Row that does, in a folder without tokenizer.")] = None,
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Accept a folder without a tokenizer.")] = False,
) -> None:
    """Turn a released LLMGA or LLaVA checkpoint into a folder that plain transformers loads, or back."""
    with _one_clear_message():
        _quiet_libraries()
        from llmga.stage1.convert import convert_checkpoint

        report = convert_checkpoint(
            source,
            destination,
            to,  # type: ignore[arg-type]  # checked there, with our own sentence
            system_prompt=system_prompt,
            vision_tower=vision_tower,
            family=family,
            image_token=image_token,
            image_token_id=image_token_id,
            needs_tokenizer=not no_tokenizer,
        )
        typer.echo(report)


def newest_model() -> Path:
    """What `make stage1` made, else the shipped tuned model, else the shipped base model, which writes no tags."""
    candidates = (Path("runs/stage1_toy/final"), SHIPPED_MODELS / "tuned" / "mllm")
    return next((path for path in candidates if path.is_dir()), SHIPPED_MODELS / "base" / "mllm")


def _stage1_settings(config: Path, overrides: list[str] | None) -> Any:
    from llmga.config import load_config
    from llmga.stage1.config import Stage1Config

    return load_config(Stage1Config, config, overrides or ())


def _quiet_libraries() -> None:
    """Keep stdout for the reply."""
    from transformers.utils.logging import disable_progress_bar

    import llmga.runtime  # noqa: F401 (tells DeepSpeed its device; accelerate would let it guess aloud)

    disable_progress_bar()


@contextmanager
def _one_clear_message() -> Iterator[None]:
    """What we foresaw is told on stderr without a traceback; exit codes as in `llmga.config`."""
    from llmga.config import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED

    # By name, because importing llmga.runtime here would import torch.
    codes = {"llmga.runtime.Interrupted": EXIT_INTERRUPTED, "llmga.runtime.RunFailed": EXIT_FAILED}
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
        typer.echo(error, err=True)
        raise typer.Exit(code) from None
