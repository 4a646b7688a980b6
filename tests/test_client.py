"""Whatever a server does, a call ends with a whole answer or with one of this package's errors."""

import asyncio
import copy
import itertools
import os
import pickle
import socket
import threading
import time
from functools import partial

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lying_server import END, LyingServer, chunked, line, plain

from langchain_aegis import client as client_module
from langchain_aegis.client import OllamaClient, Timeouts, shared_client
from langchain_aegis.errors import (
    AegisConfigError,
    AegisConnectionError,
    AegisContextOverflowError,
    AegisError,
    AegisModelNotFoundError,
    AegisOverloadedError,
    AegisRequestError,
    AegisServerError,
    AegisStreamError,
    AegisTimeoutError,
)
from langchain_aegis.ndjson import ChatParts

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BRIEF = Timeouts(connect_s=2, read_s=0.4, deadline_s=5)
WAYS = pytest.mark.parametrize("way", ["sync", "async"])


@pytest.fixture
def server():
    lying = LyingServer()
    yield lying
    lying.close()


@pytest.fixture
def ollama(server):
    client = OllamaClient(server.url, timeouts=BRIEF)
    yield client
    client.close()


def stream(client, way, body=BODY, **options):
    """Return all parts of a streamed answer."""
    if way == "sync":
        return list(client.chat_stream(body, **options))

    async def run():
        return [part async for part in client.achat_stream(body, **options)]

    return asyncio.run(run())


def ask(client, way, body=BODY, **options):
    """Return an answer that is not streamed."""
    return client.chat(body, **options) if way == "sync" else asyncio.run(client.achat(body, **options))


def text(parts):
    return "".join(part["message"].get("content", "") for part in parts)


# -- what a healthy server sends --


@WAYS
def test_a_stream_is_read_part_by_part(server, ollama, way):
    """Each line is a part; the last has the counts."""
    server.script = list(chunked(line("The"), line(" capital"), END))
    parts = stream(ollama, way)
    assert text(parts) == "The capital"
    assert parts[-1]["eval_count"] == 8
    assert server.requests == [{**BODY, "stream": True}]
    assert b"accept-encoding: identity\r\n" in server.heads[0].lower()


@WAYS
def test_a_whole_answer_is_one_object(server, ollama, way):
    """`stream: false` gives everything at once."""
    server.script = plain(orjson.loads(END) | {"message": {"role": "assistant", "content": "Paris."}})
    assert ask(ollama, way)["message"]["content"] == "Paris."
    assert server.requests == [{**BODY, "stream": False}]


@WAYS
def test_connections_are_used_again(server, ollama, way):
    """Three calls of one loop or thread need one connection, streamed or not."""
    server.script = lambda body: list(chunked(line("a"), END)) if body["stream"] else plain(orjson.loads(END))
    if way == "sync":
        stream(ollama, way), ask(ollama, way), stream(ollama, way)
    else:

        async def three():
            for _ in range(2):
                assert [part async for part in ollama.achat_stream(BODY)]
                await ollama.achat(BODY)

        asyncio.run(three())
    assert server.connections == 1


@pytest.mark.row(76)
@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 7) | st.none())
def test_text_arrives_exactly_however_it_is_cut(texts, size):
    """Line separators of Unicode, carriage returns and split characters change nothing, nor does a piece per line."""
    data = (
        b"\xef\xbb\xbf"
        + b"\n\r\n".join(orjson.dumps({"message": {"content": each}, "done": False}) for each in texts)
        + b"\r\n"
        + END
    )
    pieces = data.splitlines(keepends=True) if size is None else None
    parts, found = ChatParts(), []
    for piece in pieces or (data[start : start + size] for start in range(0, len(data), size)):
        found += parts.feed(piece)
    assert text(found + parts.finish()) == "".join(texts)


@pytest.mark.row(76)
def test_unicode_line_separators_stay_inside_a_text():
    """U+0085 and U+2028 end no line."""
    odd = "a\u0085b\u2028c\u2029d\x0be 🙂"
    parts = ChatParts()
    assert text(
        parts.feed('{{"message":{{"content":"{}"}},"done":true}}\n'.format(odd.replace("\x0b", "")).encode())
    ) == (odd.replace("\x0b", ""))


# -- what a broken one sends --

BROKEN = {
    "no done": [line("par"), line("tial")],
    "error line": [line("par"), b'{"error":"an error was encountered while running the model: unexpected EOF"}\n'],
    "not json": [line("par"), b"{nonsense\n"],
    "an array": [line("par"), b"[1]\n"],
    "a number": [line("par"), b"42\n"],
    "null": [line("par"), b"null\n"],
    "no message": [line("par"), b'{"done":false}\n'],
    "content is no text": [line("par"), b'{"message":{"content":3},"done":false}\n'],
    "done is a text": [line("par"), b'{"message":{"content":""},"done":"true"}\n'],
    "invalid utf-8": [line("par"), b'{"message":{"content":"\xff\xfe"},"done":false}\n', END],
    "lone surrogate": [line("par"), b'{"message":{"content":"\\ud800"},"done":false}\n', END],
}


@pytest.mark.row(68, 70, 74, 77)
@WAYS
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_stream_is_an_error_with_what_had_come(server, ollama, case, way):
    """The partial text is at hand, and nobody takes it for an answer."""
    server.script = list(chunked(*BROKEN[case]))
    with pytest.raises(AegisStreamError) as caught:
        stream(ollama, way)
    assert caught.value.partial.startswith("par")
    assert caught.value.retryable


@pytest.mark.row(69, 71, 72)
@WAYS
@pytest.mark.parametrize("end", ["close", "reset", "hang"])
def test_a_cut_or_stalled_stream_is_an_error(server, ollama, end, way):
    """However the connection dies, the caller is told."""
    server.script = [*chunked(line("par"), end=False), end]
    with pytest.raises(AegisTimeoutError if end == "hang" else AegisStreamError):
        stream(ollama, way)


@WAYS
@pytest.mark.parametrize("end", ["close", "reset", "hang"])
def test_a_connection_that_ends_badly_after_the_answer_costs_nothing(server, ollama, end, way):
    """With `done: true` the answer is whole."""
    server.script = [*chunked(line("all"), END, end=False), end]
    assert text(stream(ollama, way)) == "all"


@pytest.mark.row(80)
@WAYS
@pytest.mark.parametrize(
    "answer",
    [
        plain(b"<html>Please log in</html>", type_="text/html"),
        plain(b""),
        plain(b"[]"),
        plain({"error": "the runner died"}),
        plain({"model": "m", "message": {"role": "assistant", "content": "cut"}, "done": False}),
        [b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", "close"],
    ],
    ids=["html", "empty", "array", "error field", "not done", "shorter than its length"],
)
@pytest.mark.parametrize("kind", [stream, ask])
def test_an_answer_that_is_none_is_a_stream_error(server, ollama, answer, kind, way):
    """A proxy's login page is no answer."""
    server.script = answer
    with pytest.raises(AegisStreamError):
        kind(ollama, way)


@pytest.mark.row(75)
@WAYS
def test_what_comes_after_the_end_is_ignored(server, ollama, way):
    """The first `done: true` wins."""
    server.script = list(chunked(line("one"), END, line("two"), line("three", done=True)))
    assert text(stream(ollama, way)) == "one"


@pytest.mark.row(78)
def test_sizes_are_bounded():
    """Neither one line nor all together may grow without limit."""
    with pytest.raises(AegisStreamError, match="line"):
        ChatParts(max_line_bytes=100).feed(b"x" * 101)
    endless = ChatParts(max_total_bytes=1000)
    with pytest.raises(AegisStreamError, match="longer than 1000"):
        for _ in range(1000):
            endless.feed(line("more"))


@pytest.mark.row(79)
@WAYS
@pytest.mark.parametrize("kind", [stream, ask])
def test_a_compressed_body_is_refused(server, ollama, kind, way):
    """It was not asked for, and may unpack to any size."""
    server.script = plain(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n")
    with pytest.raises(AegisServerError, match="gzip"):
        kind(ollama, way)


@pytest.mark.row(73)
@WAYS
def test_a_trickle_ends_at_the_deadline(server, ollama, way):
    """Each piece comes in time, the whole does not."""
    drops = [step for _ in range(100) for step in (line("drop"), 0.05)]
    server.script = list(chunked(*drops))
    with pytest.raises(AegisTimeoutError, match=r"not complete after 0\.2 s"):
        stream(ollama, way, timeouts=Timeouts(read_s=2, deadline_s=0.2))


def dripping(head, drop):
    """Return a script: a head, then the same piece every 50 ms, or the head itself byte by byte."""

    def steps(_):
        if head is not None:
            yield head
        for piece in itertools.repeat(drop, 200) if head is not None else (bytes([byte]) for byte in drop):
            yield piece
            yield 0.05

    return steps


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
DROP = b"%x\r\n%s\r\n" % (len(line("drop")), line("drop"))


@pytest.mark.row(73)
@WAYS
@pytest.mark.parametrize("kind", [stream, ask])
@pytest.mark.parametrize(
    "script",
    [
        dripping(HEAD, b"%x\r\n%s\r\n" % (len(line("d")), line("d"))),
        dripping(HEAD, b"1\r\n{\r\n"),
        dripping(None, HEAD),
    ],
    ids=["lines", "bytes", "a head"],
)
def test_a_server_that_drips_is_left_at_the_deadline_and_not_a_read_later(server, ollama, script, kind, way):
    """The next piece would have come in time for the read, and too late for the call."""
    server.script = script
    began = time.monotonic()
    with pytest.raises(AegisTimeoutError, match=r"not complete after 0\.12 s"):
        kind(ollama, way, timeouts=Timeouts(read_s=60, deadline_s=0.12))
    assert time.monotonic() - began < 2


@WAYS
def test_who_has_the_whole_answer_does_not_wait_for_the_end_of_the_connection(server, ollama, way, monkeypatch):
    """A server that forgets to end it costs a moment, and not `read_s`."""
    monkeypatch.setattr(client_module, "_DRAIN_S", 0.05)
    server.script = [*chunked(line("all"), END, end=False), "hang"]
    began = time.monotonic()
    assert text(stream(ollama, way, timeouts=Timeouts(read_s=60, deadline_s=60))) == "all"
    assert time.monotonic() - began < 10


@pytest.mark.row(63)
@WAYS
@pytest.mark.parametrize("kind", [stream, ask])
def test_a_name_that_takes_long_to_be_found_is_not_waited_for(monkeypatch, kind, way):
    """The system's own timeout is none of the caller's."""
    found = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found.wait(10) and [])
    client = OllamaClient("http://far.invalid:11434", timeouts=Timeouts(connect_s=0.1))
    began = time.monotonic()
    try:
        with pytest.raises(AegisConnectionError, match=r"far\.invalid"):
            if way == "sync":
                kind(client, way)
            else:
                run_without_waiting_for_threads(kind, client)
        assert time.monotonic() - began < 5
    finally:
        found.set()


def run_without_waiting_for_threads(kind, client):
    """`asyncio.run` waits for the lookup's thread: only the call counts."""
    call = client.achat(BODY) if kind is ask else anext(client.achat_stream(BODY))

    async def run():
        try:
            await call
        except AegisError as exc:
            return exc

    loop = asyncio.new_event_loop()
    try:
        raise loop.run_until_complete(run())
    finally:
        loop.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "named.invalid"])
def test_each_address_of_a_host_is_tried(server, monkeypatch, host):
    """The first one of a name may lead nowhere."""
    if host == "named.invalid":
        told = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, server.port)) for ip in ("127.0.0.2", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", partial(answers_for, socket.getaddrinfo, host, told))
    server.script = plain({"version": "1"})
    client = OllamaClient(f"http://{host}:{server.port}", timeouts=Timeouts(connect_s=5))
    if host == "[::1]":
        with pytest.raises(AegisConnectionError, match="::1"):
            client.version()
    else:
        assert client.version() == "1"
    client.close()


def answers_for(otherwise, name, told, host, *rest, **more):
    return told if host == name else otherwise(host, *rest, **more)


@pytest.mark.row(72)
@WAYS
@pytest.mark.parametrize("kind", [stream, ask])
def test_a_server_that_never_answers_is_a_timeout(server, ollama, kind, way):
    """Nobody waits for ever."""
    server.script = ["hang"]
    with pytest.raises(AegisTimeoutError, match="timeout="):
        kind(ollama, way, timeouts=Timeouts(read_s=0.2, deadline_s=0.2))


# -- the table of refusals --

OVERFLOW = orjson.dumps(
    {"error": {"code": 400, "message": "the request exceeds the available context size", "n_ctx": 256,
               "type": "exceed_context_size_error", "n_prompt_tokens": 369}}
).decode()  # fmt: skip
BUSY = "server busy, please try again.  maximum pending requests exceeded"
REFUSALS = [
    (400, "missing request body", AegisRequestError),
    (400, "unexpected EOF", AegisRequestError),
    (400, "json: cannot unmarshal string into Go struct field", AegisRequestError),
    (400, "model is required", AegisRequestError),
    (400, "invalid model name", AegisRequestError),
    (404, "model 'm' not found", AegisModelNotFoundError),
    (404, 'model "m" not found, try pulling it first', AegisModelNotFoundError),
    (404, "model 'm:latest' not found", AegisModelNotFoundError),
    (500, 'option "num_ctx" must be of type integer', AegisRequestError),
    (500, 'invalid format: "yaml"', AegisRequestError),
    (400, 'time: invalid duration "abc"', AegisRequestError),
    (400, '"m" does not support thinking', AegisRequestError),
    (400, "registry.ollama.ai/library/m:latest does not support tools", AegisRequestError),
    (501, "This server does not support embeddings. Start it with `--embeddings`", AegisRequestError),
    (503, BUSY, AegisOverloadedError),
    (429, "slow down", AegisOverloadedError),
    (500, "an error was encountered while running the model: unexpected EOF", AegisServerError),
    (502, "bad gateway", AegisServerError),
    (504, "gateway timeout", AegisServerError),
    (400, "the prompt is longer than the context length currently available", AegisContextOverflowError),
    (400, "the input length exceeds the context length", AegisContextOverflowError),
    (400, OVERFLOW, AegisContextOverflowError),
    (401, "unauthorized", AegisRequestError),
    (403, "forbidden", AegisRequestError),
    (413, "too large", AegisRequestError),
    (404, "404 page not found", AegisRequestError),
]


@pytest.mark.row(64, 65, 66, 67)
@WAYS
@pytest.mark.parametrize("kind", [stream, ask])
@pytest.mark.parametrize(("status", "message", "error"), REFUSALS)
def test_every_refusal_has_its_error(server, ollama, status, message, error, kind, way):
    """Status and wording decide; the message of the server is kept."""
    server.script = plain({"error": message}, status=f"{status} X")
    with pytest.raises(AegisError) as caught:
        kind(ollama, way)
    assert type(caught.value) is error
    assert caught.value.status_code == status
    assert caught.value.retryable == (error in (AegisOverloadedError, AegisServerError))
    if error in (AegisRequestError, AegisServerError, AegisOverloadedError):
        assert message in str(caught.value)


def test_an_overflow_says_how_much_and_what_to_do(server, ollama):
    """The counts of the server are passed on."""
    server.script = plain({"error": OVERFLOW}, status="400 Bad Request")
    with pytest.raises(AegisContextOverflowError, match=r"369 tokens, the window holds 256.*num_ctx") as caught:
        ask(ollama, "sync")
    assert (caught.value.prompt_tokens, caught.value.window_tokens) == (369, 256)


@pytest.mark.row(66)
def test_a_missing_model_is_named_with_the_command(server, ollama):
    """What to type stands in the message."""
    server.script = plain({"error": "model 'm' not found"}, status="404 Not Found")
    with pytest.raises(AegisModelNotFoundError, match=r"'m'.*ollama pull m"):
        ask(ollama, "sync")


@pytest.mark.row(64, 67)
@pytest.mark.parametrize(
    ("header", "wait_s"), [("", 1.0), ("Retry-After: 7\r\n", 7.0), ("Retry-After: 0.5\r\n", 0.5),
                           ("Retry-After: soon\r\n", 1.0), ("Retry-After: Thu, 01 Jan 1970 00:00:00 GMT\r\n", 0.0)]
)  # fmt: skip
def test_an_overloaded_server_says_when_to_come_back(server, ollama, header, wait_s):
    """In seconds or as a date."""
    server.script = plain({"error": BUSY}, status="503 Service Unavailable", headers=header)
    with pytest.raises(AegisOverloadedError) as caught:
        ask(ollama, "sync")
    assert caught.value.retry_after_s == wait_s


@pytest.mark.row(65)
def test_a_long_error_page_is_quoted_in_part(server, ollama):
    """At most 500 characters of it."""
    server.script = plain(b"<html>" + b"x" * 100_000, status="500 X", type_="text/html")
    with pytest.raises(AegisServerError) as caught:
        ask(ollama, "sync")
    assert len(str(caught.value)) < 700


@pytest.mark.row(65)
@WAYS
@pytest.mark.parametrize("kind", [stream, ask])
def test_a_refusal_without_end_is_not_waited_for(server, ollama, kind, way):
    """What is quoted of it has come long before."""
    server.script = [b"HTTP/1.1 500 X\r\nContent-Length: 200000000\r\n\r\n" + b"x" * 200_000, "hang"]
    with pytest.raises(AegisServerError, match="xxx"):
        kind(ollama, way, timeouts=Timeouts(read_s=60, deadline_s=60))


@pytest.mark.row(78)
def test_empty_lines_cost_nothing_each():
    """A server that sends nothing else would keep an event loop busy for a minute."""
    parts, blank = ChatParts(), b"\r\n" * 500_000
    began = time.process_time()
    for _ in range(20):
        assert parts.feed(blank) == []
    assert time.process_time() - began < 2
    assert text(parts.feed(END) + parts.feed(blank) + parts.finish()) == ""
    assert text(ChatParts().feed(blank + line("a") + blank)) == "a"


@pytest.mark.row(81)
@WAYS
def test_a_redirect_is_not_followed(server, ollama, way):
    """A prompt goes to nobody else."""
    server.script = plain(b"", status="302 Found", headers="Location: http://u:secret@elsewhere/api/chat\r\n")
    with pytest.raises(AegisRequestError, match="elsewhere") as caught:
        stream(ollama, way)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.row(63)
@WAYS
@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid:11434"])
@pytest.mark.parametrize("kind", [stream, ask])
@pytest.mark.row(61)
def test_an_unreachable_server_is_named_without_its_password(host, kind, way):
    """The cause is kept, the password is not shown."""
    with pytest.raises(AegisConnectionError, match="ollama serve") as caught:
        kind(OllamaClient(f"http://user:secret@{host}", timeouts=Timeouts(connect_s=3)), way)
    assert host in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is not None


@WAYS
def test_a_server_that_leaves_without_an_answer_is_a_connection_error(server, ollama, way):
    """Nothing had begun."""
    server.script = ["close"]
    with pytest.raises(AegisConnectionError, match="before it answered"):
        stream(ollama, way)


@pytest.mark.row(116)
def test_what_json_cannot_say_is_a_request_error(server, ollama):
    """Nothing is sent."""
    with pytest.raises(AegisRequestError, match="JSON"):
        ask(ollama, "sync", {**BODY, "messages": [{"role": "user", "content": "\ud800"}]})
    assert server.requests == []


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_a_bad_address_is_a_config_error(url):
    """Said when the client is made."""
    with pytest.raises(AegisConfigError):
        OllamaClient(url)


# -- retries --


@pytest.mark.row(64)
@WAYS
def test_an_overloaded_server_is_asked_again(server, ollama, way):
    """As often as told, after the time that the server named."""
    answers = [plain({"error": BUSY}, status="503 X", headers="Retry-After: 0\r\n")] * 2
    server.script = lambda body: answers.pop() if answers else list(chunked(line("at last"), END))
    assert text(stream(ollama, way, retries=2)) == "at last"
    assert len(server.requests) == 3


@pytest.mark.row(67, 69)
@WAYS
def test_what_has_begun_or_is_refused_is_not_sent_again(server, ollama, way):
    """A second answer would follow the first half of another."""
    server.script = list(chunked(line("par")))
    with pytest.raises(AegisStreamError):
        stream(ollama, way, retries=3)
    server.script = plain({"error": "no"}, status="400 X")
    with pytest.raises(AegisRequestError):
        ask(ollama, way, retries=3)
    assert len(server.requests) == 2


# -- leaving early --


@pytest.mark.row(85)
def test_closing_a_stream_closes_the_connection(server, ollama):
    """So the server stops generating."""
    server.script = [*chunked(line("one"), end=False), "hang"]
    parts = ollama.chat_stream(BODY, timeouts=Timeouts())
    assert next(parts)["message"]["content"] == "one"
    parts.close()
    assert server.left.wait(5)


@pytest.mark.row(85)
@pytest.mark.parametrize("streamed", [True, False])
async def test_cancelling_a_call_closes_the_connection(server, ollama, streamed):
    """A caller that has left costs the server nothing more."""
    server.script = [*chunked(line("one"), end=False), "hang"] if streamed else ["hang"]
    started = asyncio.Event()

    async def call():
        if streamed:
            async for _ in ollama.achat_stream(BODY, timeouts=Timeouts()):
                started.set()
        else:
            started.set()
            await ollama.achat(BODY, timeouts=Timeouts())

    task = asyncio.create_task(call())
    await started.wait()
    assert await asyncio.to_thread(server.asked.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.left.wait, 5)


# -- who shares a client --


@pytest.mark.row(102)
def test_one_client_serves_many_event_loops_and_threads(server, ollama):
    """`asyncio.run` twice, with a thread between."""
    server.script = lambda body: list(chunked(line("a"), END))
    assert [text(stream(ollama, way)) for way in ("async", "sync", "async", "sync", "async")] == ["a"] * 5


def test_models_of_one_address_share_a_client():
    """So do copies; another address or header means another client."""
    one = shared_client("http://localhost:1/")
    assert one is shared_client("http://localhost:1/")
    assert one is copy.deepcopy(one)
    assert one is not shared_client("http://localhost:2/")
    assert one is not shared_client("http://localhost:1/", {"x": "y"})
    assert pickle.loads(pickle.dumps(one)).base_url == one.base_url  # noqa: S301 (our own bytes)


def test_the_number_of_kept_clients_is_bounded():
    """A program that talks to many addresses does not keep them all."""
    for port in range(100):
        shared_client(f"http://localhost:{port + 1}")
    assert len(client_module._shared) <= client_module._MAX_SHARED


def test_making_a_client_builds_no_tls_context():
    """Reading the CA bundle costs 40 ms; http:// does without."""
    client_module._trusted.cache_clear()
    plain_http, secure = OllamaClient("http://localhost:1"), OllamaClient("https://localhost:1")
    plain_http._sync()
    assert client_module._trusted.cache_info().misses == 0
    secure._sync()
    assert client_module._trusted.cache_info().misses == 1


@pytest.mark.row(84)
def test_loopback_never_goes_through_a_proxy(server, monkeypatch):
    """Whatever the environment says."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    server.script = plain({"version": "0.33.0"})
    client = OllamaClient(server.url)
    assert client.version() == "0.33.0"
    client.close()


def test_a_login_in_the_address_is_sent_as_authentication(server):
    """Percent signs are decoded."""
    server.script = plain({"version": "1"})
    client = OllamaClient(server.url.replace("http://", "http://user:p%40ss@"))
    assert client.version() == "1"
    assert b"basic dxnlcjpwqhnz" in server.heads[0].lower()
    assert "p%40ss" not in repr(client)
    client.close()


@pytest.mark.row(106)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_child_of_a_fork_opens_its_own_connection(server, ollama):
    """The parent's stays the parent's."""
    server.script = lambda body: list(chunked(line("a"), END))
    stream(ollama, "sync")
    assert server.connections == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if text(stream(ollama, "sync")) == "a" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert server.connections == 2
    assert text(stream(ollama, "sync")) == "a"
    assert server.connections == 2


@WAYS
def test_the_small_calls(server, ollama, way):
    """Version, tags, ps, show, embed."""

    def call(name, *args):
        method = getattr(ollama, name if way == "sync" else f"a{name}")
        return method(*args) if way == "sync" else asyncio.run(method(*args))

    server.script = plain({"version": "0.33.0", "models": [{"name": "m:latest"}], "embeddings": [[1.0]]})
    assert call("version") == "0.33.0"
    assert call("tags") == call("ps") == [{"name": "m:latest"}]
    assert call("show", "m")["version"] == "0.33.0"
    assert call("embed", {"model": "m", "input": ["x"]})["embeddings"] == [[1.0]]
    paths = [head.split(b" ")[:2] for head in server.heads]
    assert paths == [[b"GET", b"/api/version"], [b"GET", b"/api/tags"], [b"GET", b"/api/ps"],
                     [b"POST", b"/api/show"], [b"POST", b"/api/embed"]]  # fmt: skip
