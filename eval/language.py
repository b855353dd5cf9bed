"""What did the MLLM learn? Tags, prompts, kept facts and answers on held-out scenes, the base beside the tuned model.

    make eval                                                        # what `make stage1` made, else the shipped model
    python eval/language.py --model runs/stage1_toy/final            # a model of yours
    python eval/language.py --phrasing held_out                      # instructions that training never saw

Writes result.json (every number with its interval and protocol), items.jsonl (every reply) and index.html (to look at).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from language_items import TASKS, EvalError, Item, build_items, choose_records
from language_page import render_page
from language_scores import compare, score_item, summarise
from language_tables import TABLE_ROWS, detail_rows, show_comparisons, table, table_rows
from llmga.checkpoint import sha256
from llmga.cli import SHIPPED_MODELS, newest_model
from llmga.config import EXIT_BAD_INPUT, EXIT_OK
from llmga.files import atomic_write, no_file_to_write, no_folder_to_write
from llmga.machine import machine_in_words
from llmga.provenance import made_with
from llmga.stage1.instructions import Phrasing
from llmga.stage1.tasks import TaskSettings

DRAWN_PX = 64  # the side of the toy world's pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and write the result folder; returns the exit code."""
    args = parse_arguments(arguments)
    try:
        check_outputs(args)
        rows_of = dict.fromkeys(args.tasks, args.rows) | ({"vqa": args.vqa_rows} if "vqa" in args.tasks else {})
        records = choose_records(args.data, rows_of)
        settings = task_settings(args.model, args.picture_size, args.phrasing)
        items = list(build_items(records, args.data.parent, settings, args.seed))
        systems = {"tuned": args.model} | ({"base": args.base} if args.base else {})
        rows: list[dict[str, Any]] = []
        timing = {}
        for name, path in systems.items():
            started = time.monotonic()
            replies = reply(path, items, settings, args.max_new_tokens, args.batch_size)
            timing[name] = round(time.monotonic() - started, 1)
            rows += [score_item(name, item, text) for item, text in zip(items, replies, strict=True)]
    except ValueError as error:
        if not isinstance(error, EvalError) and not type(error).__module__.startswith("llmga."):
            raise
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    result = {
        "schema_version": 1,
        "machine": machine_in_words("torch", "transformers"),
        "environment": made_with(),
        "protocol": {
            "data": str(args.data),
            "data_sha256": sha256(args.data),
            "records": len(records),
            "rows": args.rows,
            "vqa_rows": args.vqa_rows,
            "phrasing": args.phrasing,
            "picture_size": settings.picture_size,
            "decoding": "greedy",
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
            "interval": "95 %, over records; ci_method of each row says how",
        },
        "systems": {name: os.path.relpath(path) for name, path in systems.items()},
        "weights": {name: hash_weights(path) for name, path in systems.items()},
        "seconds": timing,
        "metrics": summarise(rows),
        "comparisons": compare(rows),
    }
    write_result(args.out, result, rows, items)
    if args.publish:
        atomic_write(args.publish, json_text(result))
    print(f"tuned: {args.model}, base: {args.base}")
    print(table(result["metrics"]))
    for sentence in show_comparisons(result["comparisons"]):
        print(sentence)
    print(f"{args.out / 'index.html'}")
    return EXIT_OK


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=newest_model(), help="folder of the tuned MLLM")
    parser.add_argument("--base", type=Path, default=SHIPPED_MODELS / "base/mllm", help="folder of the base MLLM")
    parser.add_argument("--no-base", dest="base", action="store_const", const=None, help="leave the base out")
    parser.add_argument("--data", type=Path, default=Path("data/toy/test.jsonl"), help="manifest of held-out scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/eval_language"))
    parser.add_argument("--publish", type=Path, help="write result.json here too, without the replies")
    parser.add_argument("--rows", type=int, default=500, help="records per task")
    parser.add_argument("--vqa-rows", type=int, default=600, help="records of VQA, each with one to eight questions")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--phrasing", choices=("train", "held_out"), default="train")
    parser.add_argument("--picture-size", type=int, help="pixels a side; else as the tuned MLLM was trained")
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def check_outputs(args: argparse.Namespace) -> None:
    """Replies take minutes: what could not be written behind them is said before.

    Raises:
        EvalError: names the option and the path.
    """
    for option, problem in (
        ("--out", no_folder_to_write(args.out)),
        ("--publish", args.publish and no_file_to_write(args.publish)),
    ):
        if problem:
            raise EvalError(f"{option}: {problem}")


def task_settings(model: Path, picture_size: int | None, phrasing: Phrasing) -> TaskSettings:
    """Pictures as the tuned MLLM was trained with them; where its folder does not say, as the world draws them."""
    from llmga.stage1.model import read_picture_shape

    trained_size, mode = read_picture_shape(model)
    return TaskSettings(picture_size=picture_size or trained_size or DRAWN_PX, picture_mode=mode, phrasing=phrasing)


def reply(path: Path, items: Sequence[Item], settings: TaskSettings, max_new_tokens: int, batch_size: int) -> list[str]:
    """Greedy replies of a model folder to all items."""
    from llmga.stage1.model import load_mllm
    from llmga.stage1.reply import Prompt, generate_replies

    prompts = [Prompt(item.turns, item.example.picture) for item in items]
    return generate_replies(load_mllm(path), prompts, max_new_tokens, batch_size, picture_size=settings.picture_size)


def hash_weights(path: Path) -> dict[str, str]:
    """The SHA-256 of each weight file of a model folder, by name: which model it was, whatever its path holds later."""
    return {file.name: sha256(file) for file in sorted(path.glob("*.safetensors"))}


def json_text(result: dict[str, Any]) -> str:
    """A result as a file's text."""
    return json.dumps(result, indent=1, ensure_ascii=False) + "\n"


def write_result(out: Path, result: dict[str, Any], rows: Sequence[dict[str, Any]], items: Sequence[Item]) -> None:
    """Write result.json, items.jsonl and index.html."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = {item.id: item.example.picture for item in items}
    metrics = result["metrics"]
    tables = {"All tasks": TABLE_ROWS, "By kind and attribute": detail_rows(metrics)}
    measured = {title: table_rows(metrics, wanted) for title, wanted in tables.items()}
    texts = {
        "result.json": json_text(result),
        "items.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "index.html": render_page(result, measured, rows, pictures),
    }
    (out / "pictures").mkdir(exist_ok=True)
    for item in items:
        if item.example.picture is not None:
            item.example.picture.save(out / "pictures" / f"{item.id.replace('/', '_')}.png")
    for name, text in texts.items():
        atomic_write(out / name, text)


if __name__ == "__main__":
    sys.exit(main())
