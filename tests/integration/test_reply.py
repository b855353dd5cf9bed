"""Hazards: replies that depend on their neighbours, pixels unlike training's, tags lost, a changed model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llmga.images import PictureMode, fit_picture
from llmga.stage1.added_tokens import add_generation_tags
from llmga.stage1.conversation import ConversationError, Turn, encode_prompt
from llmga.stage1.model import Mllm, set_trainable
from llmga.stage1.pixels import PixelEncoder
from llmga.stage1.reply import Prompt, PromptError, _drawn, generate_replies, stop_ids
from llmga.tokens import GEN_IMG
from tests.toy import toy_llava, toy_processor, toy_tokenizer

END = 262
LETTERS = list(range(64, 90))  # ids that also end a reply here, so that replies differ in length


def talkative_mllm(tags: tuple[str, ...] = ()) -> Mllm:
    """A toy LLaVA with weights large enough that each prompt gets another reply."""
    tokenizer = toy_tokenizer(tags)
    model = toy_llava(tokenizer)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return Mllm(model, toy_processor(tokenizer), GEN_IMG)


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mixed_prompts() -> list[Prompt]:
    """Texts of 1 to 60 characters, every other with a picture, one with a history."""
    prompts = [
        Prompt([Turn("user", "what is it " * (1 + index % 4) + str(index), has_picture=index % 2 == 0)])
        for index in range(9)
    ]
    history = [Turn("user", "hello", has_picture=True), Turn("assistant", "hi"), Turn("user", "and now")]
    prompts.append(Prompt(history))
    return [Prompt(p.turns, picture(i) if any(t.has_picture for t in p.turns) else None) for i, p in enumerate(prompts)]


@contextmanager
def logits_changed(mllm: Mllm, change: object) -> Iterator[None]:
    """Let `change(logits)` act on what the model's head puts out."""
    hook = mllm.model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()


def scripted(mllm: Mllm, ids: list[int]) -> str:
    """The reply when the model puts out these ids one after the other."""
    script = iter(ids)

    def force(logits: torch.Tensor) -> torch.Tensor:
        forced = torch.zeros_like(logits)
        forced[..., next(script)] = 1.0
        return forced

    with logits_changed(mllm, force):
        [reply] = generate_replies(mllm, [Prompt([Turn("user", "go")])], max_new_tokens=len(ids))
    return reply


def test_replies_equal_transformers_own_greedy_generation_one_by_one() -> None:
    mllm = talkative_mllm()
    mllm.model.generation_config.eos_token_id = [END, *LETTERS]
    prompts = mixed_prompts()
    expected = []
    for prompt in prompts:
        ids = encode_prompt(mllm.tokenizer, prompt.turns, "<image>", 4)
        shown = {}
        if prompt.picture is not None:
            shown = dict(mllm.processor.image_processor(prompt.picture, return_tensors="pt"))
        written = mllm.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **shown,
            max_new_tokens=40,
            do_sample=False,
            suppress_tokens=[258],
            pad_token_id=256,
        )[0, len(ids) :].tolist()
        written = written[:-1] if written[-1] in {END, *LETTERS} else written
        expected.append(mllm.tokenizer.decode(written, skip_special_tokens=True).strip())
    lengths = {len(text) for text in expected}
    assert len(set(expected)) == len(prompts) and max(lengths) > 2 * min(lengths)  # the comparison means something
    for batch_size in (1, 4, 32):  # alone, with some neighbours, with all; finished rows leave the batch
        assert generate_replies(mllm, prompts, max_new_tokens=40, batch_size=batch_size) == expected
    assert generate_replies(mllm, prompts[::-1], max_new_tokens=40) == expected[::-1]
    assert generate_replies(mllm, [prompts[3]], max_new_tokens=200)[0].startswith(expected[3])  # the cache grows


def test_a_picture_changes_the_reply_and_no_prompt_is_no_reply() -> None:
    mllm = talkative_mllm()
    turns = [Turn("user", "what is it", has_picture=True)]
    first, second = generate_replies(mllm, [Prompt(turns, picture(0)), Prompt(turns, picture(1))], max_new_tokens=10)
    assert first != second
    assert generate_replies(mllm, []) == []


@pytest.mark.parametrize(
    ("trained", "asked", "size", "mode"),
    [
        (None, {}, 90, "squash"),
        (None, {"picture_size": 64, "picture_mode": "crop"}, 64, "crop"),
        ((48, "pad"), {}, 48, "pad"),
        ((48, "pad"), {"picture_size": 64}, 64, "pad"),
    ],
)
def test_pixels_are_those_of_training(
    trained: tuple[int, PictureMode] | None, asked: dict[str, Any], size: int, mode: PictureMode
) -> None:
    mllm = talkative_mllm()
    if trained:
        mllm.write_picture_shape(*trained)
    photo = picture(5, width=90, height=70)
    expected = PixelEncoder(mllm.processor.image_processor)(fit_picture(photo, size, mode))
    seen = []
    hook = mllm.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values", args[0] if args else None)),
        with_kwargs=True,
    )
    prompt = Prompt([Turn("user", "a", has_picture=True)], photo)
    generate_replies(mllm, [prompt], max_new_tokens=2, **asked)
    hook.remove()
    [pixels] = seen  # once, not at every token
    np.testing.assert_array_equal(pixels[0].numpy(), expected)


def test_the_placeholder_and_rows_without_a_token_are_never_written() -> None:
    mllm = talkative_mllm()
    mllm.model.resize_token_embeddings(270, mean_resizing=False)
    prompts = mixed_prompts()

    def silence(logits: torch.Tensor) -> torch.Tensor:
        logits[..., [258, *range(263, 270)]] = -torch.inf
        return logits

    def tempt(logits: torch.Tensor) -> torch.Tensor:
        logits[..., [258, *range(263, 270)]] = 1e4
        return logits

    with logits_changed(mllm, silence):
        expected = generate_replies(mllm, prompts, max_new_tokens=8)
    with logits_changed(mllm, tempt):
        assert generate_replies(mllm, prompts, max_new_tokens=8) == expected


@pytest.mark.parametrize("special", [False, True])
def test_tags_stay_and_other_special_tokens_go(special: bool) -> None:
    mllm = talkative_mllm(("<gen_img>", "</gen_img>") if special else ())
    add_generation_tags(mllm, GEN_IMG)
    encode = mllm.tokenizer.encode
    written = encode("<|user|><pad>see <gen_img> a  red cat </gen_img><|end|>never read", add_special_tokens=False)
    assert len(written) == len("see  a  red cat never read") + 5
    assert scripted(mllm, written) == "see <gen_img> a  red cat </gen_img>"


def test_the_chat_template_says_what_ends_a_reply() -> None:
    mllm = talkative_mllm()
    assert stop_ids(mllm) == [END]
    mllm.tokenizer.eos_token = "<pad>"  # a folder whose eos is not what the template writes
    mllm.model.generation_config.eos_token_id = None
    assert stop_ids(mllm) == [256, END]
    mllm.tokenizer.chat_template = mllm.tokenizer.chat_template.replace(" generation ", " if true ").replace(
        " endgeneration ", " endif "
    )
    mllm.model.generation_config.eos_token_id = [7, 8]
    assert stop_ids(mllm) == [7, 8, 256]
    mllm.tokenizer.eos_token = None
    mllm.model.generation_config.eos_token_id = None
    with pytest.raises(PromptError, match="names a token that ends a reply"):
        generate_replies(mllm, mixed_prompts())


def test_answering_in_the_middle_of_training_changes_nothing() -> None:
    mllm = talkative_mllm()
    expected = generate_replies(mllm, mixed_prompts(), max_new_tokens=12)
    set_trainable(mllm.model, "projector+llm")
    mllm.model.activation_checkpointing_enable()
    mllm.model.config.use_cache = mllm.model.config.text_config.use_cache = False
    mllm.model.train()
    before = torch.get_rng_state()
    assert generate_replies(mllm, mixed_prompts(), max_new_tokens=12) == expected
    generate_replies(mllm, mixed_prompts(), max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert mllm.model.training and mllm.model.model.language_model.training
    assert not mllm.model.config.use_cache
    ids = torch.tensor([[257, 5, 6, END]])
    mllm.model(input_ids=ids, labels=ids).loss.backward()
    assert mllm.model.lm_head.weight.grad is not None


def test_the_mode_is_restored_after_an_error() -> None:
    mllm = talkative_mllm()
    mllm.model.train()

    def fail(logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with logits_changed(mllm, fail), pytest.raises(RuntimeError, match="out of memory"):
        generate_replies(mllm, mixed_prompts())
    assert mllm.model.training


def test_drawn_replies_depend_on_seed_and_place_and_not_on_neighbours() -> None:
    mllm = talkative_mllm()
    prompts = mixed_prompts()

    def draw(chosen: list[Prompt], seed: int = 0, batch_size: int = 32) -> list[str]:
        return generate_replies(mllm, chosen, 8, batch_size, temperature=1.5, top_p=0.95, seed=seed)

    replies = draw(prompts)
    assert draw(prompts, batch_size=1) == draw(prompts, batch_size=3) == replies
    assert draw(prompts[:4]) == replies[:4]
    assert draw(prompts, seed=1) != replies
    assert len(set(draw([prompts[0]] * 6))) > 1
    assert generate_replies(mllm, prompts, 12, temperature=1e-6) == generate_replies(mllm, prompts, 12)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits, rows = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(4000, 4), torch.arange(4000)
    chance = torch.from_numpy((np.arange(4000) + 0.5) / 4000)[:, None]

    def frequencies(temperature: float, top_p: float) -> np.ndarray:
        drawn = _drawn(chance, temperature, top_p, logits, rows, step=0)
        return np.bincount(drawn.numpy(), minlength=4) / 4000

    np.testing.assert_allclose(frequencies(2.0, 1.0), (logits[0] / 2.0).softmax(dim=-1), atol=1e-3)
    # Probabilities are 0.64, 0.24, 0.09, 0.03: the first two reach 0.8, the first alone 0.6.
    np.testing.assert_allclose(frequencies(1.0, 0.8), [0, 0.7311, 0.2689, 0], atol=1e-3)
    np.testing.assert_allclose(frequencies(1.0, 0.6), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (Prompt([Turn("user", "a")], picture(0)), {}, "prompt 0 has a picture, but 0 of its turns show one"),
        (Prompt([Turn("user", "a", has_picture=True)]), {}, "prompt 0 has no picture, but 1 of its turns"),
        (Prompt([Turn("user", "a")]), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (Prompt([Turn("user", "a")]), {"temperature": -1.0}, r"temperature is -1\.0"),
        (Prompt([Turn("user", "a")]), {"top_p": 0.0}, r"top_p 0\.0"),
        (Prompt([Turn("user", "a"), Turn("assistant", "b")]), {}, "nothing to answer"),
    ],
)
def test_bad_prompts_are_named(prompt: Prompt, settings: dict[str, float], message: str) -> None:
    with pytest.raises((PromptError, ConversationError), match=message):
        generate_replies(talkative_mllm(), [prompt], **settings)  # type: ignore[arg-type]
