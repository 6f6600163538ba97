"""Several streams read at once, within bounds, in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

# Batches of one stream that are read before they are asked for.
AHEAD_MAX = 8
_LOOK_SECONDS = 0.1


class _End:
    """The last thing in a stream's queue: why it ended, where it failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def in_parallel(
    streams: Sequence[Callable[[], Iterator[pa.RecordBatch]]], readers: int
) -> Iterator[pa.RecordBatch]:
    """The batches of `streams`, one stream after the other, with `readers` of them open at a time."""
    queues: list[queue.Queue[Any]] = [queue.Queue(AHEAD_MAX) for _ in streams]
    # A reader takes the next stream only once the caller is near it, so that few are held in memory.
    near = threading.Semaphore(readers)
    stopped = threading.Event()
    numbers = iter(range(len(streams)))
    taking = threading.Lock()

    def put(number: int, item: Any) -> bool:
        while not stopped.is_set():
            try:
                queues[number].put(item, timeout=_LOOK_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        while not stopped.is_set():
            if not near.acquire(timeout=_LOOK_SECONDS):
                continue
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            error: BaseException | None = None
            batches = streams[number]()
            try:
                for batch in batches:
                    if not put(number, batch):
                        return
            except BaseException as failure:  # noqa: BLE001 - the caller's thread raises it
                error = failure
            finally:
                close = getattr(batches, "close", None)
                if close is not None:
                    close()
            put(number, _End(error))

    threads = [
        threading.Thread(target=read, name="coeval-endpoint", daemon=True) for _ in range(min(readers, len(streams)))
    ]

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for thread in threads:
                thread.start()
            for number in range(len(streams)):
                while True:
                    item = queues[number].get()
                    if isinstance(item, _End):
                        if item.error is not None:
                            raise item.error
                        near.release()
                        break
                    yield item
        finally:
            stopped.set()
            for thread in threads:
                thread.join(timeout=10)

    return batches()
