"""Which held-out conversations the model answers while it learns, and the answering."""

from collections.abc import Mapping, Sequence

import numpy as np

from llmga.stage1.data import Stage1Dataset
from llmga.stage1.model import Mllm
from llmga.stage1.reply import Prompt, generate_replies
from llmga.stage1.sample_page import Question


def draw_questions(held_out: Mapping[str, Stage1Dataset], count: int) -> list[Question]:
    """Choose `count` conversations, spread evenly over the held-out sets and over the rows of each."""
    names = list(held_out)
    questions = []
    for position, name in enumerate(names):
        share = count // len(names) + (position < count % len(names))
        dataset = held_out[name]
        for index in np.linspace(0, len(dataset) - 1, min(share, len(dataset))).round().astype(int):
            sample = dataset.sample(int(index))
            *turns, answer = sample.example.messages
            title = f"{sample.record.task.replace('_', ' ')} · {name}"
            questions.append(Question(tuple(turns), answer.content, sample.example.picture, title))
    return questions


def answer_questions(mllm: Mllm, questions: Sequence[Question], max_new_tokens: int, batch_size: int) -> list[str]:
    """Answer greedily with the model as it is now. Under ZeRO-3 all ranks must call this together."""
    prompts = [Prompt(question.turns, question.picture) for question in questions]
    return generate_replies(mllm, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
