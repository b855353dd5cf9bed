"""What a task needs of a record, and what keeps a record from training it."""

import re
from collections.abc import Sequence

from llmga.problem import Problem
from llmga.records import ROLES, TASKS, Message, Record
from llmga.tokens import IMAGE_TOKEN, TAG_LITERALS, parse_reply

NEEDS: dict[str, tuple[str, ...]] = {
    "prompt_refinement": ("short_caption", "caption"),
    "similar_image": ("image", "caption"),
    "inpainting": ("image", "caption"),
    "outpainting": ("image", "caption"),
    "editing": ("instruction", "target_caption"),
    "vqa": ("image", "messages"),
    "qa": ("messages",),
}
# Texts that become an answer between tags; what a person says may hold anything and is neutralised when it is loaded.
TARGET_FIELDS = ("caption", "target_caption", "prompt")
_CONTROL = re.compile("|".join(map(re.escape, (IMAGE_TOKEN, *TAG_LITERALS))))


def check_record(record: Record) -> list[Problem]:
    """What keeps a record from training its task, one sentence with its code each; an empty list when it is fine.

    Looks at the record alone: whether its picture opens is found out when it is loaded.
    """
    if record.task not in TASKS:
        return [Problem("unknown_task", f"unknown task {record.task!r}, expected one of {', '.join(TASKS)}")]
    problems = [
        Problem("missing_field", f"task {record.task!r} needs {name!r}, which is missing")
        if getattr(record, name) is None
        else Problem("empty_text", f"task {record.task!r} needs {name!r}, which is empty")
        for name in NEEDS[record.task]
        if not getattr(record, name)
    ]
    problems += [
        Problem("empty_text", f"{name!r} holds nothing but white space")
        for name in (*NEEDS[record.task], "mask")
        if isinstance(value := getattr(record, name), str) and value and not value.strip()
    ]
    if record.task == "editing" and not (record.image or record.caption):
        reason = "task 'editing' needs 'image', or 'caption' in its place; both are missing"
        problems.append(Problem("missing_field", reason))
    if record.task == "qa" and record.image:
        reason = "task 'qa' is text only, yet 'image' is given; its task would be 'vqa'"
        problems.append(Problem("picture_not_used", reason))
    for name in TARGET_FIELDS:
        if control := find_control(getattr(record, name)):
            reason = f"{name!r} is a training target and holds the control text {control!r}"
            problems.append(Problem(control.code, reason))
    for name in ("image", "mask"):
        if problem := path_problem(getattr(record, name)):
            problems.append(Problem(problem.code, f"{name!r} is {getattr(record, name)!r}: {problem}"))
    return problems + turn_problems(record.messages or (), has_picture=record.task == "vqa")


def find_control(text: str | None) -> Problem | None:
    """The first generation tag or picture placeholder in a text, or None."""
    found = _CONTROL.search(text) if text else None
    if not text or not found:
        return None
    if found[0] == IMAGE_TOKEN:
        return Problem("placeholder_in_target", found[0])
    return Problem("tag_in_target" if parse_reply(text).well_formed else "unbalanced_tags", found[0])


def path_problem(path: str | None) -> Problem | None:
    """Why a path does not name a file below a picture folder; None when it does, or is not given."""
    if not path:
        return None
    if path.startswith("/") or re.match(r"[A-Za-z]:[\\/]|[a-z]+://", path):
        return Problem("picture_path", "expected a path relative to the picture folder")
    if "\\" in path:
        return Problem("picture_path", "expected forward slashes")
    return Problem("picture_outside", "it leaves the picture folder") if ".." in path.split("/") else None


def turn_problems(messages: Sequence[Message], has_picture: bool = False) -> list[Problem]:
    """What keeps turns from being a conversation: a user asks first, roles alternate, an answer is last, no empties.

    Args:
        has_picture: the first question shows one, and then needs no words.
    """
    problems = []
    for turn, message in enumerate(messages):
        if message["role"] != ROLES[turn % 2]:
            reason = f"messages[{turn}] is from {message['role']!r}, expected {ROLES[turn % 2]!r}"
            problems.append(Problem("broken_turns", reason))
            break
        if not message["content"].strip() and not (has_picture and turn == 0):
            problems.append(Problem("empty_text", f"messages[{turn}] is empty"))
    if messages and messages[-1]["role"] != "assistant":
        problems.append(Problem("broken_turns", "the last question has no answer"))
    return problems
