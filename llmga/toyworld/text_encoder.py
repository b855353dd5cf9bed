"""The toy world's text encoder: transformers' CLIPTextModel at small width, with CLIP's real vocabulary.

It learns what an image-text model knows of a caption: which words go together. At every token, linear heads read what
the sentence has said so far: the place, the background, the count, and colour, shape, size and texture of the object;
the heads are then thrown away. It reads captions that fit its window, as CLIP has read alt texts: no long prose, and no
window that begins within a sentence. Heads have rows of one fixed length, for the reason given in
`llmga.toyworld.tower`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from llmga.tokens import CHUNK_TOKENS, CLIP_WINDOW, clip_tokenizer
from llmga.toyworld.describe import describe
from llmga.toyworld.grammar import match_sentence
from llmga.toyworld.scene import SPLITS, sample_scene
from llmga.toyworld.tower import HEAD_SCALE, UNSEEN
from llmga.toyworld.training import Schedule, fit, quick_arithmetic
from llmga.toyworld.wording import PLACES, WORDS, value_of

NOT_SAID = 0
VALUES: dict[str, tuple[str, ...]] = {
    slot: PLACES[2] if slot == "place" else tuple(values) for slot, values in WORDS.items()
}
"""slot -> its values; label 0 says that the sentence has not named one yet, label i names value i - 1."""


@dataclass(frozen=True)
class TextRecipe:
    """Size and training; the defaults are those of the shipped one."""

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_captions: int = 40_000
    styles: dict[str, float] = field(default_factory=lambda: {"brief": 0.2, "medium": 0.8})
    num_held_out: int = 512
    batch_size: int = 48
    seed: int = 0
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=300, lr=1.5e-3, matrix_lr=3e-3))


def build_text_encoder(recipe: TextRecipe) -> CLIPTextModel:
    """Fresh weights under CLIP's vocabulary."""
    torch.manual_seed(recipe.seed)
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=4 * recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        max_position_embeddings=CLIP_WINDOW,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim >= 2 and "embedding" not in name:  # CLIP's depth-scaled start is slow for a shallow net
            nn.init.trunc_normal_(parameter, std=0.04)
    return encoder


class SaidHeads(nn.Module):
    """Linear readers of a token: what its sentence has said so far."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        sizes = {slot: 1 + len(values) for slot, values in VALUES.items()}
        self.heads = nn.ParameterDict({slot: nn.Parameter(torch.randn(n, hidden_size)) for slot, n in sizes.items()})

    def forward(self, states: Tensor) -> list[Tensor]:
        """states (B, 77, D) -> logits (B, 77, values) of each slot, in the order of `VALUES`."""
        states = F.layer_norm(states, states.shape[-1:])
        return [F.linear(states, HEAD_SCALE * F.normalize(self.heads[slot], dim=-1)) for slot in VALUES]


def train_text_encoder(recipe: TextRecipe, state_path: Path, log: Callable[[str], None]) -> CLIPTextModel:
    """Train on captions of scenes of the train split."""
    reader = nn.ModuleDict({"encoder": build_text_encoder(recipe), "heads": SaidHeads(recipe.hidden_size)})
    ids, labels = caption_windows(SPLITS["train"][: recipe.num_captions], recipe)
    held_out = caption_windows(SPLITS["validation"][: recipe.num_held_out], recipe)

    def loss_of_step(step: int) -> Tensor:
        rows = np.random.default_rng([recipe.seed, step]).integers(0, len(ids), recipe.batch_size)
        with quick_arithmetic():
            states = reader["encoder"](ids[rows]).last_hidden_state
        logits = reader["heads"](states.float())
        losses = [
            F.cross_entropy(slot.flatten(0, 1), labels[rows][..., i].flatten().long(), ignore_index=UNSEEN)
            for i, slot in enumerate(logits)
        ]
        return torch.stack(losses).sum()

    def report(now: nn.Module) -> str:
        logits = now["heads"](now["encoder"](held_out[0]).last_hidden_state)
        return "said so far % " + ", ".join(
            f"{slot} {100 * share:.1f}" for slot, share in zip(VALUES, _shares(logits, held_out[1]), strict=True)
        )

    return fit("text encoder", reader, loss_of_step, recipe.schedule, state_path, report, log)["encoder"]


def _shares(logits: list[Tensor], labels: Tensor) -> list[float]:
    """Share right of each slot, where something was said."""
    return [
        (slot.argmax(-1) == labels[..., i])[labels[..., i] > NOT_SAID].float().mean().item()
        for i, slot in enumerate(logits)
    ]


def caption_windows(seeds: range, recipe: TextRecipe) -> tuple[Tensor, Tensor]:
    """The first window of a caption of each scene.

    Returns:
        (N, 77) int64 ids: BOS, text, EOS, padding; and (N, 77, slots) int8 labels, `UNSEEN` outside of the text.
    """
    tokenizer = clip_tokenizer()
    ids = np.full((len(seeds), CLIP_WINDOW), tokenizer.pad_token_id)
    ids[:, 0] = tokenizer.bos_token_id
    labels = np.full((len(seeds), CLIP_WINDOW, len(VALUES)), UNSEEN, np.int8)
    styles, weights = list(recipe.styles), np.array(list(recipe.styles.values()))
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng([recipe.seed, seed])
        style = styles[rng.choice(len(styles), p=weights / weights.sum())]
        text = describe(sample_scene(seed), rng, style).text  # type: ignore[arg-type]
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        said = said_so_far(text, encoding.offsets)[:CHUNK_TOKENS]
        ids[row, 1 : 1 + len(said)] = encoding.ids[:CHUNK_TOKENS]
        labels[row, 1 : 1 + len(said)] = said
    return torch.from_numpy(ids), torch.from_numpy(labels)


def said_so_far(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """What has been said by each token within its sentence: (L, slots)."""
    said = np.full((len(offsets), len(VALUES)), NOT_SAID, np.int8)
    begins = np.array([begin for begin, _ in offsets])
    ends = np.array([end for _, end in offsets])
    sentence_start = 0
    for sentence in text.split("."):
        sentence_end = sentence_start + len(sentence)
        match = match_sentence(text, sentence_start + len(sentence) - len(sentence.lstrip()), sentence_end)
        for slot, word in (match.groupdict() if match else {}).items():
            knows = (ends >= match.end(slot)) & (begins < sentence_end + 1)  # type: ignore[union-attr]
            said[knows, list(VALUES).index(slot)] = 1 + VALUES[slot].index(value_of(slot, word))
        sentence_start = sentence_end + 1
    return said
