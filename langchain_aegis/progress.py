"""A progress bar for batches, where somebody asks for one."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import logger

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

_FEWEST = 2  # items: what is over with its first answer needs no bar


@contextmanager
def batch_progress(show: Literal["auto"] | bool = "auto", *, label: str = "batch") -> Iterator[None]:
    """Show a bar for each batch that is worked through inside: done, failed, rate, time left.

        with batch_progress():
            answers = chain.batch(questions)

    It is for the four batch methods of this package's wrappers and router, also inside a chain or a graph's node.
    A batch that an item of another batch starts has none. The bar is written to standard error, and whatever goes
    wrong with it, the batch goes on without.

    Args:
        show: "auto": if standard error is a terminal. True: in any case; where it is no terminal, one line per batch
            when all is over. False: not at all.
        label: Stands in front of the bar.

    Raises:
        AegisConfigError: `show` is none of these.
    """
    if show not in ("auto", True, False):
        raise AegisConfigError(f'show must be "auto", True or False, got {show!r}')
    board = Board(label, always=show is True) if show else None
    token = _asked.set(board)
    try:
        yield
    finally:
        with suppress(ValueError):  # left in another context, which never had it
            _asked.reset(token)
        if board is not None:
            board.close()


def bar_for(total: int) -> Bar:
    """Return the bar of a batch of `total` items; one that does nothing if nobody asked."""
    board = _asked.get()
    return NO_BAR if board is None or total < _FEWEST else board.bar(total)


class Bar:
    """One batch's bar, and base of what is shown; this one shows nothing."""

    __slots__ = ()

    def items(self, run: Callable[[int], T]) -> Callable[[int], T]:
        """Return `run` for items that show no bars of their own."""
        return run

    def aitems(self, run: Callable[[int], Coroutine[Any, Any, T]]) -> Callable[[int], Coroutine[Any, Any, T]]:
        """As `items`, for coroutines."""
        return run

    def told(self, outcome: object) -> None:
        """Count an item that has ended; an `Exception` is a failure."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it stands."""


NO_BAR = Bar()


class Board:
    """Where the bars of one `batch_progress` stand, one below the other.

    Args:
        label: Stands in front of each.
        always: Also where standard error is no terminal.
    """

    def __init__(self, label: str, *, always: bool) -> None:
        self._label = label
        self._always = always
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._off = False

    def bar(self, total: int) -> Bar:
        """Return a new bar at the bottom."""
        try:
            with self._lock:
                if self._progress is None and not self._off:
                    self._progress = _started(self._always)
                    self._off = self._progress is None
                progress = self._progress
            if progress is None:
                return NO_BAR
            return _ShownBar(self, progress, progress.add_task(self._label, total=total, failed=0))
        except Exception as exc:  # whatever a terminal may raise is not the batch's fault
            self.give_up(exc)
            return NO_BAR

    def close(self) -> None:
        """Write the last state, and give the terminal back."""
        with self._lock:
            progress, self._progress, self._off = self._progress, None, True
        if progress is not None:
            try:
                progress.stop()
            except Exception as exc:  # as above
                self.give_up(exc)

    def give_up(self, error: Exception) -> None:
        """Show nothing from now on."""
        logger.debug("no progress is shown: %s: %s", type(error).__name__, error)
        with self._lock:
            progress, self._progress, self._off = self._progress, None, True
        if progress is not None:
            with suppress(Exception):  # it failed before
                progress.stop()


class _ShownBar(Bar):
    """A bar on a board."""

    __slots__ = ("_board", "_failed", "_progress", "_task")

    def __init__(self, board: Board, progress: Progress, task: TaskID) -> None:
        self._board = board
        self._progress = progress
        self._task = task
        self._failed = 0

    def items(self, run: Callable[[int], T]) -> Callable[[int], T]:
        def alone(at: int) -> T:
            _asked.set(None)  # each item has a context of its own
            return run(at)

        return alone

    def aitems(self, run: Callable[[int], Coroutine[Any, Any, T]]) -> Callable[[int], Coroutine[Any, Any, T]]:
        async def alone(at: int) -> T:
            _asked.set(None)
            return await run(at)

        return alone

    def told(self, outcome: object) -> None:
        self._failed += isinstance(outcome, Exception)
        self._do(lambda: self._progress.update(self._task, advance=1, failed=self._failed))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed += isinstance(error, Exception)  # the one that ends the batch
        self._do(lambda: self._progress.update(self._task, failed=self._failed))
        self._do(lambda: self._progress.stop_task(self._task))

    def _do(self, what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as exc:  # whatever a terminal may raise is not the batch's fault
            self._board.give_up(exc)


def _started(always: bool) -> Progress | None:
    """Return a running display on standard error, or None where nothing is to be shown."""
    if not (always or sys.stderr.isatty()):
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Failed(ProgressColumn):
        def render(self, task: Any) -> Text:
            failed = task.fields["failed"]
            return Text(f"{failed} failed", style="red") if failed else Text("")

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            rate = task.completed / task.elapsed if task.completed and task.elapsed else 0.0
            return Text("" if not rate else f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")

    console = Console(file=cast("Any", _Stderr()), force_jupyter=False)
    progress = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Failed(), Rate(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,  # seconds: one answer may take minutes
        redirect_stdout=False,  # what the program itself prints goes where it did
        redirect_stderr=False,
    )  # fmt: skip
    progress.start()
    return progress


class _Stderr:
    """Standard error, whose end is nobody's error: the display is written from a thread that nobody watches."""

    def __init__(self) -> None:
        self._file = sys.stderr

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


_asked: ContextVar[Board | None] = ContextVar("aegis_batch_progress", default=None)
