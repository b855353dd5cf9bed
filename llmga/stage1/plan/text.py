"""A plan as text for a terminal."""

from collections.abc import Iterator, Sequence

import yaml

from llmga.config import dump_config
from llmga.progress import duration
from llmga.stage1.plan.memory import MEMORY_PARTS, DeviceMemory
from llmga.stage1.plan.plan import Plan
from llmga.stage1.plan.speed import CARDS
from llmga.stage1.preview import Chip

OUTSIDE_GIB = 1.5  # CUDA context, NCCL and cuBLAS, which the allocator does not see; assumed
TRAINED = ("[[", "]]")
TRAINED_IN_COLOUR = ("\x1b[1;32m", "\x1b[0m")


def plan_text(plan: Plan, colour: bool = False, num_shown: int = 3) -> str:
    """Everything a plan knows, in the order of the questions.

    Args:
        colour: mark trained tokens by colour, for a terminal; else by brackets.
        num_shown: examples of the first batch.
    """
    sections = (
        ("settings", _settings(plan)),
        ("data", _data(plan)),
        ("parameters", _parameters(plan)),
        ("memory per device", _memory(plan)),
        ("time", _time(plan)),
        ("disk", _disk(plan)),
        ("first batch", _first_batch(plan, TRAINED_IN_COLOUR if colour else TRAINED, num_shown)),
        ("not on this machine", (f"- {note}" for note in plan.missing)),
    )
    blocks = []
    for title, body in sections:
        if lines := list(body):
            blocks.append("\n".join([f"== {title}", *lines]))
    return "\n\n".join([*blocks, "nothing was trained and nothing written"]) + "\n"


def _settings(plan: Plan) -> Iterator[str]:
    yield from yaml.safe_dump(dump_config(plan.cfg), sort_keys=False, allow_unicode=True).splitlines()


def _data(plan: Plan) -> Iterator[str]:
    cfg, data = plan.cfg, plan.data
    per_step = cfg.run.batch_size * cfg.run.accumulation_steps * plan.asked.devices
    micro_batch = f"{_of(cfg.run.batch_size, 'example')} x {_of(cfg.run.accumulation_steps, 'forward pass')}"
    batch = f"{micro_batch} x {_of(plan.asked.devices, 'device')} = {per_step:,} examples a step"
    steps, examples = data.steps, data.examples
    if examples is None and plan.asked.examples is not None:
        examples, steps = plan.asked.examples, -(-plan.asked.examples // per_step)
    if steps is None or examples is None:
        yield f"steps unknown, because rows are; {batch}; --examples N plans for N examples"
    else:
        epochs = "" if data.epochs is None else f" = {data.epochs:.3g} epochs"
        yield f"{steps:,} steps: {examples:,} examples{epochs}; {batch}"
    rows = [("source", "rows", "share", "draws", "epochs", "tokens", "trained", "tokens in the run")]
    for source in data.sources:
        known = source.looked_at > 0
        rows.append(
            (
                source.name,
                _number(source.rows),
                "?" if source.share is None else f"{source.share:.1%}",
                _number(source.draws),
                "?" if source.epochs is None else f"{source.epochs:.2f}",
                f"{source.tokens:,.0f}" if known else "?",
                f"{source.trained:,.0f}" if known else "?",
                _number(round(source.tokens * source.draws)) if known and source.draws is not None else "?",
            )
        )
    yield from _table(rows)
    if data.tokens is not None and data.trained is not None:
        yield (
            f"tokens and trained tokens are means of the first {data.looked_at:,} examples of the run: "
            f"{data.tokens:,.0f} and {data.trained:,.0f}"
        )
    if data.left_out:
        yield (
            f"{data.left_out:,} of them find no room in rows of data.max_tokens = {cfg.data.max_tokens:,} "
            "and would be left out; raise it, or lower run.batch_size"
        )


def _parameters(plan: Plan) -> Iterator[str]:
    if plan.model is None or plan.architecture is None:
        return
    rows = [("", "trained", "frozen")]
    rows += [(part, f"{count.trained:,}", f"{count.frozen:,}") for part, count in plan.model.counts.items()]
    yield from _table([*rows, ("together", f"{plan.model.trained:,}", f"{plan.model.frozen:,}")])
    yield from plan.architecture.sources


def _memory(plan: Plan) -> Iterator[str]:
    if plan.model is None:
        return
    yield _engine(plan)
    heads = ["longest batch seen"] * (len(plan.memory) > 1) + ["largest allowed"]
    unit, size = ("GB", 1e9) if plan.memory[-1].total > 1e9 else ("MB", 1e6)
    rows = [(unit, *heads), ("", *(_shape(one) for one in plan.memory))]
    for part in MEMORY_PARTS:
        rows.append((part, *(f"{one.parts[part] / size:,.2f}" for one in plan.memory)))
    rows.append(("together", *(f"{one.total / size:,.2f}" for one in plan.memory)))
    rows.append(("fullest in the", *(one.moment for one in plan.memory)))
    if any(one.host for one in plan.memory):
        rows.append(("in host memory", *(f"{one.host / size:,.2f}" for one in plan.memory)))
    yield from _table(rows)
    yield from _fits(plan)


def _engine(plan: Plan) -> str:
    run, engine = plan.cfg.run, plan.model.engine if plan.model else None
    assert engine is not None
    owner = "every device holds everything" if engine.stage is None else f"ZeRO-{engine.stage} ({run.deepspeed})"
    offloaded = [name for name in ("optimizer", "param") if engine.offloads(name)]
    parts = [owner, f"{engine.devices} device{'s'[: engine.devices > 1]}", run.precision]
    parts += ["gradient checkpointing"] * run.gradient_checkpointing
    parts += [f"{' and '.join(offloaded)} offloaded"] * bool(offloaded)
    return ", ".join(parts)


def _shape(memory: DeviceMemory) -> str:
    return f"{memory.batch.rows} x {memory.batch.tokens:,} tokens"


def _fits(plan: Plan) -> Iterator[str]:
    if plan.asked.card not in CARDS:
        return
    room = CARDS[plan.asked.card].memory_gib * 2**30 / 1e9
    need = plan.memory[-1].total / 1e9 + OUTSIDE_GIB * 2**30 / 1e9
    verdict = "fits" if need <= room else "does NOT fit"
    yield (
        f"{plan.asked.card} has {room:,.1f} GB: the largest batch needs {need:,.1f} GB with about "
        f"{OUTSIDE_GIB * 2**30 / 1e9:.1f} GB outside the allocator (assumed), and {verdict}"
    )


def _time(plan: Plan) -> Iterator[str]:
    if plan.speed is None:
        yield "unknown: give --card, --tokens-per-s, or --like RUN for the throughput of a former run"
        return
    yield f"{plan.speed.tokens_per_s:,.0f} tokens/s over all devices; {plan.speed.basis}"
    tokens = f"{plan.tokens_per_example:,.0f} tokens an example"
    if plan.data.tokens is None:
        tokens += " (data.max_length, because no example could be made; real ones are shorter)"
    if plan.hours is None:
        per_million = 1e6 * plan.tokens_per_example / plan.speed.tokens_per_s
        yield f"{duration(per_million)} for a million examples at {tokens}"
    else:
        yield f"{duration(plan.hours * 3600)} = {plan.hours:,.2f} hours at {tokens}, without saving and evaluating"


def _disk(plan: Plan) -> Iterator[str]:
    if plan.disk is None:
        return
    disk = plan.disk
    yield (
        f"{disk.total / 1e9:,.2f} GB in {plan.cfg.run.output_dir}: {disk.count} checkpoint{'s'[: disk.count > 1]} of "
        f"{disk.checkpoint / 1e9:,.2f} GB at the fullest moment, final/ {disk.final / 1e9:,.2f} GB"
        + f", base/ {disk.base / 1e9:,.2f} GB, put together from the parts"
        * (disk.base > 0)
    )


def _first_batch(plan: Plan, marks: tuple[str, str], num_shown: int) -> Iterator[str]:
    for number, chips in enumerate(plan.data.first[:num_shown]):
        yield f"-- example {number}: trained tokens stand in {marks[0]}this{marks[1]}"
        yield from _marked(chips, marks).splitlines()
    if (left := len(plan.data.first) - num_shown) > 0:
        yield f"-- and {left} more; `llmga preview` writes a page with pictures"


def _marked(chips: Sequence[Chip], marks: tuple[str, str]) -> str:
    """The conversation, with what is trained between marks."""
    text, inside = "", False
    for chip in chips:
        if (chip.label == "trained") != inside:
            inside = not inside
            text += marks[0] if inside else marks[1]
        text += f"<{chip.text}>" if chip.label == "picture" else chip.text.replace("↵", "\n" if chip.ends_line else "↵")
    return text + (marks[1] if inside else "")


def _of(count: int, thing: str) -> str:
    """A number with its noun."""
    plural = "" if count == 1 else "es" if thing.endswith("s") else "s"
    return f"{count:,} {thing}{plural}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()
