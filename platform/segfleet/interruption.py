"""An end that was asked for: Ctrl-C, or the SIGTERM of `kill` and `ray job stop`."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def known_interruption() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of an error that came up while one was on its way.

    A library that tidies up may fail at it, and its error then takes the interruption's place: Optuna's lock of a
    journal, interrupted when it has just been given up, is looked for again.
    """
    try:
        yield
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, KeyboardInterrupt):
            behind = behind.__cause__ or behind.__context__
        if behind is None:
            raise
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise Terminated at the first SIGTERM, in the main thread; a second one does not disturb the tidying up."""
    is_terminated = False

    def terminate(*_: Any) -> None:
        nonlocal is_terminated
        if not is_terminated:
            is_terminated = True
            raise KeyboardInterrupt  # Ray knows this one alone, and raises it anew

    with kept_sigterm():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
        try:
            with known_interruption():
                yield
        except KeyboardInterrupt:
            if is_terminated:
                raise Terminated from None
            raise


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Give SIGTERM back, at the end, to the handler that it has now.

    The one that `ray.init` puts in its place prints native stacks and aborts the process 3 s later, whatever is being
    tidied up.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
