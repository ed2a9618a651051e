"""An iterator that a thread of its own runs ahead of its reader."""

import threading
from collections.abc import Iterable, Iterator
from queue import Full, Queue
from typing import TypeVar

T = TypeVar("T")
_SECONDS = 0.1


def ahead(items: Iterable[T], most: int) -> Iterator[T]:
    """Yield `items`, of which up to `most` are made before they are asked for; an error reaches the reader in turn."""
    queue: Queue[tuple[T | None, BaseException | None, bool]] = Queue(most)
    closed = threading.Event()

    def put(item: T | None, error: BaseException | None, last: bool) -> None:
        while not closed.is_set():
            try:
                return queue.put((item, error, last), timeout=_SECONDS)
            except Full:
                continue

    def run() -> None:
        try:
            for item in items:
                if closed.is_set():
                    return
                put(item, None, False)
            put(None, None, True)
        except BaseException as error:
            put(None, error, True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = queue.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
