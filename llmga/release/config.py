"""Settings of a release: which folder goes to which repository, and what its card cannot find out by itself."""

import re
from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field as Limits
from pydantic.dataclasses import dataclass

from llmga.config import STRICT, combination
from llmga.files import no_such_file

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(config=STRICT)
class BaseConfig:
    """The model that the released one was trained from."""

    id: str  # owner/name on the Hub
    licence: str | None = None  # the Hub's name of its licence; None: as llmga.release.licences knows it
    folder: Path | None = None  # where an adapter's base lies here, if not where the adapter says

    @combination("id", machine=True)
    def _is_on_the_hub(self) -> str | None:
        return _not_on_the_hub(self.id)


@dataclass(config=STRICT)
class DataConfig:
    """Something that the model was trained on."""

    name: str
    licence: str  # the Hub's name of it, or the terms in words
    url: str | None = None
    rows: Annotated[int, Limits(ge=0)] | None = None


@dataclass(config=STRICT)
class PictureConfig:
    """A picture for the card; what its file says beside pixels is not published."""

    path: Path
    caption: str | None = None  # None: the prompt it was painted from, where the file carries its recipe

    @combination("path", machine=True)
    def _exists(self) -> str | None:
        return None if self.path.is_file() else no_such_file(self.path)


@dataclass(config=STRICT)
class ResultsConfig:
    """A document of measurements, such as `make eval` writes; its rows become the card's metrics."""

    path: Path
    dataset: str  # name of what was measured on
    system: str | None = None  # whose rows; None where the document has one system
    moved: bool = False  # the document names another folder, and the model is the same

    @combination("path", machine=True)
    def _exists(self) -> str | None:
        return None if self.path.is_file() else no_such_file(self.path)


@dataclass(config=STRICT)
class ReleaseConfig:
    """One release."""

    folder: Path  # an MLLM, an adapter, a diffusers pipeline or a restorer
    repo: str  # owner/name on the Hub; made if missing
    licence: str  # the Hub's name of the licence that the weights are released under
    data: list[DataConfig]  # everything it was trained on
    base_model: BaseConfig | None = None
    from_scratch: bool = False  # there is no base
    title: str | None = None  # of the card; None: the repository's name
    summary: str = ""  # what the model is for, in a paragraph
    language: list[str] = field(default_factory=lambda: ["en"])
    tags: list[str] = field(default_factory=list)
    pictures: list[PictureConfig] = field(default_factory=list)
    results: ResultsConfig | None = None
    merge: bool = False  # an adapter is merged into its base, and a whole model is released
    shard_gb: Annotated[float, Limits(gt=0, le=50)] = (
        2.0  # a larger file of weights is split; an upload resumes by file
    )
    private: bool = True  # the repository, when it is made
    replace: bool = False  # take out of the repository what no release has put there
    message: str = "Release"  # of the commit
    export_dir: Path | None = None  # where the release is put together; None: runs/release/<name>

    @property
    def staging(self) -> Path:
        """The folder in which the release is put together."""
        return self.export_dir or Path("runs/release") / self.repo.rpartition("/")[2]

    @combination("folder", machine=True)
    def _folder_exists(self) -> str | None:
        return None if self.folder.is_dir() else f"{self.folder} is no folder; expected a model's"

    @combination("repo")
    def _repo_is_named(self) -> str | None:
        return None if HUB_ID.fullmatch(self.repo) else f'found "{self.repo}", expected owner/name, as on the Hub'

    @combination("base_model", "from_scratch")
    def _base_or_none(self) -> str | None:
        if (self.base_model is None) == self.from_scratch:
            return None
        if self.from_scratch:
            return "found a base and from_scratch=true; remove one"
        return "found no base; set base_model.id to the Hub's owner/name, or from_scratch=true if there is none"


def _not_on_the_hub(name: str) -> str | None:
    """Why a name cannot be that of a base model that others can load."""
    if not HUB_ID.fullmatch(name) or Path(name).exists():
        return f'found "{name}", a path on this machine or no name at all; expected owner/name, which others can load'
    return None
