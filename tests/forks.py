"""Processes that start with everything imported, since importing torch and its friends takes longer than a small run.

One server imports them (`FORKS`, a context of multiprocessing), and each process is forked from it. `warm_python` is an
interpreter for command lines: given a script, `-m` and a module, or `-c` and code, it has it run in such a fork, which
gets its arguments, folder, variables, streams and signals, and whose end it shares. What is started in there by
`sys.executable`, as launchers do, is warm as well. Variables that a library reads while it is imported come too late in
a fork: they have a server of their own. One test of each command takes the true interpreter.
"""

import array
import atexit
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
TOOLS = ["deepspeed", "torch.distributed.run"]
HELPERS = ["tests.forks", "tests.toy_loop", "tests.toy_stage2", "tests.e2e.stage1_run"]
RELEASES = [
    "llmga.release.export",
    "llmga.release.pull",
    "llmga.stage1.lora",
    "llmga.stage2.sample",
    "llmga.diffrir.network",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
]
SERVE = "import socket, sys; from tests import forks; forks.serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])"
FORKS.set_forkserver_preload(["llmga.stage1.train", "llmga.stage2.train", "llmga.diffrir.train", *TOOLS, *HELPERS])

CLIENT = f"""#!{sys.executable} -SE
import array, json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(SOCKET)
    asked = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "variables": dict(os.environ)}}
    asked = json.dumps(asked).encode()
    streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    server.sendmsg([len(asked).to_bytes(8, "little")], [streams])
    server.sendall(asked)
    answers = server.makefile("r")
    child = int(answers.readline())

    def pass_on(number, frame):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def warm_python(**imported_with: str) -> str:
    """Path of the warm interpreter of this test process.

    Args:
        imported_with: variables that what releases need is imported with.
    """
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    path, address = folder / "python", folder / "socket"
    path.write_text(CLIENT.replace("SOCKET", repr(str(address)), 1))
    path.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(64)
        if imported_with:
            line = [sys.executable, "-c", SERVE, str(listening.fileno()), str(path)]
            environment = {**os.environ, **imported_with, "PYTHONPATH": str(ROOT)}
            server = subprocess.Popen(line, env=environment, pass_fds=[listening.fileno()])
        else:
            server = FORKS.Process(target=_serve, args=(listening, str(path)), daemon=False)
            server.start()
    atexit.register(server.kill)
    return str(path)


def serve(listening: socket.socket, executable: str) -> None:
    """Import what releases need, with the variables of this process, then serve."""
    for name in RELEASES:
        importlib.import_module(name)
    _serve(listening, executable)


def _serve(listening: socket.socket, executable: str) -> None:
    """Fork a keeper for everyone who calls."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave nothing behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        caller, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(_keep(caller, executable))
        caller.close()


def _keep(caller: socket.socket, executable: str) -> int:
    """Fork the process that was asked for, and tell how it ends; it dies with its caller."""
    size, streams = _receive_streams(caller)
    asked = json.loads(caller.recv(size, socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        caller.close()
        os._exit(_become(asked, streams, executable))
    for stream in streams:
        os.close(stream)
    caller.sendall(f"{child}\n".encode())
    threading.Thread(target=_die_with, args=(caller, child), daemon=True).start()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        caller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return 0


def _receive_streams(caller: socket.socket) -> tuple[int, list[int]]:
    """The length of what is asked, and the caller's three streams."""
    received = array.array("i")
    message, extra, _, _ = caller.recvmsg(8, socket.CMSG_LEN(3 * received.itemsize))
    received.frombytes(extra[0][2])
    return int.from_bytes(message, "little"), list(received)


def _die_with(caller: socket.socket, child: int) -> None:
    if not caller.recv(1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _become(asked: dict[str, Any], streams: list[int], executable: str) -> int:
    """Be the interpreter, from command line to exit code."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for own, given in enumerate(streams):
        os.dup2(given, own)
        os.close(given)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["variables"])
    multiprocessing.process.current_process()._config["daemon"] = False
    multiprocessing.set_start_method(None, force=True)
    sys.executable = executable
    try:
        _run(asked["arguments"])
        code = 0
    except SystemExit as ended:
        code = _exit_code(ended)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    return code


def _run(arguments: list[str]) -> None:
    """What python does with its arguments."""
    while arguments[0] in ("-u", "-B"):
        arguments = arguments[1:]
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _exit_code(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return (ended.code or 0) & 0xFF
    print(ended.code, file=sys.stderr)
    return 1
