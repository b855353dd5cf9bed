"""What every training run needs around its loop: ranks, seeds, signals, logs and figures.

DeepSpeed enters the house here. Nothing in this file knows what is being trained.
"""

import atexit
import datetime
import json
import logging
import os
import platform
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from llmga.files import atomic_write
from llmga.slurm import meeting_place

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_REPEAT_SECONDS = 3.0  # a launcher passes on the Ctrl-C that the terminal has already sent to its children
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


if not torch.cuda.is_available():  # read when deepspeed is imported, which accelerate does unasked
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


class RuntimeSetupError(ValueError):
    """A launch that cannot work; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0


def init_distributed(with_deepspeed: bool = False, store: dist.Store | None = None) -> Ranks:
    """Join the other processes that torchrun, deepspeed or srun started; without them, be the only one.

    Must come before the model is built: under ZeRO-3 a model built earlier takes the world to have one process.
    Without a GPU, DeepSpeed is told to use the CPU and the processes talk through gloo.

    Args:
        store: where the processes have met already; without it they meet at MASTER_ADDR.
    Raises:
        RuntimeSetupError: this machine shows fewer GPUs than processes were started on it.
    """
    ranks = ranks_from_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(device_index(ranks, torch.cuda.device_count()))
    # A lone process that sees several GPUs would make the Trainer split each batch over them (DataParallel).
    spare_gpus = ranks.world_size == 1 and torch.cuda.device_count() > 1
    if dist.is_initialized() or (ranks.world_size == 1 and not with_deepspeed and not spare_gpus):
        return ranks
    if spare_gpus:
        logger.warning("one process uses one of the %d GPUs; torchrun starts one for each", torch.cuda.device_count())
    if "MASTER_ADDR" not in os.environ:  # started by plain python: a group of one
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ.update({key: str(value) for key, value in alone.items()})
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if store is not None:
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=_COLLECTIVE_TIMEOUT
        )
    if with_deepspeed:  # takes a group that is there already
        import deepspeed

        # On a CPU it would compile a shared-memory collective first: that needs g++, takes a minute, and a build that
        # was killed leaves a lock which all later runs wait for. gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=_COLLECTIVE_TIMEOUT)
    elif store is None:
        dist.init_process_group(backend, timeout=_COLLECTIVE_TIMEOUT)
    return ranks


def close_distributed() -> None:
    """Leave the process group, when all ranks do so; does nothing without one.

    Not while an exception is handled: its traceback keeps models under DDP alive, which then take the group down with
    them and wait, with the interpreter's lock held, for a thread of gloo's that wants the lock.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` does, and where processes were joined, without tearing the interpreter down.

    gloo's threads outlive the group, because defaults of functions, wrapped models and engines hold on to it. One that
    still frees the tensors of the last collective asks for the interpreter's lock; when the interpreter is going down,
    that aborts the process, and a run that went well ends with SIGABRT. The group of a run that fails is not even left.
    """
    if "RANK" in os.environ:  # started by a launcher, or a group of one
        threading._shutdown()  # type: ignore[attr-defined]  # what multiprocessing does as well at the end of a process
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def device_index(ranks: Ranks, visible: int) -> int:
    """Which of the visible GPUs is this process's: the one of its number on this machine.

    Raises:
        RuntimeSetupError: there are not so many.
    """
    if ranks.local_rank >= visible:
        raise RuntimeSetupError(
            f"rank {ranks.rank} on {platform.node()} is process {ranks.local_rank + 1} of this machine, which shows "
            f"{visible} GPUs; start at most NPROC={visible} here, or let every process see all GPUs of its machine"
        )
    return ranks.local_rank


def zero3_is_on() -> bool:
    """Whether models that are built now are spread over the ranks by ZeRO-3, as one of this process already may be."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def whole(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Let every rank see all of some parameters, which ZeRO-3 spreads over the ranks; all ranks must ask together."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


@contextmanager
def without_zero3() -> Iterator[None]:
    """Let one rank build, save and load whole models while a ZeRO-3 run is alive.

    transformers does all three on all ranks together then, and hangs where one does them alone.
    """
    if not zero3_is_on():
        yield
        return
    from transformers.integrations import deepspeed as transformers_deepspeed

    reference = transformers_deepspeed._hf_deepspeed_config_weak_ref
    transformers_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers_deepspeed._hf_deepspeed_config_weak_ref = reference


def ranks_from_environment() -> Ranks:
    """RANK, LOCAL_RANK and WORLD_SIZE as torchrun and deepspeed set them, else as srun does."""
    env = os.environ
    if "RANK" not in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        slurm = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
        place = {"MASTER_PORT": "29500"} | meeting_place(env) | {k: env[k] for k in _PLACE if env.get(k)}
        if "MASTER_ADDR" in place:
            env.update({name: env[source] for name, source in slurm.items()} | place)
    return Ranks(int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1)))


_PLACE = ("MASTER_ADDR", "MASTER_PORT")


def _free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on at least one rank; every rank must ask."""
    return sum_over_ranks([float(flag)])[0] > 0


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise sum over the ranks; every rank must take part, with equally many values."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def from_main(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Result]) -> Result:
    """Do something on rank 0 alone; every rank gets its result, or fails with it instead of waiting for ever.

    Raises:
        RunFailed: on the other ranks, when the work raised on rank 0; there its own error is raised.
    """
    value: Any = None
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            value = work()
        except Exception as caught:
            error = caught
    value, problem = from_main((value, None if error is None else str(error)))
    if error is not None:
        raise error
    if problem is not None:
        raise RunFailed(problem)
    return value


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for libraries that draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RunFailed(RuntimeError):
    """A run that cannot go on, for a reason that one sentence says; no traceback is needed."""


class Interrupted(Exception):
    """The run was asked to stop, saved its state and can be resumed."""


class StopSignal:
    """SIGTERM or SIGINT becomes a flag, read between steps; a second SIGINT, some seconds later, aborts at once.

    The handlers are installed on construction and the former ones put back by `close`.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated = self.received is not None and time.monotonic() - self._since > _REPEAT_SECONDS
        if repeated and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            self._since = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                sys.stderr.write(f"\n{self.received}: saving after this step, then stopping (Ctrl-C again aborts)\n")

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks must ask at the same point."""
        stop = any_rank(self.received is not None)
        if stop and self.received is None:
            self.received = "a signal to another rank"
        return stop

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)


_outliving = False


def outlive_terminate() -> None:
    """In a data-loading worker: let signals to the whole process group pass, so that the step at hand can finish.

    Slurm, systemd and a terminal's Ctrl-C reach every process of a job. Torch's workers would die of it and take the
    step down with them. A SIGTERM from the parent itself still ends the worker at once.
    """
    global _outliving
    if torch.utils.data.get_worker_info() is None or _outliving:
        return
    _outliving = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_the_parent_says, daemon=True).start()


def _leave_when_the_parent_says() -> None:
    """Take the place of the signal handler, which in Python does not learn who sent the signal."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class MetricsLog:
    """A file of JSON lines, each with its `step`; appended to, and cut back when a run resumes from an earlier step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int, **values: Any) -> None:
        """Append one line at once, so that whoever follows the file sees it."""
        line = json.dumps({"step": step, **values}, ensure_ascii=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole line; a last line cut short by a crash is left out."""
        return list(self._lines())

    def cut_after(self, step: int) -> None:
        """Drop the lines past `step`, which the resumed run will write again."""
        if self.path.exists():
            kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines() if line["step"] <= step]
            atomic_write(self.path, "".join(kept))

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8").split("\n"):  # replies may hold other line breaks, as U+2028
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "step" in line:
                yield line


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now, so that lines appear above a progress bar and not through it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """The stream of this moment."""
        return sys.stderr


def setup_logging(ranks: Ranks) -> None:
    """Show the messages of `llmga` on the error stream: all of rank 0, warnings of the others."""
    logger = logging.getLogger("llmga")
    logger.setLevel(logging.INFO if ranks.is_main else logging.WARNING)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        name = "" if ranks.world_size == 1 else f"[rank {ranks.rank}] "
        handler.setFormatter(logging.Formatter(f"{'' if ranks.is_main else name}%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def memory_gb() -> dict[str, float]:
    """Peak memory of this process so far, in GB (10**9 bytes): `memory_gb`, and `cuda_gb` where there is a GPU."""
    peak = {"memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / 1e9, 3)}
    if torch.cuda.is_available():
        peak["cuda_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peak


_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
