"""Work that nothing tears in the middle.

Python runs signal handlers on the main thread, between any two bytecodes, and what they raise comes
out there: out of the inside of a database driver, say, whose transaction then stays open, with its
locks, until some cycle of objects is collected.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

from proctree.latch import Latch

T = TypeVar("T")


def untorn(work: Callable[[], T]) -> T:
    """Does it where no handler's exception comes: from the main thread on a thread of its own, with
    our context variables. An exception that comes while we wait for that goes on at once, and the
    work goes on beside it.

    Raises:
        What `work` raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    results: list[T] = []
    errors: list[BaseException] = []
    done = Latch()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            results.append(context.run(work))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=run, name="proctree-untorn", daemon=True).start()
    except RuntimeError:
        # Not one thread more (EAGAIN of pthread_create(3)): most of the time nobody interrupts.
        return work()
    done.wait()
    if results:
        return results.pop()
    error = errors.pop()
    try:
        raise error
    finally:
        del error  # its traceback has this frame
