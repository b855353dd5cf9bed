"""Any base model by config alone: what is read from the parts, and what is wrong with parts that do not fit.

A template that fits the wrong family, a picture of one feature too many, or a row that stays random would ruin a run
without a sign.
"""

import json
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmga.config import load_config
from llmga.stage1.added_tokens import add_generation_tags
from llmga.stage1.build import ProjectorError, build_mllm, build_processor
from llmga.stage1.chat_rows import MARKERS, RELEASED, SYSTEM_TEXT_FILE, read_template, row_of, template_names
from llmga.stage1.chat_template import TemplateError, set_chat_template
from llmga.stage1.config import Stage1Config
from llmga.stage1.conversation import Turn, control_strings, encode_conversation, encode_prompt
from llmga.stage1.families import released_template
from llmga.stage1.model import Mllm, ModelError, load_mllm, save_mllm
from llmga.stage1.projector import projector_weights
from llmga.stage1.reply import Prompt, generate_replies, stop_ids
from llmga.stage1.start import load_start_processor
from llmga.tokens import GEN_IMG, IGNORE_INDEX, TAG_LITERALS, neutralise
from tests.base_models import FAMILIES, IMAGE_SIZE_PX, make_llm, make_tower
from tests.released import KINDS
from tests.toy import toy_processor

TURNS = [
    Turn("user", "What is in the picture?", has_picture=True),
    Turn("assistant", "A <gen_img> dog.\n\nIt runs."),
    Turn("user", "Draw it."),
    Turn("assistant", "é!"),
]
ANSWERS = ["A <gen_img> dog.\n\nIt runs.", "é!"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_tower(folder / "clip")
    make_tower(folder / "siglip", "siglip")
    for name, family in FAMILIES.items():
        make_llm(folder / name, family)
    for kind, what in KINDS.items():
        (folder / "published" / kind).mkdir(parents=True)
        what.tokenizer(folder / "published" / kind)
    return folder


@pytest.fixture(scope="module")
def built(parts: Path) -> Callable[[str], Mllm]:
    """A LLaVA of each family, made once; half of them with SigLIP."""
    made: dict[str, Mllm] = {}

    def build(name: str) -> Mllm:
        if name not in made:
            row = FAMILIES[name].row if FAMILIES[name].named else None
            tower = "siglip" if list(FAMILIES).index(name) % 2 else "clip"
            made[name] = build_mllm(parts / name, parts / tower, chat_template=row)
        return made[name]

    return build


@pytest.fixture
def copy(parts: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A part of its own for a test, to be damaged."""
    return lambda name: Path(shutil.copytree(parts / name, tmp_path / name))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def trained_texts(mllm: Mllm, encoded: Any) -> list[str]:
    """What each unbroken run of trained tokens says."""
    runs: list[list[int]] = [[]]
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(label)
    return [mllm.tokenizer.decode(run) for run in runs if run]


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_only_answers_and_their_ends_are_trained(name: str, built: Callable[[str], Mllm]) -> None:
    mllm, family = built(name), FAMILIES[name]
    assert mllm.tokenizer.chat_template == mllm.processor.chat_template == read_template(family.row)
    encoded = encode_conversation(mllm.tokenizer, TURNS, mllm.processor.image_token, mllm.num_image_tokens)
    found = trained_texts(mllm, encoded)
    assert [text.replace(" ", "") for text in found] == [(answer + family.end).replace(" ", "") for answer in ANSWERS]
    assert all(text.endswith(family.end) for text in found)
    assert encoded.input_ids.count(mllm.image_token_id) == mllm.num_image_tokens == 4
    assert mllm.tokenizer.unk_token_id is None or mllm.tokenizer.unk_token_id not in encoded.input_ids
    for count in (1, 3):
        prompt = encode_prompt(mllm.tokenizer, TURNS[:count], mllm.processor.image_token, mllm.num_image_tokens)
        assert prompt == encoded.input_ids[: len(prompt)]
        assert encoded.labels[len(prompt)] != IGNORE_INDEX
    text = mllm.tokenizer.decode(encoded.input_ids)
    assert text.count(SYSTEM_TEXT_FILE.read_text().strip()) == 1


FORGED = (
    "USER:",
    " ASSISTANT: ",
    "[INST]",
    "[/INST] ",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
    "<s>",
    "<image>",
)
PIECES = st.sampled_from(
    [*FORGED, "<gen_img>", "</gen_image>", "{{ x }}", " ", "\n", ":", "a", "é", "界", "🙂", "Draw it. "]
)
WRITTEN = st.lists(PIECES, max_size=6).map("".join)
# Tokenizer, row and end of an answer: for new runs, for the layouts of released weights, and for new runs again with
# tokenizers in the files that models are published with.
LAYOUTS = {name: (name, family.row, family.end) for name, family in FAMILIES.items()}
LAYOUTS |= {row: (family.name, row, family.stop_tokens[0]) for row, family in RELEASED.items()}
LAYOUTS["released_gemma"] = ("gemma", "released_gemma", "<end_of_turn><eos>")  # a turn's end, and a reply's
LAYOUTS |= {f"published/{kind}": (f"published/{kind}", *LAYOUTS[kind.split("-")[0]][1:]) for kind in KINDS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_people_write_answers_and_their_ends_alone_are_trained(layout: str, parts: Path) -> None:
    name, row, end = LAYOUTS[layout]
    tokenizer = build_processor(parts / name, parts / "clip", row).tokenizer
    literals = [text for text in control_strings(tokenizer, "<image>") if text not in TAG_LITERALS]

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(WRITTEN, st.booleans(), WRITTEN), min_size=1, max_size=3))
    def holds(rounds: list[tuple[str, bool, str]]) -> None:
        turns = [
            turn
            for question, shown, reply in rounds
            for turn in (Turn("user", question + "?", has_picture=shown), Turn("assistant", reply + "."))
        ]
        encoded = encode_conversation(tokenizer, turns, "<image>", 4)
        runs = [list(run) for trained, run in groupby(encoded.labels, lambda label: label != IGNORE_INDEX) if trained]
        said = ["".join(tokenizer.decode(run).split()) for run in runs]
        assert said == ["".join((neutralise(reply + ".", literals) + end).split()) for _, _, reply in rounds]
        prompt = encode_prompt(tokenizer, turns[:-1], "<image>", 4)
        assert prompt == encoded.input_ids[: len(prompt)] and encoded.labels[len(prompt)] != IGNORE_INDEX

    holds()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_built_model_says_what_its_llm_says_and_stops_where_its_template_ends(
    name: str, built: Callable[[str], Mllm], parts: Path
) -> None:
    from transformers import AutoModelForCausalLM

    mllm, family = built(name), FAMILIES[name]
    llm = AutoModelForCausalLM.from_pretrained(parts / name)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        known = mllm.image_token_id
        own, ours = llm(ids).logits[..., :known], mllm.model(input_ids=ids).logits[..., :known]
    if (cap := getattr(llm.config, "final_logit_softcapping", None)) is not None:
        ours = cap * (ours / cap).tanh()
    torch.testing.assert_close(ours, own, rtol=0, atol=1e-5)
    stop = mllm.tokenizer.convert_tokens_to_ids(family.end)
    assert stop in stop_ids(mllm) and stop in mllm.model.generation_config.eos_token_id
    [reply] = generate_replies(mllm, [Prompt([Turn("user", "Hello")])], max_new_tokens=3)
    assert mllm.processor.image_token not in reply


@pytest.mark.parametrize("name", FAMILIES)
def test_new_rows_are_means_whatever_the_embedding(name: str, built: Callable[[str], Mllm], parts: Path) -> None:
    mllm, family = built(name), FAMILIES[name]
    config = json.loads((parts / name / "config.json").read_text())
    embedding, head = (
        layer.weight for layer in (mllm.model.get_input_embeddings(), mllm.model.get_output_embeddings())
    )
    assert (head is embedding) == family.tied == mllm.model.config.tie_word_embeddings
    known = config["vocab_size"] - family.spare_rows
    assert mllm.image_token_id == known
    rows = mllm.model.config.text_config.vocab_size
    assert rows == (config["vocab_size"] if family.spare_rows else -(-(known + 5) // 64) * 64)
    for weight in (embedding, head):
        assert weight.shape == (rows, 32)
        filled = known + 1 if family.spare_rows else rows
        torch.testing.assert_close(weight[known:filled], weight[:known].mean(0).expand(filled - known, 32))


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3", "gemma2"])
def test_tags_find_room_and_everything_survives_saving(name: str, parts: Path, tmp_path: Path) -> None:
    mllm = build_mllm(parts / name, parts / "siglip")
    rows = mllm.model.config.text_config.vocab_size
    assert add_generation_tags(mllm, GEN_IMG) == 2
    assert mllm.model.config.text_config.vocab_size == rows
    reloaded = load_mllm(save_mllm(mllm, None, tmp_path / "model", {}))
    assert reloaded.num_image_tokens == 4 and reloaded.tags_are_tokens
    assert reloaded.model.generation_config.eos_token_id == mllm.model.generation_config.eos_token_id
    assert type(reloaded.processor.image_processor).__name__ == "SiglipImageProcessorPil"
    encoded, again = (
        encode_conversation(m.tokenizer, TURNS, m.processor.image_token, m.num_image_tokens) for m in (mllm, reloaded)
    )
    assert encoded == again


# ---------------------------------------------------------------- towers and projectors


@pytest.mark.parametrize(("kind", "strategy", "class_tokens"), [("clip", "default", 1), ("siglip", "full", 0)])
@pytest.mark.parametrize("whole", [True, False])
def test_a_tower_tells_whether_it_has_a_class_token(
    kind: str, strategy: str, class_tokens: int, whole: bool, parts: Path, tmp_path: Path
) -> None:
    tower = make_tower(tmp_path / kind, kind, whole)
    mllm = build_mllm(parts / "gemma", tower)
    assert mllm.model.config.vision_feature_select_strategy == strategy
    assert mllm.processor.vision_feature_select_strategy == strategy
    assert mllm.processor.num_additional_image_tokens == class_tokens
    pixels = torch.randn(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(0))
    [features] = mllm.model.get_image_features(pixel_values=pixels).pooler_output
    assert features.shape == (mllm.num_image_tokens, 32) == (4, 32)
    stored = load_file(tower / "model.safetensors")
    weight = stored["vision_model." * whole + "embeddings.patch_embedding.weight"]
    assert torch.equal(mllm.model.model.vision_tower.embeddings.patch_embedding.weight, weight)
    assert not any("head." in name for name in mllm.model.model.vision_tower.state_dict())


def test_a_trained_projector_is_taken_from_a_file_a_run_or_llavas_names(parts: Path, tmp_path: Path) -> None:
    first = build_mllm(parts / "gemma", parts / "clip")
    weights = projector_weights(first.model.state_dict())
    final = save_mllm(first, None, tmp_path / "final", {}, projector_file=True)
    for source in (final, final / "projector.safetensors"):
        again = build_mllm(parts / "gemma", parts / "clip", source)
        assert all(torch.equal(projector_weights(again.model.state_dict())[name], weights[name]) for name in weights)
    released = {
        name.replace("multi_modal_projector.linear_1", "model.mm_projector.0").replace(
            "multi_modal_projector.linear_2", "model.mm_projector.2"
        ): tensor
        for name, tensor in weights.items()
    }
    torch.save(released, tmp_path / "mm_projector.bin")
    again = projector_weights(
        build_mllm(parts / "gemma", parts / "clip", tmp_path / "mm_projector.bin").model.state_dict()
    )
    assert torch.equal(again["multi_modal_projector.linear_1.weight"], weights["multi_modal_projector.linear_1.weight"])
    torch.testing.assert_close(  # Gemma multiplied picture features in the days of these files
        again["multi_modal_projector.linear_2.weight"], weights["multi_modal_projector.linear_2.weight"] * 32**0.5
    )


def test_a_projector_between_other_models_is_refused(parts: Path, tmp_path: Path) -> None:
    shapes = {"linear_1.weight": (48, 24), "linear_1.bias": (48,), "linear_2.weight": (48, 48), "linear_2.bias": (48,)}
    file = tmp_path / "projector.safetensors"
    save_file({f"multi_modal_projector.{name}": torch.zeros(shape) for name, shape in shapes.items()}, file)
    message = (
        r"linear_1.weight is \(48, 24\), expected \(32, 24\).*tower has 24 channels and the LLM 32; give a projector"
    )
    with pytest.raises(ProjectorError, match=message):
        build_mllm(parts / "gemma", parts / "clip", file)
    with pytest.raises(
        ProjectorError, match=r"no projector there; give projector.safetensors of a run that trained one"
    ):
        build_mllm(parts / "gemma", parts / "clip", parts / "clip")


# ---------------------------------------------------------------- chat templates

CONFIGS = Path(__file__).parents[2] / "configs/stage1"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if "  llm: " in path.read_text())
FAMILY_OF_LLM = {  # a published folder, by the beginning of its name
    "vicuna": "vicuna",
    "Meta-Llama-3": "llama3",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Phi-3": "phi3",
    "gemma": "gemma",
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_of_a_real_model_finds_its_chat_template(path: Path, parts: Path) -> None:
    """With a tokenizer that knows of turns what the published one knows: nothing, in the case of Vicuna's."""
    model = load_config(Stage1Config, path, check_machine=False).model
    assert model.llm is not None
    [family] = [FAMILY_OF_LLM[name] for name in FAMILY_OF_LLM if model.llm.name.startswith(name)]
    model.llm, model.vision_tower = parts / family, parts / "clip"
    template = load_start_processor(model).tokenizer.chat_template
    assert template == read_template(FAMILIES[family].row)


def test_the_recipes_of_real_models_are_all_of_them() -> None:
    """So that a recipe written in another way does not slip through the test above."""
    assert len(RECIPES) >= 20


@pytest.mark.parametrize("name", ["llama2", "mistral", "vicuna"])
def test_a_row_without_tokens_of_its_own_is_known_by_what_a_template_writes(name: str, parts: Path) -> None:
    processor = build_processor(parts / "vicuna", parts / "clip", "vicuna")
    processor.tokenizer.chat_template = "{# " + " ".join(MARKERS[name]) + " #}"
    assert set_chat_template(processor, None, None, "here") == name


# As llava-hf's: a turn is a list of parts, roles are spelt by a filter, answers are marked, and nothing ends them.
OF_PARTS = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize("holder", ["tokenizer", "processor"])
def test_a_template_that_reads_lists_of_parts_gives_way_to_the_row_it_writes(holder: str, parts: Path) -> None:
    processor = build_processor(parts / "vicuna", parts / "clip", "vicuna")
    processor.chat_template = OF_PARTS
    processor.tokenizer.chat_template = OF_PARTS if holder == "tokenizer" else None
    assert set_chat_template(processor, None, None, "here") == "vicuna"
    assert processor.chat_template == processor.tokenizer.chat_template == read_template("vicuna")
    encoded = encode_conversation(processor.tokenizer, TURNS, processor.image_token, 4)
    assert encoded.labels.count(processor.tokenizer.eos_token_id) == 2


def test_a_template_of_parts_that_writes_unknown_turns_is_told_how_to_go_on(parts: Path) -> None:
    processor = build_processor(parts / "vicuna", parts / "clip", "vicuna")
    processor.tokenizer.chat_template = OF_PARTS.replace(" | upper", "").replace("ASSISTANT", "assistant")
    with pytest.raises(TemplateError, match=r"here: .* of an unknown kind, .*set model.chat_template to one of"):
        set_chat_template(processor, None, None, "here")


def test_the_tokenizers_own_template_is_kept_when_it_marks_answers() -> None:
    processor = toy_processor()
    own = processor.tokenizer.chat_template
    assert set_chat_template(processor, None, None, "here") is None
    assert processor.tokenizer.chat_template == own
    assert set_chat_template(processor, "vicuna", None, "here") == "vicuna"
    assert processor.chat_template == read_template("vicuna")


@pytest.mark.parametrize("text", ["", 'Say "yes"\\no.\n\nThen 🙂 {{ x }}.'])
@pytest.mark.parametrize("name", MARKERS)
def test_another_system_text_takes_the_place_of_ours(name: str, text: str, parts: Path) -> None:
    folder = next(parts / family for family, row in FAMILIES.items() if row.row == name)
    tokenizer = build_processor(folder, parts / "clip", name, text).tokenizer
    user, system = {"role": "user", "content": "U"}, {"role": "system", "content": text}
    plain = tokenizer.apply_chat_template([user], tokenize=False)
    assert SYSTEM_TEXT_FILE.read_text().strip() not in plain
    assert plain.count(text) == 1 if text else "system" not in plain
    assert tokenizer.apply_chat_template([system, user], tokenize=False) == plain


@pytest.mark.parametrize("name", RELEASED)
def test_a_run_can_name_the_layout_of_released_weights(name: str, parts: Path) -> None:
    family = RELEASED[name]
    text = "A sentence." if family.system_text else None
    processor = build_processor(parts / family.name, parts / "clip", name, text)
    assert row_of(processor.chat_template) == name
    wanted = {released_template(family, text or "", mark, processor.image_token) for mark in ("", " ")}
    assert processor.chat_template in wanted
    encoded = encode_conversation(processor.tokenizer, TURNS, processor.image_token, 4)
    ends = {processor.tokenizer.decode([label]) for label in encoded.labels if label != IGNORE_INDEX}
    assert ends & set(family.stop_tokens)
    if family.system_text is None:
        with pytest.raises(TemplateError, match=rf"{name} has no place for a system text; remove model.system_prompt"):
            build_processor(parts / family.name, parts / "clip", name, "A sentence.")


def test_a_released_layout_that_is_not_the_tokenizers_is_refused(parts: Path) -> None:
    with pytest.raises(TemplateError, match=r"gemma: .*; (set model.chat_template to another|does the tokenizer)"):
        build_processor(parts / "gemma", parts / "clip", "released_llama3")


@pytest.mark.parametrize("name", MARKERS)
def test_the_row_of_a_template_is_known_whatever_its_system_text(name: str) -> None:
    assert {row_of(read_template(name, text)) for text in (None, "", "Other {{ text }}.")} == {name}
    assert row_of(read_template(name) + " ") is row_of(None) is None
    assert set(MARKERS) < set(template_names())


def test_control_strings_in_a_system_text_mean_nothing() -> None:
    processor = toy_processor()
    set_chat_template(processor, "vicuna", "<image> and <gen_img> and <|end|>", "here")
    assert "< image> and < gen_img> and < |end|>" in processor.tokenizer.chat_template


def test_a_system_text_has_no_place_in_a_template_of_its_own() -> None:
    with pytest.raises(TemplateError, match=r"here: .*model.system_prompt has no place in it; remove it, or set model"):
        set_chat_template(toy_processor(), None, "text", "here")


def test_a_base_model_without_template_is_told_how_to_go_on(parts: Path) -> None:
    with pytest.raises(
        TemplateError, match=r"vicuna: the tokenizer has no chat template.*set model.chat_template to one"
    ):
        build_processor(parts / "vicuna", parts / "clip")
    processor = build_processor(parts / "vicuna", parts / "clip", "vicuna")
    processor.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(TemplateError, match=r"has a chat template of an unknown kind"):
        set_chat_template(processor, None, None, "here")


def test_a_template_that_does_not_suit_the_tokenizer_is_refused(parts: Path) -> None:
    with pytest.raises(
        TemplateError, match=r"gemma: with the chat template llama3 an answer ends with .*stops no reply"
    ):
        build_processor(parts / "gemma", parts / "clip", "llama3")


# ---------------------------------------------------------------- parts that cannot be used


def refused(parts: Path, message: str, llm: Path | None = None, tower: Path | None = None) -> None:
    with pytest.raises(ModelError, match=message):
        build_mllm(llm or parts / "gemma", tower or parts / "clip")


def test_weights_of_another_architecture_than_the_config_says(parts: Path, copy: Callable[[str], Path]) -> None:
    llm = copy("phi3")
    change_json(llm / "config.json", model_type="llama", architectures=["LlamaForCausalLM"], rope_parameters=None)
    refused(
        parts, r"do not fit config.json, which says model_type 'llama' \(\d+ missing_keys, first .*\); convert", llm
    )


def test_a_config_that_ties_an_embedding_and_head_that_differ(parts: Path, copy: Callable[[str], Path]) -> None:
    llm = copy("mistral")
    change_json(llm / "config.json", tie_word_embeddings=True)
    refused(parts, r"tie_word_embeddings is true, but the weights hold a head that differs .*set it to false", llm)


def test_a_config_that_does_not_tie_what_is_stored_once(parts: Path, copy: Callable[[str], Path]) -> None:
    llm = copy("gemma")
    change_json(llm / "config.json", tie_word_embeddings=False)
    refused(
        parts, r"1 missing_keys, first lm_head.weight\); if head and embedding are one.*set tie_word_embeddings", llm
    )


def test_an_embedding_of_another_size_than_the_config_says(parts: Path, copy: Callable[[str], Path]) -> None:
    llm = copy("mistral")
    rows = json.loads((llm / "config.json").read_text())["vocab_size"]
    change_json(llm / "config.json", vocab_size=rows - 3)
    refused(parts, rf"the weights have {rows} rows, so set vocab_size \(now {rows - 3}\) to that", llm)


def test_a_tokenizer_of_another_model(parts: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "small", FAMILIES["gemma"], rows=300)
    refused(parts, r"the tokenizer knows \d+ words, but the embedding has 300 rows, so they belong to different", llm)


def test_a_few_tokens_more_than_rows_get_rows(tmp_path: Path, parts: Path) -> None:
    words = len(build_processor(parts / "gemma", parts / "clip").tokenizer)
    llm = make_llm(tmp_path / "tight", FAMILIES["gemma"], rows=words - 2)  # no row for the last turn token and <image>
    mllm = build_mllm(llm, parts / "clip")
    weight = mllm.model.get_input_embeddings().weight
    assert weight.shape[0] % 64 == 0 and weight.shape[0] > words
    torch.testing.assert_close(weight[words - 2 : words], weight[: words - 2].mean(0).expand(2, 32))


def test_parts_that_are_something_else(parts: Path, copy: Callable[[str], Path], tmp_path: Path) -> None:
    refused(parts, r"model_type 'clip' is a multimodal model, expected a causal LM; give a LLaVA", parts / "clip")
    refused(parts, r"model_type 'gemma' is no vision tower; give a CLIP or SigLIP folder", tower=parts / "gemma")
    vision_half = make_tower(tmp_path / "half", whole=False)
    refused(parts, r"model_type 'clip_vision_model' is no causal LM; give such a folder as model.llm", vision_half)
    llm = copy("qwen2")
    change_json(llm / "config.json", model_type="something_new")
    refused(parts, r"cannot read it without code from outside .*choose a model that transformers itself", llm)


def test_weights_of_parts_that_cannot_be_read(parts: Path, copy: Callable[[str], Path]) -> None:
    llm, tower = copy("gemma"), copy("clip")
    (llm / "model.safetensors").write_bytes((llm / "model.safetensors").read_bytes()[:-9])
    refused(parts, r"gemma: the weights cannot be read \(.*\); copy or download them again", llm)
    (tower / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(parts, r"clip: the weights cannot be read \(model.safetensors is a Git LFS pointer", tower=tower)


class Attack:
    """Executed by whoever reads a pickle without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-200], "PytorchStreamReader failed reading zip archive"),
        (lambda content: content[:999], r"\w+"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "pytorch_model.bin is a Git LFS pointer"),
        (lambda content: b"<!DOCTYPE html>", "pytorch_model.bin is a web page"),
        (lambda content: b"", "a file of weights ends too early"),
        (lambda content: Attack(), "asks for more than tensors, which may be an attack; nothing of it was executed"),
    ],
    ids=["cut short", "mostly missing", "pointer", "page", "empty", "attack"],
)
def test_weights_as_older_models_have_them_are_read_and_damaged_ones_refused(
    damage: Callable[[bytes], Any], message: str, parts: Path, copy: Callable[[str], Path]
) -> None:
    """Vicuna is published as `.bin` files alone."""
    llm = copy("gemma")
    weights = load_file(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    file = llm / "pytorch_model.bin"
    torch.save(weights, file)
    embedding = build_mllm(llm, parts / "clip").model.get_input_embeddings().weight
    assert torch.equal(embedding[: len(weights["model.embed_tokens.weight"])], weights["model.embed_tokens.weight"])
    content = damage(file.read_bytes())
    torch.save(content, file) if isinstance(content, Attack) else file.write_bytes(content)
    refused(parts, rf"gemma: the weights cannot be read \(.*{message}.*\); copy or download them again", llm)


def test_files_that_a_part_lacks(parts: Path, copy: Callable[[str], Path]) -> None:
    tower, llm = copy("siglip"), copy("gemma")
    (tower / "preprocessor_config.json").unlink()
    refused(parts, r"siglip: no image processor there .*; add its preprocessor_config.json", tower=tower)
    (llm / "tokenizer.json").unlink()
    refused(parts, r"gemma: no tokenizer there .none of .*tokenizer.json.*; add its files", llm)


def test_an_image_processor_of_another_size(parts: Path, copy: Callable[[str], Path]) -> None:
    tower = copy("siglip")
    change_json(tower / "preprocessor_config.json", size={"height": 48, "width": 48})
    refused(parts, r"makes pictures of 48x48 px, but the tower takes 32 px squares; give the prepro", tower=tower)


def test_a_processor_that_counts_other_picture_tokens_than_the_model(parts: Path, tmp_path: Path) -> None:
    folder = save_mllm(build_mllm(parts / "gemma", parts / "siglip"), None, tmp_path / "model", {})
    change_json(folder / "processor_config.json", num_additional_image_tokens=1)
    with pytest.raises(ModelError, match=r'"num_additional_image_tokens": 1.*needs .*"num_additional_image_tokens": 0'):
        load_mllm(folder)
    change_json(folder / "config.json", vision_feature_select_strategy="default")
    with pytest.raises(
        ModelError, match=r"'default', which drops the first feature .*no class token.*set it to 'full'"
    ):
        load_mllm(folder)


def test_attention_that_a_model_lacks(parts: Path, tmp_path: Path) -> None:
    folder = save_mllm(build_mllm(parts / "gemma2", parts / "clip"), None, tmp_path / "model", {})
    with pytest.raises(ModelError, match=r"cannot compute sdpa attention; set model.attention to eager"):
        load_mllm(folder, attention="sdpa")
