"""Prompts in, replies out, many at a time; a reply does not depend on what else is in its batch.

The loop is our own rather than transformers' `generate` for two reasons that count in an evaluation of thousands of
replies: rows that have finished leave the batch, and the key-value cache grows in place. Measured in CPU time on one
core with 64 prompts and a 4-layer LLM 256 wide: 1.7 times the tokens per second of `generate` with replies of 90 to 150
tokens, 1.8 times when half of the replies are one word. The tokens are the same (tests/integration/test_reply.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from llmga.images import PictureMode, fit_picture
from llmga.runtime import zero3_is_on
from llmga.stage1.conversation import ConversationError, Prompt, Turn, encode_conversation, encode_prompt
from llmga.stage1.growing_cache import growing_cache
from llmga.stage1.model import Mllm
from llmga.stage1.pixels import PixelEncoder

_COMPACT_SHARE = 0.75  # finished rows leave when at most this share of the batch is still writing


class PromptError(ValueError):
    """A prompt or a setting that no reply can be made from."""


def generate_replies(
    mllm: Mllm,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 512,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
    picture_size: int | None = None,
    picture_mode: PictureMode | None = None,
) -> list[str]:
    """Answer prompts, those with a picture and those without in the same batches.

    Works in the middle of training: the model's mode is restored and no global generator is touched. Under ZeRO-3 all
    ranks call it with the same prompts and get rank 0's replies.

    Args:
        max_new_tokens: a reply that is not finished by then is cut.
        temperature: 0 takes the likeliest token, greedily; above, tokens are drawn from logits / temperature.
        top_p: draw among the likeliest tokens that together reach this probability.
        seed: prompt i draws from a generator made of (seed, i).
        seeds: instead, one seed for each prompt: its reply is then the same at any place of any list.
        progress: show a bar.
        picture_size: bring pictures to a square of this side first, as training does; None takes the side that the
            model was trained with. Where its folder does not say, squares stay and others are squashed to their longer
            side.
        picture_mode: how, see `fit_picture`; None takes the one that the model was trained with.
    Returns:
        One text per prompt, in order, stripped, generation tags kept and other special tokens left out.
    Raises:
        PromptError: picture and turns do not agree, a setting is out of range, or nothing would stop a reply.
        ConversationError: a conversation that does not end with a question.
    """
    _check_settings(max_new_tokens, batch_size, temperature, top_p)
    encoded = [_encoded(mllm, prompt, position) for position, prompt in enumerate(prompts)]
    stop = stop_ids(mllm)
    trained_size, trained_mode = mllm.picture_shape
    shape = partial(_shaped, size=picture_size or trained_size, mode=picture_mode or trained_mode)
    pixels = PixelEncoder(mllm.processor.image_processor)
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]), reverse=True)
    replies = [""] * len(prompts)
    with _evaluating(mllm.model), tqdm(total=len(prompts), disable=not progress, unit="reply") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            pictures = [pixels(shape(picture)) for index in batch if (picture := prompts[index].picture) is not None]
            own = [[seed, index] if seeds is None else [seeds[index]] for index in batch]
            choose = _choice(own, max_new_tokens, temperature, top_p)
            written = _write(mllm, [encoded[index] for index in batch], pictures, choose, max_new_tokens, stop)
            for index, ids in zip(batch, written, strict=True):
                replies[index] = _text(mllm, ids)
            bar.update(len(batch))
    return replies


def stop_ids(mllm: Mllm) -> list[int]:
    """Ids that end a reply: what the chat template lets an answer end with, and the end tokens of the folder.

    Raises:
        PromptError: there are none, so every reply would run to `max_new_tokens`.
    """
    tokenizer, configured = mllm.tokenizer, mllm.model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
    with suppress(ConversationError):  # a template that marks no answers: only its folder can say what ends one
        probe = [Turn("user", "a"), Turn("assistant", "b")]
        labels = encode_conversation(tokenizer, probe, mllm.processor.image_token, mllm.num_image_tokens).labels
        found |= set(labels) & set(tokenizer.added_tokens_decoder)
    if not found:
        raise PromptError("neither the chat template nor the tokenizer names a token that ends a reply; set eos_token")
    return sorted(int(token) for token in found)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and the former mode back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


# ---------------------------------------------------------------- the loop

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""(logits (B, V), rows of the batch they belong to (B,), step) -> ids (B,)"""


def _choice(seeds: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float) -> Choose:
    """How the tokens of a batch are chosen: the likeliest ones, or drawn by a generator of each prompt's own."""
    if temperature == 0:
        return _likeliest
    chance = np.stack([np.random.default_rng(own).random(max_new_tokens) for own in seeds])
    return partial(_drawn, torch.from_numpy(chance), temperature, top_p)


@dataclass
class _Rows:
    """The rows of a batch that are still in the model's hands.

    Attributes:
        numbers: (R,) which reply each row belongs to.
        writing: (R,) bool, whether it goes on.
        input_ids: (R, L), what the model sees next: the prompts, padded on the left, then one token each.
        attention_mask: (R, longest prompt + max_new_tokens), padding 0.
        position_ids: (R, L).
        cache: what the model has seen.
        seen: how many tokens of each row that is, padding included.
    """

    numbers: Tensor
    writing: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    cache: DynamicCache
    seen: int = 0

    @classmethod
    def of(cls, mllm: Mllm, prompts: Sequence[list[int]], max_new_tokens: int) -> "_Rows":
        """The rows before the first token."""
        device, pad_id, width = mllm.model.device, mllm.tokenizer.pad_token_id or 0, max(map(len, prompts))
        input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=device)
        seen = [[0] * (width - len(ids)) + [1] * (len(ids) + max_new_tokens) for ids in prompts]
        mask = torch.tensor(seen, device=device)
        positions = (mask[:, :width].cumsum(dim=1) - 1).clamp(min=0)
        numbers = torch.arange(len(prompts), device=device)
        writing = torch.ones_like(numbers, dtype=torch.bool)
        return cls(numbers, writing, input_ids, mask, positions, growing_cache(mllm.model))

    def next_logits(self, model: torch.nn.Module, pictures: Tensor | None) -> Tensor:
        """(R, V) of the token behind each row."""
        self.seen += self.input_ids.shape[1]
        output = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask[:, : self.seen],
            position_ids=self.position_ids,
            pixel_values=pictures,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def append(self, next_ids: Tensor) -> None:
        """Go on behind these tokens (R,); rows that have finished leave, once they are many."""
        self.input_ids, self.position_ids = next_ids[:, None], self.position_ids[:, -1:] + 1
        if int(self.writing.sum()) > _COMPACT_SHARE * len(self.numbers):
            return
        keep = self.writing.nonzero().squeeze(1)
        self.cache.batch_select_indices(keep)
        self.numbers, self.writing = self.numbers[keep], self.writing[keep]
        self.input_ids, self.position_ids = self.input_ids[keep], self.position_ids[keep]
        self.attention_mask = self.attention_mask[keep]


def _write(
    mllm: Mllm,
    prompts: Sequence[list[int]],
    pixel_values: Sequence[np.ndarray],
    choose: Choose,
    max_new_tokens: int,
    stop: Sequence[int],
) -> list[list[int]]:
    """Write one batch of replies as ids, without their terminators.

    Args:
        prompts: ids of each prompt.
        pixel_values: of the prompts that have a picture, in their order.
    """
    model, device = mllm.model, mllm.model.device
    pictures = torch.from_numpy(np.stack(pixel_values)).to(device, model.dtype) if len(pixel_values) else None
    never, ends = _never_written(mllm).to(device), torch.tensor(stop, device=device)
    rows = _Rows.of(mllm, prompts, max_new_tokens)
    replies: list[list[int]] = [[] for _ in prompts]
    together = zero3_is_on()  # each rank holds a part of the model: all must run the same steps
    for step in range(max_new_tokens):
        logits = rows.next_logits(model, pictures if step == 0 else None)
        logits[:, never] = -torch.inf
        next_ids = choose(logits, rows.numbers, step)
        if together:
            dist.broadcast(next_ids, src=0)
        rows.writing &= ~torch.isin(next_ids, ends)
        for number, token, goes_on in zip(rows.numbers.tolist(), next_ids.tolist(), rows.writing.tolist(), strict=True):
            if goes_on:
                replies[number].append(token)
        if not rows.writing.any():
            break
        rows.append(next_ids)
    return replies


# ---------------------------------------------------------------- the next token


def _likeliest(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    return logits.argmax(dim=-1)


def _drawn(chance: Tensor, temperature: float, top_p: float, logits: Tensor, rows: Tensor, step: int) -> Tensor:
    """Draw each row's token with its own number in [0, 1) of this step, so that neighbours make no difference."""
    probabilities, ids = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probabilities.cumsum(dim=-1)
    last = (reached - probabilities < top_p).sum(dim=-1, keepdim=True) - 1
    target = chance[rows.cpu(), step].to(reached)[:, None] * reached.gather(1, last)
    position = torch.searchsorted(reached, target, right=True)
    return ids.gather(1, torch.minimum(position, last)).squeeze(1)


def _never_written(mllm: Mllm) -> Tensor:
    """The picture placeholder, and rows of the output that stand for no token."""
    rows = mllm.model.config.text_config.vocab_size
    return torch.tensor([mllm.image_token_id, *range(len(mllm.tokenizer), rows)])


def _text(mllm: Mllm, ids: Sequence[int]) -> str:
    """Ids as text: special tokens left out, generation tags kept even in folders that declare them special."""
    tokenizer = mllm.tokenizer
    tags = {mllm.tags.open, mllm.tags.close}
    silent = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    silent -= {index for index, token in tokenizer.added_tokens_decoder.items() if token.content in tags}
    kept = [token for token in ids if token not in silent]
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)).strip()


# ---------------------------------------------------------------- what comes in


def _shaped(picture: Image.Image, size: int | None, mode: PictureMode) -> Image.Image:
    """The picture as a square; one that is such a square already stays as it is."""
    if picture.size == (size or picture.width,) * 2:
        return picture
    return fit_picture(picture, size, mode) if size else fit_picture(picture, max(picture.size), "squash")


def _encoded(mllm: Mllm, prompt: Prompt, position: int) -> list[int]:
    """The ids of a prompt, once it is known that picture and turns agree."""
    _check_picture(prompt, position)
    return encode_prompt(mllm.tokenizer, prompt.turns, mllm.processor.image_token, mllm.num_image_tokens)


def _check_picture(prompt: Prompt, position: int) -> None:
    shown = sum(turn.has_picture for turn in prompt.turns)
    if shown != (prompt.picture is not None):
        has = "a picture" if prompt.picture is not None else "no picture"
        raise PromptError(
            f"prompt {position} has {has}, but {shown} of its turns show one; set has_picture on the turn it belongs to"
        )


def _check_settings(max_new_tokens: int, batch_size: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1 or batch_size < 1:
        raise PromptError(f"max_new_tokens is {max_new_tokens}, batch_size {batch_size}; expected 1 or more")
    if temperature < 0 or not 0 < top_p <= 1:
        raise PromptError(f"temperature is {temperature}, top_p {top_p}; expected at least 0, and above 0 up to 1")
