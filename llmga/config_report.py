"""What is wrong with some settings: mistakes collected under their keys, told together, with the nearest known key."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from typing import Any

Key = tuple[str | int, ...]

# What other trainers call it; too far from our spelling for a string comparison to find.
OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "grad_accum": "accumulation_steps",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "gradient_clipping": "max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "mixed_precision": "precision",
    "save_steps": "save_every_steps",
    "logging_steps": "log_every_steps",
    "eval_steps": "eval_every_steps",
    "save_total_limit": "keep_last",
    "report_to": "trackers",
    "resume_from_checkpoint": "resume",
    "dataloader_num_workers": "num_workers",
    "model_name_or_path": "path",
    "data_path": "path",
    "image_folder": "image_root",
    "model_max_length": "max_length",
    "attn_implementation": "attention",
}


class ConfigError(ValueError):
    """Settings that cannot be used; its text is the whole report, one line per mistake.

    Attributes:
        mistakes: the lines of the report without its heading.
    """

    def __init__(self, source: str, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {line}" for line in mistakes)]))


def dotted(key: Key) -> str:
    """`("data", "sources", 0, "path")` as people write it: `data.sources.0.path`."""
    return ".".join(str(part) for part in key)


def shown(value: Any) -> str:
    """A value as it stands in YAML, shortened to what identifies it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class Report:
    """Mistakes in the order they were met.

    Attributes:
        source: the file, or "settings" where there is none.
        known: every key the schema has; a list item is written as 0.
        places: where a key was set, such as "line 12" or "command line".
    """

    source: str
    known: Sequence[Key] = ()
    places: dict[Key, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    bad_keys: list[Key] = field(default_factory=list)

    def add(self, key: Key, text: str) -> None:
        """Add a mistake in one key's value."""
        self.bad_keys.append(key)
        self.lines.append(f"{self._described(key)}: {text}")

    def add_unknown(self, key: Key, value: Any) -> Key | None:
        """Add a key that the schema does not have, with the one that was probably meant, which is returned."""
        nearest = self._nearest(key)
        guess = f"; did you mean {dotted(nearest)}?" if nearest else ""
        self.add(key, f"unknown key, found {shown(value)}{guess}")
        return nearest

    def add_combination(self, keys: Sequence[Key], text: str) -> None:
        """Add a mistake that lies between keys, each of them sound alone."""
        self.lines.append(f"{', '.join(self._described(key) for key in keys)}: {text}")

    def sound(self, key: Key) -> bool:
        """Whether neither the key, nor a part of it, nor a section it is in has a mistake of its own."""
        return not any(bad[: len(key)] == key or key[: len(bad)] == bad for bad in self.bad_keys)

    def raise_if_any(self) -> None:
        """Raise ConfigError when there is anything to tell."""
        if self.lines:
            raise ConfigError(self.source, self.lines)

    def _described(self, key: Key) -> str:
        """The key and where it, or the innermost section around it, was written."""
        around = (key[:length] for length in range(len(key), 0, -1))
        place = next((self.places[part] for part in around if part in self.places), None)
        name = dotted(key) or "top level"
        return f"{name} ({place})" if place else name

    def _nearest(self, key: Key) -> Key | None:
        """The known key whose name, or whole dotted path, is closest; in the same section if there is a choice."""
        name = OTHER_NAMES.get(str(key[-1]), str(key[-1]))
        normal = _with_first_item(key)

        def closeness(candidate: Key) -> float:
            by_name = SequenceMatcher(None, name, str(candidate[-1])).ratio()
            by_path = SequenceMatcher(None, dotted(normal), dotted(candidate)).ratio()
            same_section = 0.1 if candidate[:-1] == normal[:-1] else 0.0
            return max(by_name, by_path - 0.1) + same_section

        best = max(self.known, key=closeness, default=None)
        if best is None or closeness(best) < 0.75:
            return None
        return (*key[:-1], best[-1]) if best[:-1] == normal[:-1] else best


def nearest_word(word: Any, choices: Sequence[str]) -> str:
    """`; did you mean 'cosine'?` when one of the choices is close to the word, else nothing."""
    close = get_close_matches(str(word), choices, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _with_first_item(key: Key) -> Key:
    return tuple(0 if isinstance(part, int) else part for part in key)
