"""Commands for people. Every heavy import waits until its command runs, so `--help` answers at once."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SHIPPED_MODELS = Path(__file__).parent / "toyworld" / "checkpoints"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/stage1/toy.yaml.")]
Severity = Literal["error", "warning", "note"]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as optim.lr=1e-5.")
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def llmga() -> None:
    """Train and use an LLMGA: a multimodal LLM that writes generation prompts."""


@app.command()
def stage1(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, as `plan` does.")] = False,
) -> None:
    """Train the MLLM on one machine and one device; `make stage1` starts several."""
    if dry_run:
        plan(config, overrides)
        return
    with _one_clear_message():
        settings = _stage1_settings(config, overrides)
        from llmga.runtime import close_distributed
        from llmga.stage1.train import train

        typer.echo(f"finished: {train(settings)}")
        close_distributed()


@app.command()
def stage2(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, as `plan` does.")] = False,
) -> None:
    """Train Stable Diffusion on long prompts on one device; `make stage2` starts several."""
    with _one_clear_message():
        if dry_run:
            _plan_stage2(config, overrides or [], devices=1)
            return
        from llmga.config import load_config
        from llmga.stage2.config import Stage2Config

        settings = load_config(Stage2Config, config, overrides or ())
        from llmga.runtime import close_distributed
        from llmga.stage2.train import train

        typer.echo(f"finished: {train(settings)}")
        close_distributed()


@app.command()
def preflight(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check machine, packages, data, run folder and network for a run; `make preflight` starts it everywhere."""
    with _one_clear_message():
        from llmga.nodes.settings import load_config_together
        from llmga.stage1.config import Stage1Config

        settings = load_config_together(Stage1Config, config, overrides or ())
        from llmga.nodes.meeting import MeetingError
        from llmga.nodes.preflight import give_up, preflight
        from llmga.runtime import barrier, close_distributed, ranks_from_environment, setup_logging

        ranks = ranks_from_environment()
        setup_logging(ranks)
        try:
            report = preflight(settings, ranks)
        except MeetingError as error:
            raise typer.Exit(give_up(error)) from None
        for line in report:
            typer.echo(line)
        barrier()  # rank 0 holds what the others still read
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
def check(
    path: Annotated[Path, typer.Argument(help="Manifest, published file, or a folder of them.")],
    format: Annotated[str, typer.Option(help="auto, manifest, llmga_t2i, llmga_sg, ..., llava, sharegpt.")] = "auto",
    image_root: Annotated[Path | None, typer.Option(help="Folder that pictures count from; else the file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the reports; else runs/check/NAME.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Cleaned manifest to write (a folder for several).")] = None,
    drop: Annotated[list[str] | None, typer.Option(help="Code that --fix leaves out as well; repeatable.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Code that is not reported; repeatable.")] = None,
    fail_on: Annotated[Severity, typer.Option(help="Mildest severity that makes the exit code 1.")] = "error",
    reference: Annotated[Path | None, typer.Option(help="Pictures that must not be trained on.")] = None,
    archives: Annotated[Path | None, typer.Option(help="List of SHA-256 sums of the archives beside it.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="An LLM's tokenizer, to count its tokens too.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished check of the same files.")] = True,
    pictures: Annotated[bool, typer.Option(help="Open pictures; without, texts alone are checked.")] = True,
    orphans: Annotated[bool, typer.Option(help="Look for pictures that no row uses.")] = True,
    min_side: Annotated[int, typer.Option(min=1, help="Warn of pictures below so many pixels.")] = 64,
    max_ratio: Annotated[float, typer.Option(min=1, help="Warn of sides that differ by more.")] = 5.0,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse larger pictures.")] = None,
    mask_area: Annotated[tuple[float, float], typer.Option(help="Usual share of a mask.")] = (0.005, 0.95),
    near: Annotated[int, typer.Option(help="Bits by which similar pictures may differ; 0: do not compare.")] = 10,
    max_chunks: Annotated[int, typer.Option(min=1, help="Windows of 75 CLIP tokens of a prompt.")] = 4,
    max_length: Annotated[int, typer.Option(min=1, help="LLM tokens of a row, for --tokenizer.")] = 2048,
) -> None:
    """Check data row by row and picture by picture. Exit code 0: clean, 1: problems found, 2: cannot check."""
    with _one_clear_message():
        from llmga.check.command import check_and_report
        from llmga.check.settings import CheckSettings
        from llmga.images import MAX_PIXELS

        _log_to_stderr()
        settings = CheckSettings(
            path, format, image_root, out, workers, reference, archives, tokenizer, pictures, orphans,
            tuple(ignore or ()), tuple(drop or ()), fail_on, fix, resume, min_side, max_ratio,
            max_pixels or MAX_PIXELS, mask_area, near, max_chunks, max_length,
        )  # fmt: skip
        lines, failed = check_and_report(settings)
        for line in lines:
            typer.echo(line)
        if failed:
            raise typer.Exit(1)


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
        keys = _keys_of(config)
        if "phases" in keys:
            _plan_diffrir(config, overrides or [], devices)
            return
        if "task" in keys:
            _plan_stage2(config, overrides or [], devices)
            return
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
        from llmga.diffrir.config import DiffRIRConfig
        from llmga.stage1.config import Stage1Config
        from llmga.stage2.config import Stage2Config

        keys = _keys_of(config)
        schema: type[Any] = DiffRIRConfig if "phases" in keys else Stage2Config if "task" in keys else Stage1Config
        settings = load_config(schema, config, overrides or (), check_machine=False)
        typer.echo(yaml.safe_dump(dump_config(settings), sort_keys=False, allow_unicode=True), nl=False)


@app.command()
def world(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("data/toy"),
    rows: Annotated[int, typer.Option(help="Training records; validation and test come on top.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes and words.")] = 0,
    preset: Annotated[str, typer.Option(help="learnable (2x2 grid) or dense (3x3).")] = "learnable",
    kind: Annotated[
        str, typer.Option(help="base: what a base model has seen; stage1: what stage 1 trains.")
    ] = "stage1",
    split: Annotated[list[str] | None, typer.Option(metavar="NAME=RECORDS", help="Instead of --rows.")] = None,
    sheet: Annotated[bool, typer.Option(help="Write index.html, a page to look at.")] = True,
) -> None:
    """Build the toy data: pictures, and manifests with rows for every task."""
    with _one_clear_message():
        import time

        from llmga.toyworld.build import build_world, splits_from

        started = time.perf_counter()
        splits = splits_from(split) if split else None
        report = build_world(out, rows, seed, preset, kind, splits=splits, sheet=sheet)
        typer.echo(report.in_words(time.perf_counter() - started))


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
    """Restore what was generated, so that it matches the known pixels. Exit code 1: some pictures failed."""
    with _one_clear_message():
        _log_to_stderr()
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
    with _one_clear_message():
        _quiet_libraries()
        from llmga.stage2.sample_command import Asked, sample_to_folder
        from llmga.stage2.sample_inputs import Settings

        _log_to_stderr()
        asked = Asked(
            out, model, tuple(prompts or ()), prompts_file, negative, seed, count, picture, mask, extend, recipe
        )
        settings = Settings(
            steps, guidance, scheduler, width, height, batch_size,
            paste=paste, feather_px=feather, overlap_px=overlap, weighted=weighted,
        )  # fmt: skip
        for path in sample_to_folder(asked, settings):
            typer.echo(path)


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


@app.command()
def release(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files with sizes and hashes; push none.")
    ] = False,
) -> None:
    """Release a trained model to the Hugging Face Hub: safetensors, card, read back, then one commit."""
    with _one_clear_message():
        from llmga.config import load_config
        from llmga.release.config import ReleaseConfig

        settings = load_config(ReleaseConfig, config, overrides or ())
        _log_to_stderr()
        from llmga.release.command import release as release_model

        release_model(settings, dry_run, typer.echo)


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make; else models/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; else the main branch.")] = None,
) -> None:
    """Fetch a model from the Hub: no pickles, no code, every file checked by its hash."""
    with _one_clear_message():
        from llmga.release.command import fetch

        _log_to_stderr()
        typer.echo(fetch(repo, out, revision))


def newest_model() -> Path:
    """What `make stage1` made, else the shipped tuned model, else the shipped base model, which writes no tags."""
    candidates = (Path("runs/stage1_toy/final"), SHIPPED_MODELS / "tuned" / "mllm")
    return next((path for path in candidates if path.is_dir()), SHIPPED_MODELS / "base" / "mllm")


def newest_restorer() -> Path:
    """What `make diffrir` made, else the shipped toy restorer."""
    made = Path("runs/diffrir_toy/final")
    return made if made.is_dir() else SHIPPED_MODELS / "tuned" / "restorer"


def _keys_of(config: Path) -> set[str]:
    """The settings of a config by their first name: stage 2 alone has a `task`, restoration alone has `phases`."""
    from llmga.config_report import Report
    from llmga.config_source import read_yaml

    data, _ = read_yaml(config, Report(str(config)))
    return set(data)


def _plan_stage2(config: Path, overrides: list[str], devices: int) -> None:
    from llmga.config import load_config
    from llmga.stage2.config import Stage2Config
    from llmga.stage2.plan import make_plan, plan_text

    settings = load_config(Stage2Config, config, overrides, check_machine=False)
    typer.echo(plan_text(make_plan(settings, devices)), nl=False)


def _plan_diffrir(config: Path, overrides: list[str], devices: int) -> None:
    from llmga.config import load_config
    from llmga.diffrir.config import DiffRIRConfig
    from llmga.diffrir.plan import make_plan, plan_text

    settings = load_config(DiffRIRConfig, config, overrides, check_machine=False)
    typer.echo(plan_text(make_plan(settings, devices)), nl=False)


def _stage1_settings(config: Path, overrides: list[str] | None) -> Any:
    from llmga.config import load_config
    from llmga.stage1.config import Stage1Config

    return load_config(Stage1Config, config, overrides or ())


def _log_to_stderr() -> None:
    """What the library tells on the way, as it is; reports alone go to stdout."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s")


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
