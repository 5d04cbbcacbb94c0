"""An end that was asked for: Ctrl-C, or the SIGTERM of `kill` and `ray job stop`."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated at a SIGTERM, in the main thread.

    To be entered once Ray is initialized: its own handler prints native stacks and aborts the process 3 s later,
    whatever is being tidied up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_terminated = False

    def terminate(*_: Any) -> None:
        nonlocal is_terminated
        is_terminated = True
        raise KeyboardInterrupt  # Ray knows this one alone, and raises it anew

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        if is_terminated:
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
