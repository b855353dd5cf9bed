"""Commands about weights: merge, convert, release, fetch."""

from pathlib import Path
from typing import Annotated

import typer

from llmga.commands.common import ConfigFile, Overrides, log_to_stderr, one_clear_message, quiet_libraries


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA adapter, such as final/ of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder to make: a whole model, as plain transformers loads it.")],
    base: Annotated[Path | None, typer.Option(help="The base model, if it is not where the adapter says.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the base's own.")] = None,
) -> None:
    """Merge a LoRA adapter into its base model."""
    with one_clear_message():
        quiet_libraries()
        import torch

        from llmga.stage1.lora import merge_adapter

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
        if dtype not in dtypes:
            raise typer.BadParameter(f"found {dtype}, expected float32, bfloat16 or float16", param_hint="--dtype")
        difference = merge_adapter(adapter, out, base, dtypes[dtype])
        typer.echo(f"wrote {out}; merged, no logit differs by more than {difference:.1g}")


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
    """Turn a released LLMGA or LLaVA checkpoint into transformers'. Or back: see --to."""
    with one_clear_message():
        quiet_libraries()
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


def release(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files with sizes and hashes; push none.")
    ] = False,
) -> None:
    """Release a trained model to the Hugging Face Hub. Safetensors, card, read back, then one commit."""
    with one_clear_message():
        from llmga.config import load_config
        from llmga.release.config import ReleaseConfig

        settings = load_config(ReleaseConfig, config, overrides or ())
        log_to_stderr()
        from llmga.release.command import release as release_model

        release_model(settings, dry_run, typer.echo)


def pull(
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; else models/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; else the main branch.")] = None,
) -> None:
    """Fetch a model from the Hub. No pickles, no code, every file checked by its hash."""
    with one_clear_message():
        from llmga.release.command import fetch

        log_to_stderr()
        typer.echo(fetch(repo, out, revision))
