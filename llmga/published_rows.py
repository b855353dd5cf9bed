"""What one row of each published format means: the row's fields in, the fields of a record out."""

from collections.abc import Callable
from functools import partial
from typing import Any

from llmga.record_check import find_control, path_problem
from llmga.records import Message
from llmga.tokens import IMAGE_TOKEN

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Note = Callable[[str], None]
Turns = list[tuple[str, str]]


class SkipRow(Exception):
    """Why a row cannot become a record; `code` as in the table of `llmga.check.kinds`."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.code = code


def guess_formats(row: dict[str, Any]) -> tuple[str, ...]:
    """The formats whose fields a row has, the likeliest first; more than one where their fields are the same."""
    for names, formats in _SIGNS:
        if names <= row.keys():
            return formats
    return ()


_SIGNS: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"id", "task"}, ("manifest",)),
    ({"instruction", "new_caption"}, ("llmga_edit",)),
    ({"ori_caption", "caption"}, ("llmga_t2i",)),
    ({"conversations", "image"}, ("llava",)),
    ({"conversations"}, ("sharegpt", "llava")),
    ({"image", "caption"}, ("llmga_sg", "llmga_inpainting")),
)


def _prompt_refinement(row: dict[str, Any], note: Note) -> dict[str, Any]:
    short = _text(row, "ori_caption")
    return {
        "task": "prompt_refinement",
        "image": _picture(row),  # stage 2 draws this caption's picture
        "short_caption": short,
        "caption": _target(row, "caption"),
    }


def _picture_and_caption(task: str) -> Callable[[dict[str, Any], Note], dict[str, Any]]:
    def convert(row: dict[str, Any], note: Note) -> dict[str, Any]:
        return {"task": task, "image": _picture(row, needed=True), "caption": _target(row, "caption")}

    return convert


def _editing(row: dict[str, Any], note: Note, drop_last_char: bool = False) -> dict[str, Any]:
    picture = _picture(row)
    instruction = _text(row, "instruction")
    if drop_last_char:
        instruction = row["instruction"][:-1].strip()
        note("instruction: last character removed")
    if IMAGE_TOKEN in instruction:
        if picture is None:
            reason = f"'instruction' has the placeholder {IMAGE_TOKEN!r}, but the row has no picture"
            raise SkipRow(reason, "placeholder_without_picture")
        instruction = instruction.replace(IMAGE_TOKEN, "").strip()
    elif picture is not None:
        note("picture without placeholder")
    if instruction.endswith(",") and not drop_last_char:
        instruction = instruction[:-1].rstrip()
        note("instruction: trailing comma removed")
    if not instruction:
        raise SkipRow("'instruction' is empty", "empty_text")
    caption = _text(row, "ori_caption") if row.get("ori_caption") is not None or picture is None else None
    target = _target(row, "new_caption")
    return {
        "task": "editing",
        "image": picture,
        "caption": caption,
        "instruction": instruction,
        "target_caption": target,
    }


def _chat_with_picture(row: dict[str, Any], note: Note) -> dict[str, Any]:
    picture = _picture(row)
    questions = [index for index, (role, text) in enumerate(_turns(row)) if role == "user" and IMAGE_TOKEN in text]
    if picture is None:
        if questions:
            reason = f"conversations[{questions[0]}] has the placeholder {IMAGE_TOKEN!r}, but the row has no picture"
            raise SkipRow(reason, "placeholder_without_picture")
        return {"task": "qa", "messages": _conversation(_turns(row), note)}
    return {
        "task": "vqa",
        "image": picture,
        "messages": _conversation(_placed(_turns(row), note), note, has_picture=True),
    }


def _chat(row: dict[str, Any], note: Note) -> dict[str, Any]:
    if row.get("image") is not None:
        note("picture ignored")
    return {"task": "qa", "messages": _conversation(_turns(row), note)}


FORMATS: dict[str, Callable[[dict[str, Any], Note], dict[str, Any]]] = {
    "llmga_t2i": _prompt_refinement,
    "llmga_sg": _picture_and_caption("similar_image"),
    "llmga_inpainting": _picture_and_caption("inpainting"),
    "llmga_edit": _editing,
    "llmga_edit_legacy_drop_last_char": partial(_editing, drop_last_char=True),  # as the published code, whatever it is
    "llava": _chat_with_picture,
    "sharegpt": _chat,
}


# ---------------------------------------------------------------- fields


def _text(row: dict[str, Any], name: str) -> str:
    """A text that must be there, without white space around it."""
    if (value := row.get(name)) is None:
        raise SkipRow(f"{name!r} is missing", "missing_field")
    if not isinstance(value, str):
        raise SkipRow(f"{name!r} must be text, found {type(value).__name__}", "wrong_type")
    if not value.strip():
        raise SkipRow(f"{name!r} is empty", "empty_text")
    return _whole(value.strip(), repr(name))


def _target(row: dict[str, Any], name: str) -> str:
    """A text that is trained as an answer: it may hold neither tags nor placeholders."""
    if control := find_control(text := _text(row, name)):
        raise SkipRow(f"{name!r} holds the control text {control!r}", control.code)
    return text


def _whole(text: str, name: str) -> str:
    """The text, unless half a surrogate pair makes it impossible to write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SkipRow(f"{name} holds half of a surrogate pair, which is not a character", "not_utf8") from None
    return text


def _picture(row: dict[str, Any], needed: bool = False) -> str | None:
    """The picture's path with forward slashes, below the picture folder."""
    if row.get("image") is None and not needed:
        return None
    path = _text(row, "image").replace("\\", "/").removeprefix("./")
    if problem := path_problem(path):
        raise SkipRow(f"'image' is {path!r}: {problem}", problem.code)
    return path


def _turns(row: dict[str, Any]) -> Turns:
    """The turns as (role, text), roles by our names."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        if turns is None:
            raise SkipRow("'conversations' is missing", "missing_field")
        raise SkipRow("'conversations' must be a list of turns", "wrong_type")
    found = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise SkipRow(f"conversations[{index}] must be an object with the texts 'from' and 'value'", "wrong_type")
        if not (role := _ROLES.get(str(turn.get("from")))):
            reason = f"conversations[{index}].from is {turn.get('from')!r}, expected 'human' or 'gpt'"
            raise SkipRow(reason, "broken_turns")
        found.append((role, _whole(turn["value"], f"conversations[{index}]")))
    return found


def _placed(turns: Turns, note: Note) -> Turns:
    """The turns without placeholders in questions; the picture is put before the first one at load time."""
    asked = [text.count(IMAGE_TOKEN) for role, text in turns if role == "user"]
    if not sum(asked):
        note("picture without placeholder")
    elif sum(asked) > 1:
        note("several placeholders for one picture")
    elif not asked[0]:
        note("picture moved to the first question")
    return [
        (role, text.replace(IMAGE_TOKEN, "").strip() if role == "user" and IMAGE_TOKEN in text else text)
        for role, text in turns
    ]


def _conversation(turns: Turns, note: Note, has_picture: bool = False) -> tuple[Message, ...]:
    """Questions and answers in alternation; what does not pair up at the ends is dropped and noted.

    The picture is shown with the first question, which may then be without words: it was nothing but a placeholder.
    """
    if not turns:
        raise SkipRow("the conversation is empty", "empty_text")
    if turns[0][0] == "system":
        turns = turns[1:]
        note("system turn dropped")
    if turns and turns[0][0] == "assistant":
        turns = turns[1:]
        note("first turn dropped: an answer without a question")
        if not turns:
            raise SkipRow("the conversation has an answer and no question", "broken_turns")
    if turns and turns[-1][0] == "user":
        turns = turns[:-1]
        note("last turn dropped: a question without an answer")
        if not turns:
            raise SkipRow("the conversation has a question and no answer", "broken_turns")
    for index, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[index % 2]:
            expected = ("user", "assistant")[index % 2]
            raise SkipRow(f"turns do not alternate: {role!r} comes where {expected!r} should", "broken_turns")
    messages: list[Message] = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        shows_picture = has_picture and not messages
        if (question[1].strip() or shows_picture) and answer[1].strip():
            messages += [{"role": role, "content": text} for role, text in (question, answer)]
        else:
            note("empty turn dropped with its partner")
    if not messages:
        raise SkipRow("every turn of the conversation is empty", "empty_text")
    return tuple(messages)
