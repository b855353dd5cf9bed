"""Commands that use a trained model: ask, paint, restore."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmga.commands.common import log_to_stderr, newest_model, newest_restorer, one_clear_message, quiet_libraries


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
    """Ask an MLLM one thing and print its reply, tags included."""
    with one_clear_message():
        from llmga.images import open_picture

        opened = None if picture == "-" else open_picture(Path(picture))
        quiet_libraries()
        from llmga.stage1.conversation import Turn
        from llmga.stage1.model import load_mllm
        from llmga.stage1.reply import Prompt, generate_replies

        prompt = Prompt(turns=[Turn("user", text, has_picture=opened is not None)], picture=opened)
        [reply] = generate_replies(
            load_mllm(model or newest_model()), [prompt], max_new_tokens, 1, temperature=temperature, seed=seed
        )
        typer.echo(reply)


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts of any length.")] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of a diffusers pipeline, SD1.5 or SDXL.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/sample"),
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with a prompt on each line.")] = None,
    negative: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the others count on.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; else 7.5, or 5 for SDXL.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="ddim, euler, dpm++, unipc, ...; else the model's own.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; else what the model was trained at.")] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    picture: Annotated[Path | None, typer.Option(help="Picture to complete, with --mask or --extend.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Light where to generate.")] = None,
    extend: Annotated[str | None, typer.Option(help="left,top,right,bottom in pixels, or shares below 1.")] = None,
    paste: Annotated[Literal["none", "exact", "feather"], typer.Option(help="Kept pixels back in place.")] = "none",
    feather: Annotated[int, typer.Option(min=0, help="Pixels over which feather fades.")] = 8,
    overlap: Annotated[int, typer.Option(min=0, help="Pixels painted anew beside a side that grows.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures painted together.")] = 4,
    weighted: Annotated[bool, typer.Option("--weighted", help="Read (brackets:1.2) as weights.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="A picture made by this command, to paint again.")] = None,
) -> None:
    """Paint pictures from prompts; with --picture complete one. Each PNG carries its recipe."""
    with one_clear_message():
        quiet_libraries()
        from llmga.stage2.sample_command import Asked, sample_to_folder
        from llmga.stage2.sample_inputs import Settings

        log_to_stderr()
        asked = Asked(
            out, model, tuple(prompts or ()), prompts_file, negative, seed, count, picture, mask, extend, recipe
        )
        settings = Settings(
            steps, guidance, scheduler, width, height, batch_size,
            paste=paste, feather_px=feather, overlap_px=overlap, weighted=weighted,
        )  # fmt: skip
        for path in sample_to_folder(asked, settings):
            typer.echo(path)


def restore(
    generated: Annotated[Path, typer.Option(help="Generated picture, or a folder of them.")],
    mask: Annotated[Path, typer.Option(help="Its mask, light where pixels were generated, or a folder.")],
    known: Annotated[Path, typer.Option(help="Picture whose pixels outside the mask are right, or a folder.")],
    out: Annotated[Path, typer.Option(help="Result: a .png, .bmp or .tif file, or a folder.")],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a restorer; else what `make diffrir` made, else a shipped toy one.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep/--restore-all", help="Known pixels come out as they went in, bit for bit.")
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise; a picture's own depends on its name too.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures of equal size at a time.")] = 4,
    tile: Annotated[int, typer.Option(help="Larger pictures are cut; pixels, a multiple of 32.")] = 768,
    overlap: Annotated[int, typer.Option(help="Of tiles, which are blended over it; a multiple of 32.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Restore again what is there already.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")] = "auto",
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16: faster on a GPU.")] = False,
) -> None:
    """Restore what was generated, to match the known pixels. Exit code 1: some pictures failed."""
    with one_clear_message():
        log_to_stderr()
        from llmga.diffrir.folders import find_tasks, restore_files
        from llmga.diffrir.tiles import Tiling

        tasks, tiling = find_tasks(generated, mask, known, out), Tiling(tile, overlap)
        import torch

        from llmga.diffrir.network import load_restorer

        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        restorer = load_restorer(model or newest_restorer(), phase="diffusion", device=device)
        failures = restore_files(
            restorer,
            tasks,
            seed=seed,
            batch_size=batch_size,
            tiling=tiling,
            composed=keep,
            overwrite=overwrite,
            bf16=bf16,
        )
        for failure in failures:
            typer.echo(failure, err=True)
        typer.echo(f"{len(tasks) - len(failures)} of {len(tasks)} restored: {out}")
        if failures:
            raise typer.Exit(2 if len(tasks) == 1 else 1)
