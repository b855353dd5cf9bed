"""Settings of every test: one CPU thread, no network, caches in a temporary folder; marks follow from the folder."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before any test imports torch. Two workers with all cores each would be slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

TESTS = Path(__file__).parent
SLOW_RINGS = ("e2e", "browser")
SLOW_TIMEOUT_SECONDS = 300


@pytest.fixture(autouse=True, scope="session")
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Indexes and converted files never land in, or come from, the user's cache."""
    os.environ["LLMGA_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _library_logging_as_imported() -> Iterator[None]:
    """What a test set up for the console is gone after it; pytest would catch a silenced logger's messages twice."""
    yield
    logger = logging.getLogger("llmga")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark by ring; give the slow ones time; skip gpu ones."""
    for item in items:
        ring = item.path.relative_to(TESTS).parts[0]
        if ring in ("integration", "parity", *SLOW_RINGS):
            item.add_marker(getattr(pytest.mark, ring))
        if ring in SLOW_RINGS and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
