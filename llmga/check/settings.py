"""What a check is asked to do: the options of `llmga check`, with their defaults and limits."""

import os
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from llmga.check.kinds import KINDS, SEVERITIES, Severity
from llmga.images import MAX_PIXELS


class CheckError(ValueError):
    """A check that cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class CheckSettings:
    """One check.

    Attributes:
        path: a manifest, a published file, or a folder of such files.
        format: "auto", "manifest" or one of `llmga.published.FORMATS`.
        image_root: the folder pictures count from; None: the file's own, or as the published layout has it.
        out: where reports and the state of an unfinished check go; None: runs/check/ and the name of `path`.
        workers: processes that read rows and decode pictures; 1 does it in this one.
        reference: pictures that training must not see: a folder of them, or a file of rows with its pictures beside.
        archives: a list of SHA-256 sums (`sha256sum` writes such) whose files lie beside it.
        tokenizer: folder or tokenizer.json of an LLM, to count its tokens as well.
        pictures: decode pictures; False checks texts alone.
        orphans: look for pictures that no row uses.
        ignore, drop: codes that are not reported; codes that `fix` leaves out although they are no errors.
        fail_on: the mildest severity that makes the exit code 1.
        fix: the cleaned manifest to write; for a folder of several files, the folder for their manifests.
        resume: go on from an unfinished check in `out` when its settings and files are the same.
        min_side, max_ratio, max_pixels: what pictures are warned of or refused for.
        mask_area: smallest and largest share of a picture that a mask usually covers.
        near: bits of 128 by which the hashes of similar pictures may differ; 0 does not compare them. Up to 7 none is
            missed; of pairs that differ in 10, one in ten.
        max_chunks: windows of 75 CLIP tokens that stage 2 gives a prompt.
        max_length: LLM tokens, for `tokenizer`.
    """

    path: Path
    format: str = "auto"
    image_root: Path | None = None
    out: Path | None = None
    workers: int = 0  # 0: one per core that this process may use
    reference: Path | None = None
    archives: Path | None = None
    tokenizer: Path | None = None
    pictures: bool = True
    orphans: bool = True
    ignore: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    fail_on: Severity = "error"
    fix: Path | None = None
    resume: bool = True
    min_side: int = 64
    max_ratio: float = 5.0
    max_pixels: int = MAX_PIXELS
    mask_area: tuple[float, float] = (0.005, 0.95)
    near: int = 10
    max_chunks: int = 4
    max_length: int = 2048

    def __post_init__(self) -> None:
        for option, codes in (("--ignore", self.ignore), ("--drop", self.drop)):
            for code in codes:
                if code not in KINDS:
                    close = get_close_matches(code, KINDS, n=1)
                    hint = f"did you mean {close[0]!r}?" if close else "docs/data.md lists them all"
                    raise CheckError(f"{option} {code!r} is no kind of problem; {hint}")
        if self.fail_on not in SEVERITIES:
            raise CheckError(f"--fail-on {self.fail_on!r} is no severity; expected {', '.join(SEVERITIES)}")
        if not 0 <= self.near <= 16:
            raise CheckError(f"--near {self.near} bits; expected 0 (off) to 16, further than that pictures just differ")
        if self.image_root is not None and not self.image_root.is_dir():
            raise CheckError(f"--image-root {self.image_root} is not a folder; it is where pictures count from")

    @property
    def folder(self) -> Path:
        """Where reports go."""
        return self.out or Path("runs/check") / (self.path.resolve().stem or "root")

    @property
    def num_workers(self) -> int:
        """Processes to use."""
        return self.workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else self.workers or 2

    def that_matter(self) -> dict[str, str]:
        """The settings that decide what is found, as text: a check with others cannot be gone on with."""
        harmless = ("out", "workers", "ignore", "drop", "fail_on", "fix", "resume")
        return {item.name: str(getattr(self, item.name)) for item in fields(self) if item.name not in harmless}
