"""What is asked for: the rows of a manifest, and the real pictures that belong to them."""

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from llmga.evaluation.bench import Work
from llmga.evaluation.config import ReferenceConfig, SetConfig, SystemConfig
from llmga.evaluation.paint import painted_files, save_picture
from llmga.images import picture_path
from llmga.metrics.features import MetricError, name_some, require_disjoint
from llmga.metrics.picture_files import picture_files
from llmga.records import Record, open_manifest
from llmga.toyworld.render import render
from llmga.toyworld.scene import Scene

_COCO_2014 = re.compile(r"^COCO_(train|val)2014_")  # of the same pictures, which COCO 2017 names by their number alone


class RowsError(ValueError):
    """Rows that cannot be evaluated."""


class Rows:
    """The rows of a set by id.

    Raises:
        RowsError: no rows, or an id that comes twice.
    """

    def __init__(self, config: SetConfig) -> None:
        self.config = config
        manifest = open_manifest(config.path, config.image_root)
        self.image_root = manifest.image_root
        wanted = [row for row in manifest if config.tasks is None or row.task in config.tasks]
        self.all_ids = [row.id for row in wanted]
        self.records = {row.id: row for row in wanted[: config.max_rows]}
        if not self.records:
            of = f" of the tasks {', '.join(config.tasks)}" if config.tasks else ""
            raise RowsError(f"{config.path} has no rows{of}; expected those that pictures are asked for")
        if len(self.records) < len(wanted[: config.max_rows]):
            twice = sorted({id for id in self.all_ids if self.all_ids.count(id) > 1})
            raise RowsError(f"{config.path} has {len(twice)} ids more than once: {name_some(twice)}")

    @property
    def ids(self) -> list[str]:
        """In the order of the manifest."""
        return list(self.records)

    def texts(self, column: str) -> dict[str, str]:
        """A column by id.

        Raises:
            RowsError: a row lacks it.
        """
        texts = {id: getattr(record, column) or "" for id, record in self.records.items()}
        lacking = [id for id, text in texts.items() if not text.strip()]
        if lacking:
            how = (
                "record prompts with a trained MLLM first (`make record`, scripts/record_prompts.py)"
                if column == "prompt"
                else "fill it in, or name another column"
            )
            raise RowsError(
                f"{self.config.path}: {len(lacking)} of {len(texts)} rows have no {column}: {name_some(lacking)}; {how}"
            )
        return texts

    def facts(self, *columns: str) -> dict[str, Any]:
        """What documents say of the set: its name, how many rows, and a hash of ids and texts."""
        digest = sha256()
        for id, record in self.records.items():
            digest.update("\0".join([id, *(str(getattr(record, column)) for column in columns), ""]).encode())
        name = self.config.name or self.config.path.stem
        return {"set": name, "n": len(self.records), "columns": list(columns), "list_sha256": digest.hexdigest()}

    def own_pictures(self, folder: Path, work: Work) -> dict[str, Path]:
        """The real picture of each row: its file, or its scene of the toy world drawn into `folder`.

        Raises:
            RowsError: a row has neither.
        """
        files = {}
        drawn = painted_files(folder, self.ids)
        mine = set(work.mine(self.ids))
        for id, record in self.records.items():
            if record.image:
                files[id] = picture_path(self.image_root, record.image)
                continue
            files[id] = drawn[id]
            if id in mine and not drawn[id].is_file():
                save_picture(Image.fromarray(render(scene_of(record))), drawn[id])
        return files


def scene_of(record: Record) -> Scene:
    """The scene of the toy world that a row is about.

    Raises:
        RowsError: it is about none.
    """
    scene = (record.meta or {}).get("scene")
    if scene is None:
        raise RowsError(f"row {record.id} has no picture, and no scene of the toy world to draw; give it an image")
    return Scene.from_dict(scene)


def reference_files(config: ReferenceConfig, own: Mapping[str, Path]) -> dict[str, Path]:
    """The pictures of the reference set: those of a folder, or of the rows themselves."""
    if config.folder is None:
        return dict(own)
    files = picture_files(config.folder, "reference")
    return dict(list(files.items())[: config.pictures])


def training_overlap(system: SystemConfig, reference: Mapping[str, Path], records: Rows, force: bool) -> int:
    """Number of reference pictures that a system was trained on, told by their names.

    Raises:
        MetricError: some, unless forced.
    """
    real = [picture_key(records.records[id].image or id if id in records.records else id) for id in reference]
    trained = {
        picture_key(record.image or record.id) for manifest in system.trained_on for record in open_manifest(manifest)
    }
    try:
        return require_disjoint(real, trained, force)
    except MetricError as error:
        raise MetricError(f"system {system.name}: {error}; or count them with reference.allow_overlap=true") from None


def picture_key(name: str) -> str:
    """A picture's name without folder and suffix, and without what COCO 2014 puts before its number."""
    return _COCO_2014.sub("", Path(name).stem)
