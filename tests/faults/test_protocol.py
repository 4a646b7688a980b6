"""Whatever an Ollama server sends: an error of its type within its time, and nothing of it is ever an answer again."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from conftest import wait_until
from langchain_core.caches import InMemoryCache
from lying_server import END, LyingServer, chunked, line, plain

from faults.measure import SLACK, within
from langchain_aegis import AegisEmbeddingCache, AegisEmbeddings, BatchingChatModel, ChatAegis, errors, ndjson
from langchain_aegis.client import OllamaClient

TIME_S = 0.15  # for those faults that only time ends
LATE_S = 0.05 * SLACK  # how much later than that the error may come
FOUR = ("invoke", "ainvoke", "stream", "astream")
WAYS = pytest.mark.parametrize("way", FOUR)
BUSY = "server busy, please try again.  maximum pending requests exceeded"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


def each_way(names, ways=FOUR):
    """Return parameters `name, way`: each name in one way by default, in every way where there is time for it."""
    return pytest.mark.parametrize(
        ("name", "way"),
        [
            pytest.param(name, way, marks=[] if number % len(ways) == i else [pytest.mark.slow])
            for number, name in enumerate(names)
            for i, way in enumerate(ways)
        ],
    )


def answer(text="Paris."):
    """Return a script that answers as Ollama does, streamed or not."""
    whole = json.loads(END) | {"message": {"role": "assistant", "content": text}}
    return lambda body: list(chunked(line(text), END)) if body.get("stream") else plain(whole)


@dataclass
class Fault:
    """What a server does.

    Attributes:
        row: Of the matrix.
        error: What a caller gets, exactly.
        streamed: The script for a streamed answer; None: the same as `whole`.
        whole: The script for one that is not.
        retryable: Whether the error says that it may help to ask again.
        bounds_s: Names of the bounds that end it, so that they are short.
        address: Of the server, if it is none of ours.
    """

    row: int
    error: type[errors.AegisError]
    streamed: object = None
    whole: object = None
    retryable: bool = True
    bounds_s: tuple[str, ...] = ()
    address: str | None = None

    def script(self, body):
        steps = self.whole if self.streamed is None or not body.get("stream") else self.streamed
        return steps(body) if callable(steps) else list(steps)


def refused(row, status, error, retryable, message="no", headers=""):
    return Fault(
        row, error, whole=plain({"error": message}, status=f"{status} X", headers=headers), retryable=retryable
    )


def broken(row, *lines, whole, error=errors.AegisStreamError, **more):
    """Return a fault in the middle of a stream; `whole` is the body of an answer that is not streamed."""
    return Fault(row, error, list(chunked(line("par"), *lines)), plain(whole), **more)


def dripping(_):
    """A piece every few milliseconds, each of them in time."""
    yield HEAD
    drop = line("drop")
    for _ in range(500):
        yield b"%x\r\n%s\r\n" % (len(drop), drop)
        yield 0.02


def dripping_whole(_):
    """One object, of which each byte comes in time."""
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    for _ in range(500):
        yield b" "
        yield 0.02


ONE = b'{"message":{"content":"par"},"done":false}'
CUT = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n" + ONE
STREAM, SERVER, REQUEST = errors.AegisStreamError, errors.AegisServerError, errors.AegisRequestError
TIMEOUT, OVERLOADED, CONNECTION = errors.AegisTimeoutError, errors.AegisOverloadedError, errors.AegisConnectionError
READ, WHOLE, CONNECT = ("AEGIS_READ_TIMEOUT_S", "AEGIS_DEADLINE_S"), ("AEGIS_DEADLINE_S",), ("AEGIS_CONNECT_TIMEOUT_S",)

FAULTS = {
    "nobody listens": Fault(63, CONNECTION, address="http://127.0.0.1:1"),
    "nobody knows the name": Fault(63, CONNECTION, address="http://nowhere.invalid:1"),
    "nobody accepts": Fault(63, CONNECTION, bounds_s=CONNECT, address="full"),
    "closed before an answer": Fault(63, CONNECTION, whole=["close"]),
    "busy": refused(64, 503, OVERLOADED, True, BUSY, "Retry-After: 60\r\n"),
    "500": refused(65, 500, SERVER, True, "runner " * 5000),
    "502": refused(65, 502, SERVER, True),
    "504": refused(65, 504, SERVER, True),
    "no such model": refused(66, 404, errors.AegisModelNotFoundError, False, "model 'm' not found"),
    "400": refused(67, 400, REQUEST, False),
    "401": refused(67, 401, REQUEST, False),
    "403": refused(67, 403, REQUEST, False),
    "413": refused(67, 413, REQUEST, False),
    "429": refused(67, 429, OVERLOADED, True, "slow down", "Retry-After: 60\r\n"),
    "an error at once": Fault(68, STREAM, list(chunked(b'{"error":"gone"}\n')), plain({"error": "gone"})),
    "an error in the middle": broken(68, b'{"error":"unexpected EOF"}\n', whole={"error": "unexpected EOF"}),
    "cut": Fault(69, STREAM, [*chunked(line("par"), end=False), "close"], [CUT, "close"]),
    "an end without done": broken(70, whole=json.loads(ONE)),
    "done is false at the end": broken(70, line("", done=False), whole=ONE + b"\n"),
    "done is a text": broken(70, b'{"message":{"content":""},"done":"true"}\n', whole=b'{"message":{},"done":1}'),
    "reset": Fault(71, STREAM, [*chunked(line("par"), end=False), "reset"], [CUT, "reset"]),
    "stalls": Fault(72, TIMEOUT, [*chunked(line("par"), end=False), "hang"], [CUT, "hang"], bounds_s=READ),
    "stalls before its head": Fault(72, TIMEOUT, whole=["hang"], bounds_s=READ),
    "stalls in its head": Fault(72, TIMEOUT, whole=[b"HTTP/1.1 200 OK\r\nConte", "hang"], bounds_s=READ),
    "drips": Fault(73, TIMEOUT, dripping, dripping_whole, bounds_s=WHOLE),
    "no json": broken(74, b"{nonsense\n", whole=b"{nonsense"),
    "an array": broken(74, b"[1]\n", whole=b"[1]"),
    "a number": broken(74, b"42\n", whole=b"42"),
    "null": broken(74, b"null\n", whole=b"null"),
    "no message": broken(74, b'{"done":false}\n', END, whole=b'{"done":false}'),
    "a message that is a text": broken(74, b'{"message":"a","done":true}\n', whole=b'{"message":"a","done":true}'),
    "invalid utf-8": broken(77, b'{"message":{"content":"\xff\xfe"},"done":true}\n',
                            whole=b'{"message":{"content":"\xff\xfe"},"done":true}'),
    "half of a pair": broken(77, b'{"message":{"content":"\\ud800"},"done":true}\n',
                             whole=b'{"message":{"content":"\\ud800"},"done":true}'),
    "gzip": Fault(79, SERVER, whole=plain(gzip.compress(END), headers="Content-Encoding: gzip\r\n"), retryable=False),
    "bad gzip": Fault(79, SERVER, whole=plain(b"\x1f\x8b1", headers="Content-Encoding: gzip\r\n"), retryable=False),
    "gzip that does not say so": Fault(79, STREAM, whole=plain(gzip.compress(END))),
    "a login page": Fault(80, STREAM, whole=plain(b"<html>Please log in</html>", type_="text/html")),
    "a whole array": Fault(80, STREAM, whole=plain(b"[]")),
    "nothing": Fault(80, STREAM, whole=plain(b"")),
    "shorter than it says": Fault(80, STREAM, whole=[CUT, "close"]),
    "longer than it says": Fault(80, STREAM, whole=[CUT.replace(b"500", b"20"), "close"]),
    "a length that is none": Fault(80, CONNECTION, whole=[CUT.replace(b"500", b"-5"), "close"]),
    "elsewhere": Fault(81, REQUEST, whole=plain(b"", status="302 Found", headers="Location: http://elsewhere/\r\n"),
                       retryable=False),
}  # fmt: skip


@pytest.fixture
def lying():
    server = LyingServer(tags_aside=True)
    yield server
    server.close()


@pytest.fixture
def healthy():
    server = LyingServer(tags_aside=True)
    server.script = answer()
    yield server
    server.close()


@pytest.fixture
def full_address():
    """Of a socket that takes no connection any more."""
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        more = []
        for _ in range(4):
            more.append(socket.socket())
            more[-1].setblocking(False)
            more[-1].connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for each in more:
            each.close()


def call(model, way, asked="Where?"):
    """Return the answer's text, whichever way it is asked for."""
    if way == "invoke":
        return model.invoke(asked).text
    if way == "stream":
        return "".join(chunk.text for chunk in model.stream(asked))

    async def run():
        if way == "ainvoke":
            return (await model.ainvoke(asked)).text
        return "".join([chunk.text async for chunk in model.astream(asked)])

    return asyncio.run(run())


class Told(InMemoryCache):
    """LangChain's own cache, which keeps whatever it is told."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def update(self, prompt, llm_string, return_val):
        self.kept.append(return_val)
        super().update(prompt, llm_string, return_val)


@pytest.fixture
def beside(new_cache):
    """The caches that see all calls of a test: LangChain's own and ours."""
    return {"langchain's": Told(), "ours": new_cache(op_budget_s=5)}


def cached(cache, address, way, **told):
    """Return a model with a cache; LangChain itself asks one for whole answers only, the wrapper for streams too."""
    if isinstance(cache, Told) and "invoke" in way:
        return ChatAegis("m", base_url=address, temperature=0, cache=cache, **told)
    return BatchingChatModel(ChatAegis("m", base_url=address, temperature=0, cache=cache, **told), cache=cache)


def error_of(model, way, expected):
    """Return the error of a call, and how long it took, in seconds."""
    began = time.monotonic()
    with pytest.raises(errors.AegisError) as caught:
        call(model, way)
    assert type(caught.value) is expected, repr(caught.value)
    return caught.value, time.monotonic() - began


def assert_nothing_is_kept(cache, healthy, way, stored):
    """The question is answered by a server, and what it said is then kept: the cache was asked and told each time."""
    stored()
    assert not getattr(cache, "kept", ())
    model, before = cached(cache, healthy.url, way), len(healthy.requests)
    assert call(model, way) == "Paris."
    assert len(healthy.requests) == before + 1
    stored()
    assert call(model, way) == "Paris."
    assert len(healthy.requests) == before + 1


@pytest.mark.row(63, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 77, 79, 80, 81)
@each_way(FAULTS)
def test_every_fault_is_its_error_in_time_and_nothing_of_it_is_kept(
    lying, healthy, full_address, beside, stored, monkeypatch, name, way
):
    """`retryable` is right, what had come is at hand, nothing is sent twice, and the next call asks a server."""
    fault = FAULTS[name]
    for bound in fault.bounds_s:
        monkeypatch.setenv(bound, str(TIME_S))
    lying.script = fault.script
    address = {"full": full_address, None: lying.url}.get(fault.address, fault.address)
    caches = beside.items()
    if fault.bounds_s:  # each costs its time
        caches = (
            [("ours", beside["ours"])] if way in ("ainvoke", "stream") else [("langchain's", beside["langchain's"])]
        )
    for _, cache in caches:
        model = cached(cache, address, way)
        before = len(lying.requests)
        error, took_s = error_of(model, way, fault.error)
        if fault.bounds_s and took_s > TIME_S + 0.05:  # once more: the machine may have been busy
            within(TIME_S + LATE_S, lambda: error_of(model, way, fault.error)[1])  # noqa: B023
        else:
            assert took_s < 5
            assert len(lying.requests) - before == (0 if fault.address else 1)
        assert error.retryable is error.is_retryable is fault.retryable
        assert len(str(error)) < 900
        if isinstance(error, errors.AegisOverloadedError):
            assert error.retry_after_s == 60
        if type(error) is errors.AegisStreamError and fault.streamed is not None and "stream" in way:
            assert error.partial == ("" if name == "an error at once" else "par")
        assert_nothing_is_kept(cache, healthy, way, stored)


@pytest.mark.row(66, 67, 81)
@each_way(["no such model", "400", "401", "403", "413", "elsewhere", "500", "an error in the middle"])
def test_what_would_not_help_is_not_sent_again(lying, name, way):
    """However many retries were asked for: only what was not begun, because nobody could begin it."""
    lying.script = FAULTS[name].script
    error_of(ChatAegis("m", base_url=lying.url, max_retries=3), way, FAULTS[name].error)
    assert len(lying.requests) == 1


@pytest.mark.row(64, 67)
@WAYS
@pytest.mark.parametrize("status", [429, 503])
def test_retries_keep_to_what_the_server_says_and_to_the_deadline(lying, status, way):
    """It is asked again when it said, and not at all if that is too late for the caller."""
    answers = [plain({"error": BUSY}, status=f"{status} X", headers="Retry-After: 0\r\n")] * 2
    lying.script = lambda body: answers.pop() if answers else answer()(body)
    assert call(ChatAegis("m", base_url=lying.url, max_retries=2), way) == "Paris."
    assert len(lying.requests) == 3
    lying.script = plain({"error": BUSY}, status=f"{status} X", headers="Retry-After: 20\r\n")
    error, took_s = error_of(ChatAegis("m", base_url=lying.url, max_retries=2, timeout=10), way, OVERLOADED)
    assert (error.retry_after_s, len(lying.requests)) == (20, 4)
    assert took_s < 5


@pytest.mark.row(81)
@WAYS
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_prompt_and_its_credentials_go_to_nobody_else(lying, healthy, way, status):
    """The other server is there, and never hears of it."""
    lying.script = plain(b"", status=f"{status} X", headers=f"Location: {healthy.url}/api/chat\r\n")
    model = ChatAegis("m", base_url=lying.url.replace("http://", "http://user:secret@"), api_key="key")
    error, _ = error_of(model, way, errors.AegisRequestError)
    assert "secret" not in str(error)
    assert healthy.connections == 0


# -- strange, and an answer nevertheless --

ODD = "a\u0085b\u2028c\u2029d\re\x0bf\x0cg\x1ch \U0001f44d\U0001f3fd\u200d e\u0301"
ODD_LINES = [json.dumps({"message": {"content": each}, "done": False}, ensure_ascii=False).encode() for each in ODD]


def pieces(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


SPOKEN = {
    "one line each": [each + b"\n" for each in ODD_LINES],
    "CRLF and blank lines": [each + b"\r\n\r\n \n" for each in ODD_LINES],
    "byte by byte": pieces(b"".join(each + b"\n" for each in ODD_LINES), 1),
    "three bytes each": pieces(b"".join(each + b"\n" for each in ODD_LINES), 3),
    "all at once, after a BOM": [b"\xef\xbb\xbf" + b"\n".join(ODD_LINES) + b"\n"],
    "escaped": [json.dumps({"message": {"content": ODD}, "done": False}).encode() + b"\n"],
}


@pytest.mark.row(76)
@each_way(SPOKEN)
def test_text_comes_exactly_as_it_was_sent_and_once_more_from_the_cache(lying, beside, stored, name, way):
    """Characters that end lines elsewhere, split ones, and what stands around lines."""
    whole = json.dumps(json.loads(END) | {"message": {"content": ODD}}, ensure_ascii=False).encode()
    around = b"\xef\xbb\xbf%s\r\n\r\n" if "BOM" in name or "CRLF" in name else b"%s"
    lying.script = lambda body: (
        list(chunked(*SPOKEN[name], END)) if body["stream"] else list(chunked(*pieces(around % whole, 7)))
    )
    for cache in beside.values():
        lying.requests.clear()
        model = cached(cache, lying.url, way)
        for _ in range(2):
            assert call(model, way) == ODD
            stored()
        assert len(lying.requests) == 1


@pytest.mark.row(75)
@pytest.mark.parametrize("way", ["stream", "astream"])
@pytest.mark.parametrize(
    "more",
    [
        [END],
        [END, END],
        [line("two"), END],
        [line("two", done=True)],
        [b"rubbish\n"],
        [b'{"error":"late"}\n'],
        [b"\xff"],
    ],
    ids=["done twice", "three times", "more text", "done with other text", "rubbish", "an error", "no text"],
)
def test_what_comes_after_the_end_is_no_part_of_the_answer(lying, beside, stored, caplog, more, way):
    """The first `done: true` wins, once it is said, and what is kept is what was answered."""
    lying.script = list(chunked(line("one"), END, *more))
    for cache in beside.values():
        lying.requests.clear()
        model = cached(cache, lying.url, way)
        for _ in range(2):
            assert call(model, way) == "one"
            stored()
        assert len(lying.requests) == 1
    assert sum("data_after_done" in record.message for record in caplog.records) == 1


@pytest.mark.row(75)
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
def test_two_objects_where_one_was_asked_for_are_no_answer(lying, healthy, beside, stored, way):
    """Nobody knows which of them is meant."""
    lying.script = plain(END + line("two", done=True))
    for cache in beside.values():
        error_of(cached(cache, lying.url, way), way, STREAM)
        assert_nothing_is_kept(cache, healthy, way, stored)


ENDS = {
    "length": ({"content": "cut of"}, "length"),
    "load": ({"content": ""}, "load"),
    "empty": ({"content": ""}, "stop"),
    "only thought": ({"content": "", "thinking": "hm"}, "stop"),
    "no content": ({}, "stop"),
    "no reason": ({"content": "unended"}, None),
}


@pytest.mark.row(82)
@each_way(ENDS)
def test_an_answer_that_is_none_comes_with_its_reason_and_is_not_kept(lying, new_cache, stored, name, way):
    """Nobody is served half an answer another time."""
    message, reason = ENDS[name]
    end = {"model": "m", "done": True, "message": message, **({"done_reason": reason} if reason else {})}
    lying.script = lambda body: list(chunked(json.dumps(end).encode() + b"\n")) if body["stream"] else plain(end)
    cache = new_cache(op_budget_s=5)
    model = cached(cache, lying.url, way, reasoning=True)
    for asked in range(1, 3):
        assert call(model, way) == message.get("content", "")
        stored()
        assert len(lying.requests) == asked
    if way in ("invoke", "stream"):
        answered = model.invoke("Where?")
        assert answered.response_metadata.get("done_reason") == reason
        assert answered.additional_kwargs.get("reasoning_content") == message.get("thinking")


# -- sizes --


def endless(piece):
    """Return a script of up to 200 MB."""

    def steps(_):
        yield HEAD
        for _ in range(200_000_000 // len(piece)):
            yield b"%x\r\n%s\r\n" % (len(piece), piece)

    return steps


def bomb(_):
    """200 MB that are 200 kB on the wire."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    first, block = (packer.compress(bytes(1_000_000)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    packed = first + block * 199 + packer.flush()
    return [b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed), packed]


LINE, TOTAL = ndjson.MAX_LINE_BYTES, ndjson.MAX_TOTAL_BYTES
TOO_LONG = b"HTTP/1.1 500 X\r\nContent-Length: 200000000\r\n\r\n" + b"x" * 1_000_000
# Name: script, cap in bytes and error of a streamed answer, and of one that is not: that is one line, which is read
# whole before it is looked at.
SIZES = {
    "an endless line": (endless(b"x" * 65_536), LINE, STREAM, TOTAL, SERVER),
    "an endless text": (endless(b'{"message":{"content":"' + b"x" * 65_536), LINE, STREAM, TOTAL, SERVER),
    "endless blanks": (endless(b"\n" * 65_536), TOTAL, STREAM, TOTAL, SERVER),
    "an endless head": (
        [b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 1_000_000, "close"], LINE, CONNECTION, LINE, CONNECTION),
    "an endless refusal": ([TOO_LONG, "hang"], LINE, SERVER, LINE, SERVER),
    "a bomb": (bomb, LINE, SERVER, LINE, SERVER),
}  # fmt: skip
LONG = {
    ("an endless line", "ainvoke"), ("an endless line", "astream"), ("an endless text", "invoke"),
    ("an endless text", "ainvoke"), ("an endless text", "astream"), ("endless blanks", "invoke"),
    ("endless blanks", "ainvoke"), ("endless blanks", "stream"), ("endless blanks", "astream"),
}  # fmt: skip


@pytest.mark.row(78, 79)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.slow] if (name, way) in LONG else [])
        for name in SIZES
        for way in ("invoke", "ainvoke", "stream", "astream")
    ],
)
def test_what_has_no_end_takes_no_more_memory_than_three_times_its_cap(lying, healthy, new_cache, stored, name, way):
    """Counted in Python's own memory, that of the error and of the server included."""
    lying.script, *streamed_and_whole = SIZES[name]
    cap, expected = streamed_and_whole[2:] if "invoke" in way else streamed_and_whole[:2]
    cache = new_cache(op_budget_s=5)
    model = cached(cache, lying.url, way)
    tracemalloc.start(1)
    try:
        error, took_s = error_of(model, way, expected)
        assert tracemalloc.get_traced_memory()[1] <= 3 * cap
    finally:
        tracemalloc.stop()
    assert took_s < 30
    assert error.retryable is (expected is not SERVER or name == "an endless refusal")
    assert_nothing_is_kept(cache, healthy, way, stored)


@pytest.mark.slow
@pytest.mark.row(78)
@pytest.mark.parametrize("way", ["stream", "astream"])
def test_tokens_without_end_take_no_more_memory_than_three_times_their_cap(lying, healthy, new_cache, stored, way):
    """Of our client: LangChain's own `stream` keeps all chunks, and merges them for the trace of an error."""
    lying.script = endless(line("x" * 30_000) * 2)
    client, body = OllamaClient(lying.url), {"model": "m", "messages": []}

    async def read():
        async for _ in client.achat_stream(body):
            pass

    tracemalloc.start(1)
    try:
        with pytest.raises(errors.AegisStreamError, match="longer than") as caught:
            asyncio.run(read()) if way == "astream" else [None for _ in client.chat_stream(body) if False]
        assert tracemalloc.get_traced_memory()[1] <= 3 * TOTAL
    finally:
        tracemalloc.stop()
        client.close()
    assert TOTAL * 0.9 < len(caught.value.partial) <= TOTAL
    cache = new_cache(op_budget_s=5)
    error_of(cached(cache, lying.url, way), way, STREAM)
    assert_nothing_is_kept(cache, healthy, way, stored)


# -- embeddings --


@pytest.fixture
def lengths(lying):
    """Answers each text with a vector of its length."""
    lying.script = lambda body: plain({"embeddings": [[float(len(text)), 1.0] for text in body["input"]]})
    return AegisEmbeddings(model="m", base_url=lying.url)


def vectors(embeddings, way, texts):
    if way == "sync":
        return embeddings.embed_documents(texts)
    return asyncio.run(embeddings.aembed_documents(texts))


@pytest.mark.row(83)
@pytest.mark.parametrize("way", ["sync", "async"])
def test_ten_thousand_texts_keep_their_order_and_go_in_bounded_requests(lying, lengths, way):
    """An empty one among them is one like the others."""
    texts = ["", *("x" * (1 + i % 97) + str(i) for i in range(9_998)), ""]
    assert [vector[0] for vector in vectors(lengths, way, texts)] == [len(text) for text in texts]
    assert max(len(body["input"]) for body in lying.requests) <= 1000
    assert vectors(lengths, way, []) == []


@pytest.mark.row(83)
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(
    "told",
    [[[1.0, 2.0]], [[1.0, 2.0]] * 3, [[1.0, 2.0], [1.0]], [[1.0, 2.0], []], [[], []], [[1.0], ["1"]], [[1.0], [None]],
     [[1.0], [[1.0]]], {}, None, "vectors", [None, None]],
    ids=str,
)  # fmt: skip
def test_vectors_that_are_none_are_an_error_and_nobodys(lying, lengths, way, told):
    """Too few, too many, of different lengths, empty, or not of numbers: no text gets another's."""
    right, lying.script = lying.script, plain({"embeddings": told})
    with pytest.raises(errors.AegisServerError) as caught:
        vectors(lengths, way, ["one", "three"])
    assert caught.value.retryable
    lying.script = right
    assert vectors(lengths, way, ["one", "three"]) == [[3.0, 1.0], [5.0, 1.0]]


# To a server of vectors they are one fault: there are no vectors.
OF_ANSWERS = ("no message", "a message that is a text", "done is false at the end", "done is a text")


@pytest.mark.row(63, 64, 65, 66, 67, 68, 69, 71, 72, 73, 74, 77, 79, 80, 81, 83)
@each_way([name for name in FAULTS if name not in OF_ANSWERS], ("sync", "async"))
def test_every_fault_of_a_server_of_vectors_is_an_error_in_time_and_no_vector_is_kept(
    lying, full_address, monkeypatch, name, way
):
    """Each kind of fault is an error of ours that says whether to ask again; the next call asks a server."""
    fault = FAULTS[name]
    for bound in fault.bounds_s:
        monkeypatch.setenv(bound, str(TIME_S))
    lying.script = fault.script
    address = {"full": full_address, None: lying.url}.get(fault.address, fault.address)
    cache = AegisEmbeddingCache(version="1")  # it asks for no digest
    model = AegisEmbeddings(model="m", base_url=address, cache=cache)
    # The next request may go over a connection that the server is just closing.
    kinds = {fault.error, SERVER} | ({CONNECTION} if name == "longer than it says" else set())
    for texts in (["one"], ["one", "two"]):

        def fails(model=model, texts=texts):
            began = time.monotonic()
            with pytest.raises(errors.AegisError) as caught:
                vectors(model, way, texts)
            assert type(caught.value) in kinds, repr(caught.value)
            assert len(str(caught.value)) < 900
            return time.monotonic() - began

        within(TIME_S + LATE_S if fault.bounds_s else 5, fails)
    assert cache.stats().entries == 0
    for bound in fault.bounds_s:
        monkeypatch.delenv(bound)
    lying.script = lambda body: plain({"embeddings": [[float(len(text)), 1.0] for text in body["input"]]})
    right = AegisEmbeddings(model="m", base_url=lying.url, cache=cache)
    assert vectors(right, way, ["one", "three"]) == [[3.0, 1.0], [5.0, 1.0]]
    assert cache.stats().entries == 2


# -- the environment, cancelling, and a server that dies --


@pytest.mark.row(84)
@each_way(["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_what_goes_to_this_machine_goes_through_no_proxy(lying, healthy, monkeypatch, name, way):
    """Whatever the environment says; another host's address does, as with everything over httpx."""
    monkeypatch.setenv(name, lying.url)
    lying.script = answer("from the proxy")
    assert call(ChatAegis("m", base_url=healthy.url), way) == "Paris."
    assert lying.connections == 0
    address = f"http://x{uuid.uuid4().hex[:8]}.invalid:11434"  # what a client's proxy is, is looked up once
    assert call(ChatAegis("m", base_url=address), way) == "from the proxy"
    assert lying.heads[0].startswith(f"POST {address}/api/chat".encode())


@pytest.mark.row(85)
@pytest.mark.parametrize("when", ["before the head", "after a token"])
@pytest.mark.parametrize("way", ["ainvoke", "astream"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
async def test_who_is_cancelled_costs_the_server_nothing_more(lying, healthy, new_cache, stored, when, way, wrapped):
    """The connection is closed within 100 ms, no slot is lost, and nothing is kept."""
    lying.script = [*chunked(line("par"), end=False), "hang"] if when == "after a token" else ["hang"]
    cache = new_cache(op_budget_s=5)
    model = ChatAegis("m", base_url=lying.url, temperature=0, cache=cache)
    if wrapped:
        model = BatchingChatModel(model, cache=cache, max_concurrency=1)

    async def ask():
        if way == "ainvoke":
            return await model.ainvoke("Where?")
        return [chunk async for chunk in model.astream("Where?")]

    task = asyncio.create_task(ask())
    assert await asyncio.to_thread(lying.asked.wait, 10)
    task.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(lying.left.wait, 5)
    assert time.monotonic() - began < 0.1 * max(SLACK, 5)  # two threads have to be woken on a machine that may be busy
    await asyncio.to_thread(assert_nothing_is_kept, cache, healthy, way, stored)
    lying.script = answer("again")
    assert (await model.ainvoke("Where to?")).text == "again"


SERVE = """
import sys, time
from langchain_aegis.testing import ScriptedOllama
with ScriptedOllama(["m", "m-embed"], words=400, tokens_per_s=float(sys.argv[2])) as server:
    if sys.argv[1] != "0":
        server.close()
        server._port = int(sys.argv[1])
        server.start()
    print(server.base_url, flush=True)
    time.sleep(60)
"""


def served(port="0", tokens_per_s=200):
    """Start a server as a process of its own; returns it and its address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, port, str(tokens_per_s)], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    return process, process.stdout.readline().strip()


@pytest.mark.slow
@pytest.mark.row(87)
@pytest.mark.parametrize("way", ["stream", "astream"])
def test_a_server_that_is_killed_is_an_error_and_its_successor_answers(new_cache, stored, way):
    """kill -9 in the middle of an answer: the text that had come is at hand and nothing else."""
    process, address = served()
    cache = new_cache(op_budget_s=5)
    model = BatchingChatModel(ChatAegis("m", base_url=address, temperature=0, cache=cache), cache=cache)
    seen = []

    def kill(chunk):
        seen.append(chunk.text)
        if len(seen) == 3:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(10)

    async def run():
        async for chunk in model.astream("Where?"):
            kill(chunk)

    try:
        with pytest.raises(errors.AegisStreamError) as caught:
            if way == "astream":
                asyncio.run(run())
            else:
                for chunk in model.stream("Where?"):
                    kill(chunk)
        assert caught.value.retryable
        assert "".join(seen) and caught.value.partial.startswith("".join(seen[:3]))
        with pytest.raises(errors.AegisConnectionError):
            call(model, way)
        process.stdout.close()
        process, again = served(address.rpartition(":")[2], 0)
        assert again == address
        stored()
        whole = call(model, way)
        assert whole.startswith(caught.value.partial)
        assert len(whole) > len(caught.value.partial)
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.row(87)
@pytest.mark.parametrize("way", ["invoke", "ainvoke", "sync", "async"])
def test_who_waits_for_a_server_that_is_killed_is_told_and_its_successor_answers(new_cache, stored, way):
    """Eight who wait for a whole answer, or for vectors, each of something else; nothing is kept of it."""
    process, address = served(tokens_per_s=5)
    cache = new_cache(op_budget_s=5)
    if way in ("invoke", "ainvoke"):
        model = BatchingChatModel(ChatAegis("m", base_url=address, temperature=0, cache=cache), cache=cache)
        ask = functools.partial(call, model, way)
    else:
        model = AegisEmbeddings(model="m-embed", base_url=address)
        ask = functools.partial(vectors, model, way)
    with ThreadPoolExecutor(8) as pool:
        if way in ("invoke", "ainvoke"):
            waiting = [pool.submit(ask, f"Where is {i}?") for i in range(8)]
            wait_until(lambda: model.admission.stats().running == 4, what="calls under way")
            time.sleep(0.2)  # each has been sent
        else:
            os.kill(process.pid, signal.SIGSTOP)  # it answers at once
            waiting = [pool.submit(ask, [f"Where is {i}?"]) for i in range(8)]
            wait_until(lambda: sum(w.running() for w in waiting) == 8)
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        for each in waiting:
            error = each.exception(20)
            assert isinstance(error, errors.AegisError) and error.retryable, repr(error)
            assert isinstance(error, (CONNECTION, STREAM))
    process.stdout.close()
    process, again = served(address.rpartition(":")[2], 0)
    try:
        assert again == address
        stored()
        if way in ("invoke", "ainvoke"):
            assert all(len(ask(f"Where is {i}?")) > 100 for i in range(8))
        else:
            assert len(ask(["Where is it?"])[0]) > 1
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
