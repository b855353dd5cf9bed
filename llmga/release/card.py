"""The model card: what the Hub reads in its head, and what people read below."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import ModelCardData
from PIL import Image

from llmga.config import each_setting
from llmga.images import open_picture
from llmga.provenance import read_provenance
from llmga.release.config import PictureConfig, ReleaseConfig
from llmga.release.kinds import NAMES, Kind, ReleaseError, read_json
from llmga.release.licences import LICENCES, base_licence
from llmga.release.results import Measured, eval_results

HUB = "https://huggingface.co"
PICTURES = "pictures"
_SHOWN = ("stage", "task", "steps", "samples", "tokens", "commit", "layout", "phase")
_SETTINGS = re.compile(
    r"config\.(optim\.(lr|schedule|weight_decay)|run\.(batch_size|accumulation_steps|precision|seed|max_steps)"
    r"|model\.(trainable|lora\.\w+|quantize|tags)|task|max_chunks)"
)


class _Loading(NamedTuple):
    """How a kind is loaded, and by what the Hub files it."""

    library: str
    task: str
    code: str
    note: str = ""


_LOADING: dict[Kind, _Loading] = {
    "mllm": _Loading(
        "transformers",
        "image-text-to-text",
        "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
        'model = LlavaForConditionalGeneration.from_pretrained("{repo}")\n'
        'processor = AutoProcessor.from_pretrained("{repo}")',
        "It was trained on pictures prepared by Pillow; `llmga.stage1.model.load_mllm` sees to that, and\n"
        '`AutoImageProcessor.from_pretrained("{repo}", backend="pil")` does in plain transformers.',
    ),
    "adapter": _Loading(
        "peft",
        "image-text-to-text",
        "from peft import PeftModel; from transformers import LlavaForConditionalGeneration\n"
        'base = LlavaForConditionalGeneration.from_pretrained("{base}")\n'
        'model = PeftModel.from_pretrained(base, "{repo}")',
        "`llmga merge ADAPTER OUT --base BASE` makes a whole model of the two.",
    ),
    "pipeline": _Loading(
        "diffusers",
        "text-to-image",
        "from diffusers import DiffusionPipeline\n"
        'pipeline = DiffusionPipeline.from_pretrained("{repo}", use_safetensors=True)\n'
        "{painting}",
        "Plain diffusers cuts prompts at 77 tokens; `llmga sample --model FOLDER` encodes them whole.",
    ),
    "restorer": _Loading(
        "llmga",
        "image-to-image",
        'from llmga.diffrir.network import DiffRIR\nmodel = DiffRIR.from_pretrained("{repo}")\nprint(model.describe())',
        "`llmga restore --model FOLDER` restores pictures with it.",
    ),
}
_PAINTING = 'picture = pipeline("a red boat on a lake", num_inference_steps=20).images[0]'
_INPAINTING = "pipeline = pipeline.to('cpu')  # then pipeline(prompt, image=picture, mask_image=mask).images[0]"


def write_card(
    cfg: ReleaseConfig, kind: Kind, source: Path, out: Path, measured: Measured | None, compared: str
) -> None:
    """Write README.md and the pictures it shows.

    Args:
        source: the folder whose provenance tells how the model was made.
        out: the release, complete but for the card.
        compared: what was found on reading it back.
    Raises:
        ReleaseError: licences that do not go together, or a base that others cannot load.
    """
    terms = _terms(cfg, source)
    loading = _LOADING[kind]
    inpaints = kind == "pipeline" and read_json(out / "unet" / "config.json").get("in_channels") == 9
    task = "image-to-image" if inpaints else loading.task
    names = {
        "repo": cfg.repo,
        "base": cfg.base_model.id if cfg.base_model else "",
        "painting": _INPAINTING if inpaints else _PAINTING,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmga.release", ""), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    body = environment.get_template("card.md.j2").render(
        title=cfg.title or cfg.repo.rpartition("/")[2],
        summary=cfg.summary.strip(),
        article="A",
        kind_name=NAMES[kind],
        base=cfg.base_model,
        hub=HUB,
        code=loading.code.format(**names),
        note=loading.note.format(**names),
        pictures=[_published(picture, number, out) for number, picture in enumerate(cfg.pictures, start=1)],
        terms=terms,
        data=cfg.data,
        measured=measured,
        protocol=", ".join(f"{key} {value}" for key, value in (measured.protocol if measured else {}).items()),
        settings=_settings(read_provenance(out)),
        compared=compared,
        repo=cfg.repo,
    )
    head = yaml.safe_dump(_head(cfg, kind, task, measured), sort_keys=False, allow_unicode=True, width=1000)
    (out / "README.md").write_text(f"---\n{head}---\n\n{body}", encoding="utf-8")


def _head(cfg: ReleaseConfig, kind: Kind, task: str, measured: Measured | None) -> dict[str, Any]:
    known = cfg.licence in LICENCES
    data = ModelCardData(
        language=list(cfg.language),
        license=cfg.licence if known else "other",
        license_name=None if known else cfg.licence,
        library_name=_LOADING[kind].library,
        pipeline_tag=task,
        tags=["llmga", *cfg.tags],
        base_model=cfg.base_model.id if cfg.base_model else None,
        base_model_relation=("adapter" if kind == "adapter" else "finetune") if cfg.base_model else None,
        model_name=cfg.repo.rpartition("/")[2] if measured else None,
        eval_results=eval_results(measured, task) if measured else None,
    )
    head: dict[str, Any] = json.loads(json.dumps(data.to_dict()))
    return head


def _terms(cfg: ReleaseConfig, source: Path) -> str:
    """The paragraph about licences."""
    own = _described(cfg.licence)
    if cfg.base_model is None:
        earlier = " Its training went on from an earlier run's model, which is not released."
        return f"The weights are under the {own}." + (earlier if read_provenance(source).get("base") else "")
    licence = base_licence(cfg.base_model, cfg.licence)
    text = f"The weights are under the {own}. The base model {cfg.base_model.id} is under the {_described(licence)}"
    if licence in LICENCES and LICENCES[licence].passed_on:
        return f"{text}, whose terms, restrictions of use included, pass on to this model and to all made from it."
    return f"{text}."


def _described(licence: str) -> str:
    known = LICENCES.get(licence)
    return f"[{known.title}]({known.url})" if known else licence


def _published(picture: PictureConfig, number: int, out: Path) -> dict[str, str]:
    """A copy without anything but pixels: text in the file may name paths, or who took it and where."""
    from llmga.stage2.recipe import RecipeError, read_recipe

    caption = picture.caption
    if caption is None:
        try:
            caption = read_recipe(picture.path).prompt
        except RecipeError as error:
            raise ReleaseError(f"pictures.{number - 1}.caption is missing, and {error}") from None
    name = f"{PICTURES}/{number:02d}.png"
    (out / PICTURES).mkdir(exist_ok=True)
    pixels = open_picture(picture.path)
    Image.frombytes(pixels.mode, pixels.size, pixels.tobytes()).save(out / name)
    return {"name": name, "caption": " ".join(caption.split())}


def _settings(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts and settings that tell most, as rows."""
    facts = [(key, provenance[key]) for key in _SHOWN if provenance.get(key) is not None]
    chosen = [(key, value) for key, value in each_setting(provenance) if _SETTINGS.fullmatch(key)]
    return [(key, str(value)) for key, value in facts + chosen if value is not None]
