"""An end that was asked for: Ctrl-C, or the SIGTERM of `kill` and `ray job stop`."""

import contextlib
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


class _Asked:
    """What of `SIGNALS` came first since the outermost `terminable` began, and how many of those there are."""

    first: signal.Signals | None = None
    is_heard = False
    depth = 0


@contextlib.contextmanager
def known_interruption() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end where one was on its way, whatever became of it.

    A library that tidies up may fail at it, and its error then takes the interruption's place: Optuna's lock of a
    journal, interrupted when it has just been given up, is looked for again. And one that catches the error, as Ray
    Tune does where a trial ends, or an interruption within a destructor, leaves nothing of it.
    """
    try:
        yield
    except Exception as error:
        if _Asked.first is None:
            raise
        raise KeyboardInterrupt from error
    if _Asked.first is not None:
        raise KeyboardInterrupt


def heard(interruption: KeyboardInterrupt) -> None:
    """Note that an interruption was caught by someone who ends what it was raised in, and let go what that held.

    The frames that it came through live as long as it does, and with them their cursors: a statement of SQLite that is
    midway keeps everybody from writing to the database, for 20 s and in vain, who is to record the end.
    """
    _Asked.is_heard = _Asked.first is not None
    error: BaseException | None = interruption
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C and SIGTERM, in the main thread; the latter leaves as Terminated.

    Once one is `heard`, a further SIGTERM does not disturb the tidying up; one that got lost does not silence the next.
    What the process was told to ignore, as `nohup` and `&` do, it goes on ignoring.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _kept_handlers(SIGNALS):
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        _Asked.depth += 1
        try:
            with known_interruption():
                yield
        except KeyboardInterrupt as interruption:
            heard(interruption)
            if _Asked.first == signal.SIGTERM:
                raise Terminated from None
            raise
        finally:
            _Asked.depth -= 1
            if _Asked.depth == 0:
                _Asked.first, _Asked.is_heard = None, False


def _interrupt(number: int, _: Any) -> None:
    _Asked.first = _Asked.first or signal.Signals(number)
    if not _Asked.is_heard or number == signal.SIGINT:
        raise KeyboardInterrupt  # Ray knows this one alone, and raises it anew


@contextlib.contextmanager
def kept_sigterm() -> Iterator[None]:
    """Give SIGTERM back, at the end, to the handler that it has now.

    The one that `ray.init` puts in its place prints native stacks and aborts the process 3 s later, whatever is being
    tidied up.
    """
    with _kept_handlers([signal.SIGTERM]):
        yield


@contextlib.contextmanager
def _kept_handlers(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)
