"""Work shared out over processes: few pieces in flight, results as they come, and a process may die.

A damaged picture can take its decoder's process with it, and the system may end one that needs too much memory. The
pieces that were in flight are then done again, alone and item by item, so that the one at fault is known by name.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_IN_FLIGHT = 3  # pieces per worker: one in work, two waiting, so that memory does not grow with the work


class Pool(Generic[Item, Result]):
    """Applies a function to pieces of work.

    Args:
        work: takes the items of one piece, returns one result for each; importable by name, as are its items.
        workers: processes; 1 works in this one, where nothing can be saved from a decoder that crashes.
        crashed: the result of an item whose process died.
        halve: the two halves of an item that can be divided, tried one by one when its process died; () for another.
        join: the result of an item out of those of its halves.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], list[Result]],
        workers: int,
        crashed: Callable[[Item], Result],
        halve: Callable[[Item], Sequence[Item]] = lambda item: (),
        join: Callable[[Result, Result], Result] | None = None,
    ) -> None:
        self.work, self.workers, self.crashed, self.halve, self.join = work, workers, crashed, halve, join

    def map(self, pieces: Iterable[tuple[int, Sequence[Item]]]) -> Iterator[tuple[int, list[Result]]]:
        """(key, results) of every (key, items), in the order in which they are finished."""
        if self.workers == 1:
            for key, items in pieces:
                yield key, self.work(items)
            return
        rest = iter(pieces)
        unfinished: list[tuple[int, Sequence[Item]]] = []
        while True:
            with self._executor(self.workers) as executor:
                waiting: dict[Future[list[Result]], tuple[int, Sequence[Item]]] = {}
                try:
                    yield from self._drain(executor, rest, waiting)
                    return
                except BrokenProcessPool:
                    unfinished = sorted(waiting.values(), key=lambda piece: piece[0])
                finally:
                    for future in waiting:
                        future.cancel()
            for key, items in unfinished:
                yield key, [self._alone(item) for item in items]

    def _drain(
        self,
        executor: ProcessPoolExecutor,
        rest: Iterator[tuple[int, Sequence[Item]]],
        waiting: dict[Future[list[Result]], tuple[int, Sequence[Item]]],
    ) -> Iterator[tuple[int, list[Result]]]:
        """Keep a few pieces in flight until none is left; `waiting` holds what is not done when a process dies."""
        more = True
        while more or waiting:
            while more and len(waiting) < _IN_FLIGHT * self.workers:
                piece = next(rest, None)
                if piece is None:
                    more = False
                else:
                    waiting[self._submit(executor, piece, waiting)] = piece
            if waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    results = future.result()
                    key, _ = waiting.pop(future)
                    yield key, results

    def _submit(
        self,
        executor: ProcessPoolExecutor,
        piece: tuple[int, Sequence[Item]],
        waiting: dict[Future[list[Result]], tuple[int, Sequence[Item]]],
    ) -> Future[list[Result]]:
        try:
            return executor.submit(self.work, piece[1])
        except BrokenProcessPool:
            waiting[Future()] = piece  # taken from the pieces already, so it must not be lost
            raise

    def _alone(self, item: Item) -> Result:
        """One item in a process of its own; where that dies, each half of it."""
        with self._executor(1) as executor:
            try:
                return executor.submit(self.work, [item]).result()[0]
            except BrokenProcessPool:
                halves = self.halve(item)
        if not halves or self.join is None:
            return self.crashed(item)
        first, second = (self._alone(half) for half in halves)
        return self.join(first, second)

    def _executor(self, workers: int) -> ProcessPoolExecutor:
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload([self.work.__module__])
        return ProcessPoolExecutor(workers, context, initializer=_start_worker)


def _start_worker() -> None:
    """Ctrl-C is the parent's to handle, and a worker does not outlive it, even after kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()


def _leave_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
