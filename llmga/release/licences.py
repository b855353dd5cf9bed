"""Licences of base models: which of them pass their terms on, and where they can be read."""

from fnmatch import fnmatch
from typing import NamedTuple

from llmga.release.config import BaseConfig
from llmga.release.kinds import ReleaseError


class Licence(NamedTuple):
    """A licence by its name on the Hub.

    Attributes:
        title: in words.
        url: where its text is.
        passed_on: whether what is trained from a model under it stays under it.
    """

    title: str
    url: str
    passed_on: bool


LICENCES = {
    "apache-2.0": Licence("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0", False),
    "mit": Licence("MIT License", "https://opensource.org/license/mit", False),
    "bsd-3-clause": Licence("BSD 3-Clause License", "https://opensource.org/license/bsd-3-clause", False),
    "creativeml-openrail-m": Licence(
        "CreativeML Open RAIL-M", "https://huggingface.co/spaces/CompVis/stable-diffusion-license", True
    ),
    "openrail++": Licence(
        "CreativeML Open RAIL++-M",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
        True,
    ),
    "llama2": Licence("Llama 2 Community License", "https://ai.meta.com/llama/license/", True),
    "llama3": Licence("Llama 3 Community License", "https://llama.meta.com/llama3/license/", True),
    "gemma": Licence("Gemma Terms of Use", "https://ai.google.dev/gemma/terms", True),
}
_BASES = (  # pattern of a base's name in small letters -> its licence
    ("stable-diffusion-v1-5/*", "creativeml-openrail-m"),
    ("stabilityai/stable-diffusion-xl-*", "openrail++"),
    ("diffusers/stable-diffusion-xl-*", "openrail++"),
    ("lmsys/vicuna-*-v1.5*", "llama2"),
    ("liuhaotian/llava-v1.5-*", "llama2"),
    ("llava-hf/llava-1.5-*", "llama2"),
    ("meta-llama/meta-llama-3-*", "llama3"),
    ("google/gemma-2b*", "gemma"),
    ("google/gemma-7b*", "gemma"),
    ("mistralai/mistral-7b-*", "apache-2.0"),
    ("qwen/qwen2-0.5b*", "apache-2.0"),
    ("qwen/qwen2-1.5b*", "apache-2.0"),
    ("qwen/qwen2-7b*", "apache-2.0"),
    ("microsoft/phi-3-mini-*", "mit"),
)
_GONE = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


def base_licence(base: BaseConfig, released_under: str) -> str:
    """The licence of a base model; it must allow that of the release.

    Raises:
        ReleaseError: the licence is not known, the base's repository is gone, or its terms are not passed on.
    """
    if base.id in _GONE:
        raise ReleaseError(f"base_model.id: {base.id} is gone from the Hub; its weights are {_GONE[base.id]} now")
    known = next((licence for pattern, licence in _BASES if fnmatch(base.id.lower(), pattern)), None)
    licence = base.licence or known
    if licence is None:
        raise ReleaseError(f"base_model.licence: that of {base.id} is not known here; set it to what its card says")
    if known is not None and licence != known:
        raise ReleaseError(
            f"base_model.licence: found {licence}, and {base.id} is under {known}; remove the key or correct it"
        )
    if licence in LICENCES and LICENCES[licence].passed_on and released_under != licence:
        raise ReleaseError(
            f"licence: found {released_under}; {base.id} is under {licence}, whose terms pass on to what is trained "
            f"from it, so the release is under {licence} too"
        )
    return licence
