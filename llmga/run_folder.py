"""The folder of a run: what lies in it, whether it goes on from something, and where it came from.

config.yaml  environment.json  metrics.jsonl  samples/  checkpoint-<step>/  final/
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from llmga.checkpoint import (
    checkpoint_step,
    is_disk_full,
    latest_checkpoint,
    read_marker,
    remove_incomplete,
    sha256,
)
from llmga.config import dump_config, save_config
from llmga.environment import environment
from llmga.files import atomic_write, nearest_there
from llmga.run_inputs import Changes, Fingerprint, decisive_changes, fingerprints, in_one_clause, other_settings
from llmga.runtime import MetricsLog, RunFailed

_FULL_BYTES = 1 << 16  # free on a disk that is full; some errors do not say why nothing more could be written
logger = logging.getLogger(__name__)

# Settings that may change from one start to the next without the result changing.
_HARMLESS = (
    "run.resume",  # and run.resume_anyway
    "run.threads",
    "run.num_workers",
    "run.keep_last",
    "run.trackers",
    "run.record_sample_ids",
    "run.preflight",
    "run.join_timeout_s",
)


class ResumeError(ValueError):
    """A checkpoint that does not fit the run that wants to go on from it; the message says what to do."""


class RunFolder:
    """Paths and history of one run folder. Only rank 0 calls the methods that write.

    Args:
        path: the run folder, `run.output_dir`; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.final = path / "final"
        self.samples = path / "samples"
        self.metrics = MetricsLog(path / "metrics.jsonl")

    @property
    def is_finished(self) -> bool:
        """Whether the run's result is there; it appears at once and whole."""
        return self.final.is_dir()

    def start(self, config: Any, resume: bool) -> Path | None:
        """Make the folder ready for a run and say which checkpoint it goes on from, None for none.

        What an interrupted save left is removed, and logs are cut back to the checkpoint. Without `resume`, what the
        folder holds is moved to `previous-<n>` inside it, so that no flag ever deletes a result.

        Args:
            config: the run's settings.
            resume: go on from the newest checkpoint, if there is one.
        Raises:
            ResumeError: the checkpoint was trained on other data, by another mixture or seed, or from another model,
                and `run.resume_anyway` is not set.
            RunFailed: the disk is full.
        """
        with explaining_full_disk(self):
            return self._start(config, resume)

    def _start(self, config: Any, resume: bool) -> Path | None:
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            self._move_aside()
        for broken in remove_incomplete(self.path):
            logger.warning("removed %s: it was not written to its end", broken)
        checkpoint = latest_checkpoint(self.path)
        files = fingerprints(config)
        if checkpoint is not None:
            self._refuse_another_run(checkpoint, config, files)
        for key, (before, now) in self.changed_settings(config).items():
            logger.warning("%s was %s when this run began and is %s now", key, before, now)
        self._cut_logs(checkpoint_step(checkpoint) if checkpoint else 0)
        save_config(config, self.path / "config.yaml")
        starts = [*self._starts(), {**environment(), "inputs": files}]
        atomic_write(self.path / "environment.json", json.dumps({"starts": starts}, indent=1))
        return checkpoint

    def say_finished(self, config: Any) -> None:
        """Tell that there is nothing to do, and how to do it all the same."""
        changed = self.changed_settings(config)
        logger.info(
            "%s is finished: %s%s. To train anew, give another run.output_dir or run.resume=false",
            self.path,
            self.final,
            f" (with other settings than now: {', '.join(changed)})" if changed else "",
        )

    def changed_settings(self, config: Any) -> Changes:
        """Settings that differ from those the folder was last used with: key to (then, now); harmless ones left out."""
        if (before := self._settings_before()) is None:
            return {}
        changed = other_settings(before, dump_config(config))
        return {key: values for key, values in changed.items() if not key.startswith(_HARMLESS)}

    def _refuse_another_run(self, checkpoint: Path, config: Any, files: Mapping[str, Fingerprint]) -> None:
        before = self._settings_before() or {}
        recorded = [start["inputs"] for start in self._starts() if "inputs" in start]
        changes = decisive_changes(self.changed_settings(config), before, recorded[-1] if recorded else {}, files)
        if not changes:
            return
        if not config.run.resume_anyway:
            raise ResumeError(
                f"{checkpoint} was trained otherwise: {in_one_clause(changes)}; undo that, give another "
                "run.output_dir, or go on all the same with run.resume_anyway=true"
            )
        logger.warning("run.resume_anyway: going on from %s although %s", checkpoint, in_one_clause(changes))

    def _settings_before(self) -> dict[str, Any] | None:
        path = self.path / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _move_aside(self) -> None:
        held = [path for path in self.path.iterdir() if not path.name.startswith("previous-")]
        if held:
            taken = [path.name.removeprefix("previous-") for path in self.path.glob("previous-*")]
            number = 1 + max((int(name) for name in taken if name.isdecimal()), default=0)
            previous = self.path / f"previous-{number}"
            previous.mkdir()
            for path in held:
                path.rename(previous / path.name)
            logger.warning("run.resume is false: what %s held is now in %s", self.path, previous)

    def _cut_logs(self, step: int) -> None:
        for path in (self.metrics.path, *self.path.glob("samples-rank*.jsonl")):
            MetricsLog(path).cut_after(step)

    def _starts(self) -> list[dict[str, Any]]:
        try:
            return list(json.loads((self.path / "environment.json").read_text())["starts"])
        except (OSError, ValueError, KeyError, TypeError):
            return []


def check_fits(checkpoint: Path, **wanted: Any) -> None:
    """Compare the facts in a checkpoint's marker with those of the run that wants to resume from it.

    Args:
        checkpoint: complete.
        wanted: `examples_per_step`, `engine` ("plain", "zero2", "zero3") and `world_size` of this run.
    Raises:
        ResumeError: another number of examples per step, another engine, or ZeRO on another number of processes.
    """
    found = {key: read_marker(checkpoint).get(key, value) for key, value in wanted.items()}
    again = "or start anew with run.resume=false"
    if found["examples_per_step"] != wanted["examples_per_step"]:
        raise ResumeError(
            f"{checkpoint} was trained with {found['examples_per_step']} examples per step, this run has "
            f"{wanted['examples_per_step']}; keep run.batch_size x run.accumulation_steps x processes the same, {again}"
        )
    if found["engine"] != wanted["engine"]:
        raise ResumeError(
            f"{checkpoint} was written by {found['engine']}, this run uses {wanted['engine']}; "
            f"set run.deepspeed as it was, {again}"
        )
    if wanted["engine"] != "plain" and found["world_size"] != wanted["world_size"]:
        raise ResumeError(
            f"{checkpoint} holds the optimizer of {found['world_size']} processes, this run has "
            f"{wanted['world_size']}, and DeepSpeed cannot share it out anew; start as many processes, {again}"
        )


def way_on(run: RunFolder) -> str:
    """What a run that stopped early left, and how it goes on."""
    kept = latest_checkpoint(run.path)
    if kept is None:
        return "there is no checkpoint yet, so the same command starts again"
    return f"{kept} is complete, and the same command goes on from it"


@contextlib.contextmanager
def explaining_full_disk(run: RunFolder) -> Iterator[None]:
    """Turn the many errors of a full disk into one sentence; what was half written goes, so that space comes back.

    Raises:
        RunFailed: instead of any error that says that the disk is full.
    """
    try:
        yield
    except RunFailed:
        raise
    except Exception as error:
        disk = nearest_there(run.path)
        ours = isinstance(error, ValueError)  # a mistake in settings or data stays one on a disk that is nearly full
        if not is_disk_full(error) and (ours or shutil.disk_usage(disk).free > _FULL_BYTES):
            raise
        remove_incomplete(run.path)
        free = shutil.disk_usage(disk).free / 1e6
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RunFailed(
            f"could not write to {run.path}: {reason} ({free:,.0f} MB free now). "
            f"Make room, or set run.keep_last lower; {way_on(run)}"
        ) from error


def hashes(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Path, size and SHA-256 of every file, and of every file directly in a folder: what a result was made from."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    return [{"path": str(file), "bytes": file.stat().st_size, "sha256": sha256(file)} for file in files]
