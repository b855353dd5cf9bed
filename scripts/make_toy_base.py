"""Make the toy base MLLM: it sees scenes, describes them briefly, answers questions and chats a little.

It stands where LLaVA-1.5 stands in the paper: no generation tags, no long captions. `make toy-base` runs it:

    python scripts/make_toy_base.py                 # corpora, tokenizer, vision tower, LLM, shipped into the package
    python scripts/make_toy_base.py optim.lr=5e-4   # overrides of configs/stage1/toy_base.yaml

Each step is skipped when what it makes is there already, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from llmga.config import load_config, load_config_or_exit
from llmga.recipe import exit_code_of
from llmga.stage1.config import Stage1Config

CONFIG = Path("configs/stage1/toy_base.yaml")
WORK = Path("runs/toy_base")
CORPUS_ROWS = {"train": 40_000, "validation": 4_000, "test": 4_000}


class Lesson(NamedTuple):
    """A run before the last one: what its rows are made of, how many it has, and how it is trained."""

    name: str
    parts: dict[str, float]
    rows: int
    overrides: tuple[str, ...]


LESSONS = (
    Lesson(
        "looking",
        {"find": 0.35, "aim": 0.2, "medium": 0.25, "questions": 0.1, "imagine": 0.1},
        40_000,
        ("run.max_steps=1600", "run.batch_size=24", "optim.schedule=constant"),
    ),
    Lesson(
        "finding",
        {"find": 0.5, "aim": 0.3, "medium": 0.1, "imagine": 0.1},
        24_000,
        ("run.max_steps=900", "optim.schedule=constant"),
    ),
)
"""What a small model grasps all of a sudden it grasps within some hundred steps where every other word asks for it, and
not at all within several thousand where the same is asked now and then. So the world is taught piece by piece: to look
at a place, and then the other way round, from a description to its place. It has to be learned early, too: once the
weights of attention have grown, nothing new takes hold. The last run, whose settings are `CONFIG`, has some of
everything."""
VOCABULARY_SIZE = 1_536
SCENES_TO_SPELL = 4_000
WORD_PATTERN = r" ?\b(?:[Tt]op|[Mm]iddle|[Bb]ottom) (?:left|middle|right)\b| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
SHIPPED = Path("llmga/toyworld/checkpoints/base/mllm")
SPECIAL_TOKENS = ("<pad>", "<s>", "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def main(overrides: list[str]) -> int:
    """Check the settings, then run the steps; returns the exit code."""
    load_config_or_exit(Stage1Config, CONFIG, overrides, check_machine=False)
    return exit_code_of(lambda: make(overrides))


def make(overrides: list[str]) -> None:
    """Run the steps in order."""
    from llmga.toyworld.build import build_world

    for number, lesson in enumerate(LESSONS):
        splits = {"train": lesson.rows, "validation": 1_000}
        build_world(WORK / lesson.name / "data", splits=splits, seed=number, kind="base", weights=lesson.parts)
    build_world(WORK / "data", splits=CORPUS_ROWS, seed=len(LESSONS), kind="base")
    make_tower(WORK / "tower")
    make_start(WORK / "start", WORK / "data", WORK / "tower")
    model = WORK / "start"
    for lesson in LESSONS:
        model = run(CONFIG, [*lesson.overrides, *overrides, *changes(model, WORK / lesson.name)])
    ship(run(CONFIG, overrides), SHIPPED)


def changes(start: Path, folder: Path) -> list[str]:
    """Overrides that make a recipe's config a lesson, whose data and run lie in a folder of its own; they come last."""
    pairs = {
        "model.path": start,
        "data.sources.0.path": folder / "data/train.jsonl",
        "data.validation.0.path": folder / "data/validation.jsonl",
        "run.output_dir": folder / "run",
    }
    return [f"{key}={value}" for key, value in pairs.items()]


def run(config: Path, overrides: list[str]) -> Path:
    """Train, or go on with what is there; returns the finished model's folder."""
    from llmga.stage1.train import train

    return train(load_config(Stage1Config, config, overrides))


def make_tower(folder: Path) -> None:
    """The vision tower, trained on scenes with and without holes."""
    if folder.exists():
        return
    import torch

    from llmga.checkpoint import write_folder_atomically
    from llmga.toyworld.tower import TowerRecipe, train_tower

    torch.set_num_threads(os.cpu_count() or 1)
    tower = train_tower(TowerRecipe(), log=lambda line: print(line, flush=True))
    with write_folder_atomically(folder) as temporary:
        tower.save_pretrained(temporary)


def make_start(folder: Path, corpus: Path, tower_folder: Path) -> None:
    """A LLaVA folder with trained tokenizer and vision tower, and with a fresh projector and LLM."""
    if folder.exists():
        return
    import torch
    from transformers import CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from llmga.stage1.model import Mllm, save_mllm
    from llmga.tokens import GEN_IMG
    from llmga.toyworld.tower import TowerRecipe

    tokenizer, recipe = train_tokenizer(corpus), TowerRecipe()
    tower = CLIPVisionModel.from_pretrained(tower_folder)
    width, token_id = 192, tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.06,  # 0.02 is for wide models: at this width attention would start out flat
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_id=token_id("<image>"),
        image_seq_length=(recipe.picture_size // recipe.patch_size) ** 2,
        vision_feature_layer=-1,  # the tower was trained to speak through its last layer
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(recipe.seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    mllm = Mllm(model, build_processor(tokenizer, recipe), GEN_IMG)
    save_mllm(mllm, None, folder, provenance={"made_by": "scripts/make_toy_base.py", "tower": vars(recipe)})


def train_tokenizer(corpus: Path):
    """Byte-level BPE on the world's texts: nearly every word of the world is one token, every other text is bytes.

    The name of a place is kept together and becomes one token where the corpus has it often (all four of the learnable
    world do), so that looking there takes no joining of words first.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from llmga.stage1.conversation import TOY_CHAT_TEMPLATE

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(tokenizer_texts(corpus), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        chat_template=TOY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def tokenizer_texts(corpus: Path):
    """The base corpus, the instructions of stage 1 and captions of every style: words to spell, nothing to learn."""
    import numpy as np
    import yaml

    from llmga.records import open_manifest
    from llmga.toyworld import describe, sample_scene
    from llmga.toyworld.edits import sample_edit

    for record in open_manifest(corpus / "train.jsonl"):
        yield from (message["content"] for message in record.messages or ())
    instructions = yaml.safe_load(Path("llmga/stage1/instructions.yaml").read_text(encoding="utf-8"))
    for text in strings_in(instructions):
        yield from [text] * 20
    for seed in range(SCENES_TO_SPELL):
        rng, scene = np.random.default_rng([1, seed]), sample_scene(seed)
        yield from (describe(scene, rng, style).text for style in ("long", "medium", "brief"))
        yield sample_edit(scene, rng).instruction


def strings_in(value):
    """Every string in nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def build_processor(tokenizer, recipe):
    """LLaVA's processor for pictures of the tower's size."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = recipe.picture_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=recipe.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )


def ship(final: Path, destination: Path, base: Path | None = None) -> None:
    """Put a finished model into the package, in float16; a vision tower that equals the base's is stored once."""
    import json

    import torch

    from llmga.stage1.model import VISION_SHARD, load_mllm, save_mllm

    provenance = json.loads((final / "provenance.json").read_text(encoding="utf-8"))
    destination.parent.mkdir(parents=True, exist_ok=True)
    new = destination.with_name(f"{destination.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    save_mllm(load_mllm(final), None, new, provenance, dtype=torch.float16, split_vision=True)
    if base is not None:
        shared, own = base / VISION_SHARD, new / VISION_SHARD
        if shared.read_bytes() == own.read_bytes():
            own.unlink()
            own.symlink_to(os.path.relpath(shared, destination))
    shutil.rmtree(destination, ignore_errors=True)
    new.rename(destination)
    size = sum(file.stat().st_size for file in destination.iterdir() if not file.is_symlink())
    print(f"shipped {destination} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
