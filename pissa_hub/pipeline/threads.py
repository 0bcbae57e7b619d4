"""Stages of the stream on threads of their own: ahead, behind, or side by side; errors surface where the values do."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue, SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_WAIT_SECONDS = 0.1
# How long an interrupt waits for a sink.
_LAST_SECONDS = 1.0


class _StoppedError(Exception):
    """The other side is gone."""


def is_interrupt(kind: type[BaseException] | None) -> bool:
    """Whether nobody may be kept waiting, for a thread's weight in hand for example, which can take minutes."""
    return kind is not None and issubclass(kind, KeyboardInterrupt)


class _Channel(Generic[T]):
    """A bounded queue whose two ends can give up."""

    def __init__(self, size: int) -> None:
        self._queue: Queue[T] = Queue(size)
        self.stopped = Event()

    def put(self, item: T) -> None:
        while not self.stopped.is_set():
            try:
                return self._queue.put(item, timeout=_WAIT_SECONDS)
            except Full:
                continue
        raise _StoppedError

    def get(self) -> T:
        while True:
            try:
                return self._queue.get(timeout=_WAIT_SECONDS)
            except Empty:
                if self.stopped.is_set():
                    raise _StoppedError from None


class Prefetch(Generic[T]):
    """Runs a generator ahead of its consumer.

    Args:
        items: closed on its own thread when the consumer leaves early.
        size: most items in between.
    """

    def __init__(self, items: Generator[T, None, None], size: int) -> None:
        self._channel: _Channel[tuple[T] | BaseException | None] = _Channel(size)
        self._items = items
        self._thread = Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while (item := self._channel.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if is_interrupt(kind):
            self._channel.stopped.set()
        else:
            self.close()

    def close(self) -> None:
        """Stop the generator and wait for its thread."""
        self._channel.stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            try:
                for item in self._items:
                    self._channel.put((item,))
                self._channel.put(None)
            finally:
                self._items.close()
        except _StoppedError:
            pass
        except BaseException as error:  # raised again by the consumer
            with suppress(_StoppedError):
                self._channel.put(error)


class Sink(Generic[T]):
    """Calls ``consume`` on a thread of its own for every item put, in order.

    Args:
        consume: what to do with an item.
        size: most items that wait.
        on_failure: called when ``consume`` has raised: to wake whoever waits for what it will never give back.
    """

    def __init__(self, consume: Callable[[T], None], size: int, on_failure: Callable[[], None] = lambda: None) -> None:
        self._channel: _Channel[tuple[T] | None] = _Channel(size)
        self._consume = consume
        self._on_failure = on_failure
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand over an item; raises what ``consume`` raised on an earlier one."""
        try:
            self._channel.put((item,))
        except _StoppedError:
            self.close()
            raise RuntimeError("put into a closed sink") from None

    def __enter__(self) -> Sink[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if is_interrupt(kind):
            self._channel.stopped.set()
            self._thread.join(_LAST_SECONDS)  # or what it has in hand is left lying about
        else:
            with suppress(BaseException):  # on the way out of an error, the sink's own would only hide the first
                self.close()

    def finish(self) -> None:
        """Wait until every item is consumed; raises what ``consume`` raised."""
        if self._error is None:
            with suppress(_StoppedError):
                self._channel.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Drop what is not yet consumed and wait for the item in hand."""
        self._channel.stopped.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (item := self._channel.get()) is not None:
                self._consume(item[0])
                if self._channel.stopped.is_set():
                    return
        except _StoppedError:
            pass
        except BaseException as error:  # raised again by put() or finish()
            self._error = error
            self._channel.stopped.set()
            self._on_failure()


class Team(Generic[T]):
    """Workers that do jobs side by side.

    While it exists, PyTorch's threads are shared out among the workers; afterwards they are as before.

    Args:
        size: number of workers.
        equip: makes what a worker keeps from job to job.
    """

    def __init__(self, size: int, equip: Callable[[], T]) -> None:
        self.size = size
        self._threads_before = torch.get_num_threads()
        self._idle: SimpleQueue[T] = SimpleQueue()
        for _ in range(size):
            self._idle.put(equip())
        # The number of threads is a setting of the calling thread, too.
        share = max(self._threads_before // size, 1)
        self._pool = ThreadPoolExecutor(size, "worker", initializer=torch.set_num_threads, initargs=(share,))

    def __enter__(self) -> Team[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=not is_interrupt(kind), cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def submit(self, job: Callable[[T], R]) -> Future[R]:
        """The job's result to come."""
        return self._pool.submit(self._do, job)

    def _do(self, job: Callable[[T], R]) -> R:
        equipment = self._idle.get()
        try:
            return job(equipment)
        finally:
            self._idle.put(equipment)
