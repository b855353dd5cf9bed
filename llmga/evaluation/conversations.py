"""Conversations in which the same picture is asked for again and again, with other talk between.

Requests and talk are drawn by a row's id, and answers to the talk are those of its rows: what surrounds a system's own
replies is the same for all systems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmga.evaluation.bench import Work
from llmga.evaluation.paint import device_of
from llmga.evaluation.rows import Rows, RowsError
from llmga.evaluation.table_configs import TalkerConfig, TurnsConfig
from llmga.metrics.item_store import ItemStore
from llmga.records import Record
from llmga.stage1.conversation import Turn
from llmga.stage1.record.engines import folder_hash
from llmga.stage1.tasks import TaskSettings, build_example
from llmga.tokens import parse_reply


@dataclass(frozen=True)
class Conversation:
    """What is said by others than the system.

    Attributes:
        request: asked in every turn.
        talk: questions and answers between two turns, one fewer than there are turns.
    """

    request: str
    talk: tuple[tuple[str, str], ...]

    def until(self, replies: Sequence[str]) -> list[Turn]:
        """The turns up to the next request, the system's own replies in their places."""
        turns = []
        for reply, (question, answer) in zip(replies, self.talk, strict=False):
            said = (("user", self.request), ("assistant", reply), ("user", question), ("assistant", answer))
            turns += [Turn(role, text) for role, text in said]  # type: ignore[arg-type]
        return [*turns, Turn("user", self.request)]


def conversations_of(config: TurnsConfig, rows: Rows, talk: Rows) -> dict[str, Conversation]:
    """A conversation for each row.

    Raises:
        RowsError: a row cannot be asked for, or the talk has no messages.
    """
    exchanges = [pair for record in talk.records.values() for pair in _exchanges(record)]
    if len(exchanges) < config.turns - 1:
        raise RowsError(f"{talk.config.path} has {len(exchanges)} questions with answers; expected {config.turns - 1}")
    settings = TaskSettings(refine_generate_share=1.0, phrasing=config.phrasing)
    found = {}
    for id, record in rows.records.items():
        rng = np.random.default_rng([config.seed, int.from_bytes(sha256(id.encode()).digest()[:8])])
        example = build_example(record, rng, settings, _no_picture)
        chosen = rng.choice(len(exchanges), config.turns - 1, replace=False)
        found[id] = Conversation(example.messages[0].content, tuple(exchanges[number] for number in chosen))
    return found


def answer_share(
    config: TurnsConfig, system: TalkerConfig, conversations: dict[str, Conversation], work: Work
) -> list[ItemStore]:
    """Have a system answer this process's share of the conversations, turn by turn, as far as it has not.

    Returns:
        A store for each turn, with the column `reply`.
    """
    assert system.mllm is not None
    made_by = {
        "mllm": folder_hash(system.mllm),
        "conversations": sha256(repr(conversations).encode()).hexdigest(),
        "max_new_tokens": config.max_new_tokens,
        "precision": config.precision,
    }
    folder = config.out / "replies" / system.name
    stores = [ItemStore(folder, {**made_by, "turn": turn}) for turn in range(1, config.turns + 1)]
    states = dict.fromkeys(work.mine(list(conversations)), "")
    missing = [store.missing(states) for store in stores]
    answer = _answerer(config, system.mllm, work) if any(missing) else None
    for turn, (store, ids) in enumerate(zip(stores, missing, strict=True), 1):
        for batch in work.batches(f"{system.name} answers, turn {turn}", ids, config.answers_at_once):
            own = [earlier.read(dict.fromkeys(batch, ""))["reply"] for earlier in stores[: turn - 1]]
            asked = [conversations[id].until([before[row] for before in own]) for row, id in enumerate(batch)]
            assert answer is not None
            store.add(dict.fromkeys(batch, ""), {"reply": np.array(answer(asked), dtype=str)})
    return stores


def prompt_of(reply: str) -> str:
    """What a reply asks to be painted; nothing where it asks for no picture, or wrongly."""
    found = parse_reply(reply)
    return found.prompts[0] if found.well_formed and len(found.prompts) == 1 else ""


def _answerer(config: TurnsConfig, folder: Path, work: Work) -> Any:
    """Greedy replies of an MLLM to conversations."""
    import torch

    from llmga.stage1.model import load_mllm
    from llmga.stage1.reply import Prompt, generate_replies

    mllm = load_mllm(folder, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    mllm.model.to(device_of(work.ranks))

    def answer(conversations: Sequence[Sequence[Turn]]) -> list[str]:
        prompts = [Prompt(turns) for turns in conversations]
        return generate_replies(mllm, prompts, config.max_new_tokens, config.answers_at_once)

    return answer


def _exchanges(record: Record) -> list[tuple[str, str]]:
    """Questions of a row and the answers that follow them; a row about a picture has none, since it is not shown."""
    said = [(message["role"], message["content"]) for message in record.messages or ()] if not record.image else []
    return [(q, a) for (who, q), (whom, a) in pairwise(said) if (who, whom) == ("user", "assistant")]


def _no_picture(name: str) -> Any:
    raise RowsError(f"{name}: rows of this evaluation ask for pictures in words; take those of prompt_refinement")
