"""Progress of batches: shown where somebody asks for it, on standard error only, and never in a batch's way."""

import asyncio
import io
import os
import pty
import re
import subprocess
import sys
import threading

import pytest
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

from langchain_aegis import (
    AegisConfigError,
    AegisConnectionError,
    AegisRouter,
    BatchingChatModel,
    BatchingRunnable,
    ChatAegis,
    batch_progress,
)
from langchain_aegis.progress import NO_BAR, bar_for

ITEMS = [f"document {n}" for n in range(7)]


@pytest.fixture
def model(server):
    return BatchingChatModel(ChatAegis("m", base_url=server.base_url), max_concurrency=2)


def lines(text):
    """What stands on the terminal, without colours and spaces."""
    return [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines() if line.strip()]


async def ways(model):
    yield lambda: asyncio.to_thread(model.batch, ITEMS)
    yield lambda: model.abatch(ITEMS)
    yield lambda: asyncio.to_thread(lambda: list(model.batch_as_completed(ITEMS)))

    async def completed():
        return [each async for each in model.abatch_as_completed(ITEMS)]

    yield completed


async def test_each_way_of_a_batch_shows_its_own_bar_and_the_same_answers(model, capsys):
    async for way in ways(model):
        assert len(await way()) == 7
        assert capsys.readouterr() == ("", "")
        with batch_progress(True, label="reading"):
            assert len(await way()) == 7
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = lines(err)
        assert line.startswith("reading")
        assert "7/7" in line
        assert "failed" not in line
        assert re.search(r"\d\.\d(/s| s each)", line)


@pytest.mark.parametrize(
    "built",
    [
        lambda model: model.bind(stop=["END"]),
        lambda model: (
            RunnableLambda(lambda text: {"text": text})
            | ChatPromptTemplate.from_messages([("human", "{text}")])
            | model
        ),
        lambda model: model.with_retry(stop_after_attempt=2),
        lambda model: BatchingRunnable(model.inner),
        lambda model: AegisRouter({"all": model}, default="all"),
        lambda model: AegisRouter({"all": model}, default="all").bind_tools([]),
    ],
    ids=["bind", "chain", "retry", "runnable", "router", "bound router"],
)
async def test_it_is_seen_through_what_is_built_on_the_model(built, model, capsys):
    with batch_progress(True):
        built(model).batch(ITEMS)
        await built(model).abatch(ITEMS)
    told = lines(capsys.readouterr().err)
    assert len(told) == 2
    assert all("7/7" in line for line in told)


def test_failures_are_counted(capsys):
    runnable = BatchingRunnable(lambda n: 1 / n, max_concurrency=2)
    with batch_progress(True):
        answers = runnable.batch([1, 0, 2, 0], return_exceptions=True)
    assert [isinstance(answer, ZeroDivisionError) for answer in answers] == [False, True, False, True]
    (line,) = lines(capsys.readouterr().err)
    assert "4/4" in line
    assert "2 failed" in line
    with pytest.raises(ZeroDivisionError), batch_progress(True):
        runnable.batch([0, 1, 2, 3], {"max_concurrency": 1})
    (line,) = lines(capsys.readouterr().err)
    assert "0/4" in line
    assert "1 failed" in line


async def test_who_leaves_a_batch_leaves_the_bar_as_it_stands(capsys):
    runnable = BatchingRunnable(lambda n: n)
    with batch_progress(True):
        outcomes = runnable.batch_as_completed([1, 2, 3], {"max_concurrency": 1})
        next(outcomes)
        outcomes.close()
        awaited = runnable.abatch_as_completed([1, 2, 3], {"max_concurrency": 1})
        await anext(awaited)
        await awaited.aclose()
    assert ["1/3" in line for line in lines(capsys.readouterr().err)] == [True, True]


async def test_a_batch_inside_an_item_shows_nothing(capsys):
    inner = BatchingRunnable(lambda n: n)

    def whole(n):
        return sum(inner.batch([n, n, n]))

    async def awhole(n):
        return sum(await inner.abatch([n, n, n]))

    outer = BatchingRunnable(RunnableLambda(whole, awhole))
    with batch_progress(True):
        assert outer.batch([1, 2]) == [3, 6]
        assert await outer.abatch([1, 2]) == [3, 6]
    assert ["2/2" in line for line in lines(capsys.readouterr().err)] == [True, True]


async def test_batches_side_by_side_have_a_line_each(model, capsys):
    with batch_progress(True):
        await asyncio.gather(model.abatch(ITEMS), model.abatch(ITEMS[:3]))
    assert sorted(re.findall(r"\d/\d", " ".join(lines(capsys.readouterr().err)))) == ["3/3", "7/7"]


def test_nothing_is_shown_where_nobody_looks(model, capsys):
    for show in ("auto", False):  # the standard error of a test is no terminal
        with batch_progress(show):
            model.batch(ITEMS)
    with batch_progress(True):
        model.batch([])
        model.batch(ITEMS[:1])
    assert capsys.readouterr() == ("", "")


def test_whoever_asks_inside_decides(model, capsys):
    with batch_progress(True), batch_progress(False):
        model.batch(ITEMS)
    assert bar_for(7) is NO_BAR
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("show", [None, 2, "yes", "always"])
def test_it_must_be_known_when_to_show(show):
    with pytest.raises(AegisConfigError, match='"auto", True or False'), batch_progress(show):
        pass


class Terminal(io.StringIO):
    """A terminal that may go away."""

    gone = None

    def isatty(self):
        return True

    def write(self, text):
        if self.gone:
            raise self.gone
        return super().write(text)


@pytest.mark.parametrize("gone", [BrokenPipeError(), ValueError("I/O operation on closed file"), MemoryError()])
@pytest.mark.parametrize("when", ["before", "between", "within"])
async def test_a_terminal_that_goes_away_hurts_no_batch(model, monkeypatch, gone, when):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if when == "before":
        terminal.gone = gone

    def item(n):
        if when == "within" and n == 3:
            terminal.gone = gone
        return n

    with batch_progress():
        assert BatchingRunnable(item).batch([1, 2, 3, 4]) == [1, 2, 3, 4]
        terminal.gone = gone
        assert len(await model.abatch(ITEMS)) == 7


def test_no_standard_error_at_all_is_no_terminal(model, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with batch_progress():
        assert len(model.batch(ITEMS)) == 7


def test_no_thread_is_left(model, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = set(threading.enumerate())
    with batch_progress():
        model.batch(ITEMS)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    assert "7/7" in sys.stderr.getvalue()


def test_an_error_of_the_batch_is_the_error_that_is_raised(capsys):
    model = BatchingChatModel(ChatAegis("m", base_url="http://127.0.0.1:9"))
    with pytest.raises(AegisConnectionError), batch_progress(True):
        model.batch(ITEMS)


PROGRAM = """
from langchain_aegis import BatchingRunnable, batch_progress
run = BatchingRunnable(lambda n: n * n)
with batch_progress(label="squares"):
    print(run.batch([1, 2, 3, 4, 5]))
    print("still the program's own")
"""


@pytest.mark.slow
def test_on_a_terminal_it_goes_to_standard_error_only():
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=120,
            check=False, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )  # fmt: skip
        seen = os.read(ours, 1_000_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, seen
    assert done.stdout.splitlines() == ["[1, 4, 9, 16, 25]", "still the program's own"]
    assert any(line.startswith("squares") and "5/5" in line for line in lines(seen))
