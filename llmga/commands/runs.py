"""Commands about a run: train, and all that can be told of it before."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmga.commands.common import ConfigFile, Overrides, one_clear_message, quiet_libraries


def stage1(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, as `plan` does.")] = False,
) -> None:
    """Train the MLLM on one device; `make stage1` starts several."""
    if dry_run:
        plan(config, overrides)
        return
    with one_clear_message():
        settings = _stage1_settings(config, overrides)
        from llmga.runtime import close_distributed
        from llmga.stage1.train import train

        typer.echo(f"finished: {train(settings)}")
        close_distributed()


def stage2(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be done, as `plan` does.")] = False,
) -> None:
    """Train Stable Diffusion on long prompts, on one device. `make stage2` starts several."""
    with one_clear_message():
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


def preflight(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check machine, data, run folder and network for a run. `make preflight` starts it everywhere."""
    with one_clear_message():
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


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("runs/preview.html"),
) -> None:
    """Write a page of examples as they are trained on. It shows picture, mask, and which tokens are trained."""
    with one_clear_message():
        settings = _stage1_settings(config, overrides)
        from llmga.stage1.preview import write_preview

        write_preview(settings, out)
        typer.echo(f"open {out}")


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
    """Tell what a run will do, need and cost. Its first batch is shown, and nothing is run."""
    with one_clear_message():
        quiet_libraries()
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


def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every setting of a config, defaults included."""
    with one_clear_message():
        import yaml

        from llmga.config import dump_config, load_config
        from llmga.diffrir.config import DiffRIRConfig
        from llmga.stage1.config import Stage1Config
        from llmga.stage2.config import Stage2Config

        keys = _keys_of(config)
        schema: type[Any] = DiffRIRConfig if "phases" in keys else Stage2Config if "task" in keys else Stage1Config
        settings = load_config(schema, config, overrides or (), check_machine=False)
        typer.echo(yaml.safe_dump(dump_config(settings), sort_keys=False, allow_unicode=True), nl=False)


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
