"""A prompt that does not fit is refused with both numbers, cut with a mark, or trimmed; never in silence."""

import asyncio
import re

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from lying_server import LyingServer, plain

from langchain_aegis import AegisSemanticCache, BatchingChatModel, ChatAegis, was_cut
from langchain_aegis.errors import AegisContextOverflowError, AegisOptionError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.overflow import MOST_TRIMS, at_least_tokens
from langchain_aegis.reloads import reloads
from langchain_aegis.testing import ScriptedModel, ScriptedOllama

MODELS = [ScriptedModel(name="m"), ScriptedModel(name="tiny", context_length=256)]
FITS, TOO_LONG = "word " * 4_000, "word " * 15_000  # of the scripted server, a word is a token
WAYS = ["invoke", "ainvoke", "stream", "astream"]


@pytest.fixture(autouse=True)
def _every_warning_is_new():
    forget_warnings()


@pytest.fixture(scope="module")
def shared():
    with ScriptedOllama(MODELS) as server:
        yield server


@pytest.fixture
def server(shared):
    shared.heal()
    shared.forget()
    return shared


@pytest.fixture(scope="module")
def old():
    with ScriptedOllama(MODELS, knows_truncate=False) as server:
        yield server


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


@pytest.fixture
def cache():
    cache = InMemoryCache()
    set_llm_cache(cache)
    yield cache
    set_llm_cache(None)


def ask(model, way, prompt, **kwargs):
    """Return the answer as one message, however it was asked for."""

    async def astreamed():
        return [chunk async for chunk in model.astream(prompt, **kwargs)]

    if way == "invoke":
        return model.invoke(prompt, **kwargs)
    if way == "ainvoke":
        return asyncio.run(model.ainvoke(prompt, **kwargs))
    chunks = list(model.stream(prompt, **kwargs)) if way == "stream" else asyncio.run(astreamed())
    message = chunks[0]
    for chunk in chunks[1:]:
        message += chunk
    return message


@tool
def look_up(name: str) -> str:
    """Look a name up in the register."""
    return name


# -- refused --


def test_a_refusal_names_both_numbers_and_the_fix(server, way):
    """15,000 tokens do not fit into 4,096; 4,000 do."""
    model = ChatAegis("m", base_url=server.base_url, num_predict=5)
    assert ask(model, way, FITS).usage_metadata["input_tokens"] > 4_000
    assert was_cut(ask(model, way, FITS)) is None
    with pytest.raises(AegisContextOverflowError) as caught:
        ask(model, way, TOO_LONG)
    error = caught.value
    assert (error.prompt_tokens > 14_000, error.window_tokens, error.status_code) == (True, 4096, 400)
    for said in (str(error.prompt_tokens), "4096", "num_ctx", "OLLAMA_CONTEXT_LENGTH", "on_overflow"):
        assert said in str(error)
    assert server.counters.loads <= 1  # a refusal loads nothing anew


def test_tools_are_counted_by_the_server_too(server, way):
    """Also in a bound model, and when the answer is a call."""
    model = ChatAegis("m", base_url=server.base_url).bind_tools([look_up])
    with pytest.raises(AegisContextOverflowError, match="4096"):
        ask(model, way, TOO_LONG)
    assert ask(model, way, "Look up the name Ada.").tool_calls


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_small_real_model_refuses_alike(embedded, way):
    """llama.cpp counts the tokens."""
    model = ChatAegis("smollm2:135m", base_url=embedded.base_url, num_predict=2)
    with pytest.raises(AegisContextOverflowError) as caught:
        ask(model, way, "The desk lends books. " * 3_000)
    assert (caught.value.prompt_tokens > 14_900, caught.value.window_tokens) == (True, 4096)
    assert str(caught.value.prompt_tokens) in str(caught.value)


@pytest.mark.slow
def test_the_small_real_model_reads_what_just_fits(embedded):
    """In a smaller window, because a full one takes minutes."""
    model = ChatAegis("smollm2:135m", base_url=embedded.base_url, num_predict=2, num_ctx=512)
    answer = model.invoke("The desk lends books. " * 94)
    assert (answer.usage_metadata["input_tokens"] > 460, was_cut(answer)) == (True, None)
    with pytest.raises(AegisContextOverflowError, match="512"):
        model.invoke("The desk lends books. " * 104)


@pytest.fixture(scope="module")
def embedded():
    from conftest import short_directory

    from langchain_aegis.embedded import EmbeddedOllama

    with short_directory() as home, EmbeddedOllama(home=home) as server:
        yield server


@pytest.fixture(scope="module")
def wire(embedded):
    """A connection to it: a new client for each of many questions would take longer than the answers."""
    with httpx.Client(base_url=embedded.base_url, timeout=60) as client:
        yield client


# -- refused without asking --


def test_what_cannot_fit_is_not_sent(server, way):
    """Where the call names its window."""
    model = ChatAegis("m", base_url=server.base_url, num_ctx=4096)
    with pytest.raises(AegisContextOverflowError, match=r"at least 10000 tokens.*4096") as caught:
        ask(model, way, "word " * 40_000)
    assert (caught.value.prompt_tokens, caught.value.window_tokens) == (10_000, 4096)
    assert not server.requests


def test_an_estimate_refuses_nothing(server):
    """15,000 tokens are probable here, not certain: the server decides."""
    with pytest.raises(AegisContextOverflowError):
        ChatAegis("m", base_url=server.base_url, num_ctx=4096).invoke(TOO_LONG)
    assert len(server.chats) == 1


def test_the_servers_own_word_counts_for_a_moment(server, monkeypatch):
    """It may be restarted with a larger window."""
    now = 1000.0
    monkeypatch.setattr(reloads, "_clock", lambda: now)
    model = ChatAegis("m", base_url=server.base_url)
    huge = "word " * 40_000
    for _ in range(3):
        with pytest.raises(AegisContextOverflowError):
            model.invoke(huge)
    assert len(server.chats) == 1
    now += 11
    with pytest.raises(AegisContextOverflowError):
        model.invoke(huge)
    assert len(server.chats) == 2


def test_only_what_every_template_sends_is_counted(server):
    """A template may leave out a system message, and what the model thought."""
    model = ChatAegis("m", base_url=server.base_url, num_ctx=4096)
    with pytest.raises(AegisContextOverflowError):
        model.invoke([SystemMessage("word " * 40_000), HumanMessage("What is it?")])
    assert len(server.chats) == 1


def test_whoever_lets_the_server_cut_is_not_refused(server):
    answer = ChatAegis("m", base_url=server.base_url, num_ctx=4096).invoke("word " * 40_000, truncate=True)
    assert was_cut(answer)["how"] == "cut"


WORDS = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=12),
        st.sampled_from(
            ["the", "Überprüfung", "return", "x", "1", "über", "<|im_start|>", "<|im_end|>", "a_b", "日本"]
        ),
        st.text("abc 0\n\t-=", max_size=40),
    ),
    min_size=1,
    max_size=120,
).map(" ".join)


def tokens_of(wire, text):
    """How many tokens the small model's tokenizer makes of a text: the server says so when it refuses."""
    body = {"model": "smollm2:135m", "prompt": text, "raw": True, "stream": False, "truncate": False,
            "options": {"num_ctx": 4, "num_predict": 1}}  # fmt: skip
    answer = wire.post("/api/generate", json=body).json()
    if "error" not in answer:
        return answer.get("prompt_eval_count", 0)
    return int(re.search(r'n_prompt_tokens":(\d+)', answer["error"])[1])


@pytest.mark.slow
@settings(max_examples=200)
@given(text=WORDS)
def test_no_text_has_fewer_tokens_for_the_real_tokenizer(wire, text):
    """The bound is a lower one, whatever the text."""
    assert at_least_tokens(text) <= tokens_of(wire, text)


@given(text=WORDS, count=st.integers(1, 50))
def test_the_bound_grows_with_the_text(text, count):
    assert at_least_tokens(text) <= at_least_tokens(text + " word" * count)
    assert at_least_tokens(" word" * 4 * count) == count


# -- cut, with a mark --


def test_a_cut_answer_says_so_and_is_never_cached(server, way, cache):
    """In LangChain's cache, whatever it is."""
    model = ChatAegis("m", base_url=server.base_url, on_overflow="warn", temperature=0)
    for _ in range(2):
        mark = was_cut(ask(model, way, TOO_LONG))
        assert (mark["how"], mark["prompt_tokens"] > 14_000, mark["window_tokens"]) == ("cut", True, 4096)
    assert not cache._cache
    assert [chat["truncate"] for chat in server.chats] == [False, True] * 2
    assert was_cut(ask(model, way, "What is it?")) is None
    assert cache._cache


def test_the_batching_wrapper_caches_no_cut_answer_either(server, way, cache):
    model = BatchingChatModel(ChatAegis("m", base_url=server.base_url, on_overflow="warn", temperature=0))
    assert was_cut(ask(model, way, TOO_LONG))["how"] == "cut"
    assert not cache._cache
    ask(model, way, "What is it?")
    assert cache._cache


def test_the_semantic_cache_keeps_no_cut_answer(server, way, redis_url):
    cache = AegisSemanticCache(redis_url, namespace=f"cut{way}", op_budget_s=5)
    set_llm_cache(cache)
    try:
        model = ChatAegis("m", base_url=server.base_url, on_overflow="warn", temperature=0)
        assert was_cut(ask(model, way, TOO_LONG))
        assert cache.health().entries == 0
        ask(model, way, "What is it?")
        assert cache.health().entries == 1
    finally:
        set_llm_cache(None)
        cache.close()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pipeline_over_a_cut_answer_is_not_kept(server, way, redis_url, wrapped):
    """Its value is a plain text, which cannot say so; also through a wrapper that shares calls."""
    model = ChatAegis("m", base_url=server.base_url, on_overflow="warn", temperature=0)
    model = BatchingChatModel(model) if wrapped else model
    with AegisSemanticCache(redis_url, namespace=f"cutp{way}{wrapped}", op_budget_s=5) as cache:
        for prompt, kept in ((TOO_LONG, 0), ("What is it?", 1)):
            cache.get_or_generate("What is it?", lambda prompt=prompt: ask(model, way, prompt).text, pipeline="p")
            assert cache.health().entries == kept
        assert cache.stats().not_stored["part_of_prompt"] == 1


async def test_streams_of_events_carry_the_mark(server, cache):
    """Both versions; and what LangChain makes of them is not cached."""
    model = ChatAegis("m", base_url=server.base_url, on_overflow="warn", temperature=0)
    events = [event async for event in model.astream_events(TOO_LONG, version="v2")]
    assert was_cut(events[-1]["data"]["output"])["how"] == "cut"
    stream = await model.astream_events(TOO_LONG, version="v3")
    message = await stream.output
    assert was_cut(message)["how"] == "cut"
    assert not cache._cache


# -- trimmed --


def shorter(messages, error):
    """Drop a third of the words, as a graph would drop retrieved documents."""
    words = messages[-1].content.split()
    return [*messages[:-1], HumanMessage(" ".join(words[: len(words) * 2 // 3]))]


def test_a_prompt_is_trimmed_until_it_fits(server, way, cache):
    """By a function that is given both numbers; and the answer says so."""
    errors = []

    def trim(messages, error):
        errors.append((error.prompt_tokens, error.window_tokens))
        return shorter(messages, error)

    model = ChatAegis("m", base_url=server.base_url, on_overflow="trim", trim=trim, temperature=0)
    mark = was_cut(ask(model, way, "word " * 9_000))
    assert len(errors) == 2
    assert errors[0][0] > errors[1][0] > errors[1][1] == 4096
    assert mark == {"how": "trimmed", "prompt_tokens": errors[0][0], "window_tokens": 4096}
    assert not cache._cache


def test_trimming_ends(server, way):
    """After a few attempts, at once when nothing was changed, and never with a wrong prompt."""
    calls = []

    def slowly(messages, error):
        calls.append(error)
        return [HumanMessage(messages[-1].content[5:])]

    with pytest.raises(AegisContextOverflowError):
        ask(ChatAegis("m", base_url=server.base_url, on_overflow="trim", trim=slowly), way, TOO_LONG)
    assert len(calls) == MOST_TRIMS
    same = ChatAegis("m", base_url=server.base_url, on_overflow="trim", trim=lambda messages, error: messages)
    with pytest.raises(AegisContextOverflowError):
        ask(same, way, TOO_LONG)
    for wrong in ([], None, ["text"], "text"):
        model = ChatAegis("m", base_url=server.base_url, on_overflow="trim", trim=lambda m, e, wrong=wrong: wrong)
        with pytest.raises(AegisOptionError, match="trim must return"):
            ask(model, way, TOO_LONG)


def test_what_trim_raises_is_the_callers(server, way):
    def broken(messages, error):
        raise KeyError("documents")

    with pytest.raises(KeyError):
        ask(ChatAegis("m", base_url=server.base_url, on_overflow="trim", trim=broken), way, TOO_LONG)


def test_trim_and_its_policy_go_together():
    for arguments in ({"on_overflow": "trim"}, {"trim": shorter}, {"trim": shorter, "on_overflow": "warn"}):
        with pytest.raises(AegisOptionError, match="go together"):
            ChatAegis("m", **arguments)


def test_a_trimming_model_shares_the_answers_of_whole_prompts(server):
    """What fits is the same call."""
    trimming = ChatAegis("m", base_url=server.base_url, on_overflow="trim", trim=shorter)
    assert trimming._get_llm_string() == ChatAegis("m", base_url=server.base_url)._get_llm_string()


# -- what no server refuses --


def test_an_old_server_that_cuts_in_silence_is_found_out(old, way, cache):
    """It read fewer tokens than there are words."""
    model = ChatAegis("m", base_url=old.base_url, temperature=0)
    mark = was_cut(ask(model, way, TOO_LONG))
    assert (mark["how"], mark["window_tokens"]) == ("cut", 4096)
    assert not cache._cache
    assert was_cut(ask(model, way, FITS)) is None
    assert cache._cache


@pytest.fixture
def lying():
    server = LyingServer()
    yield server
    server.close()


def saying(used, made, loaded=None):
    """A script: this many tokens were read and written; `loaded` is what /api/ps tells."""

    def script(body):
        if body is None:
            return plain({"models": loaded}) if loaded is not None else plain({"error": "no"}, status="500 Oops")
        part = {"model": "m", "message": {"content": "It is Paris."}, "done": True, "done_reason": "stop",
                "prompt_eval_count": used, "eval_count": made}  # fmt: skip
        return plain(part)

    return script


def test_a_count_that_fills_the_window_is_a_cut_prompt(lying, way):
    """Old runners keep exactly as many tokens as the window holds; one that refuses reads fewer."""
    lying.script = saying(4096, 3)
    with pytest.raises(AegisContextOverflowError, match=r"read 4096 tokens.*num_ctx"):
        ask(ChatAegis("m", base_url=lying.url, num_ctx=4096), way, "What is it?")
    told = ChatAegis("m", base_url=lying.url, num_ctx=4096, on_overflow="warn")
    assert was_cut(ask(told, way, "What is it?")) == {"how": "cut", "prompt_tokens": None, "window_tokens": 4096}


def test_an_old_servers_prompt_can_be_trimmed(lying):
    """It is like a refusal, if nobody has read a part of the answer yet."""
    used = iter([4096, 90])
    lying.script = lambda body: saying(next(used), 3)(body) if body else plain({"models": []})
    model = ChatAegis("m", base_url=lying.url, num_ctx=4096, on_overflow="trim", trim=shorter)
    assert was_cut(model.invoke("What is it that the desk lends?"))["how"] == "trimmed"
    assert [len(r["messages"][0]["content"].split()) for r in lying.requests if r] == [7, 4]


@pytest.mark.parametrize(("used", "cut"), [(2048, True), (4096, True), (4095, False), (3000, False), (1024, False)])
def test_where_nothing_is_known_a_usual_window_is_recognised(lying, used, cut):
    """A server that tells no window: the answer is marked, not refused."""
    for loaded in ([{"model": "m:latest"}], None):
        lying.script = saying(used, 3, loaded)
        assert (was_cut(ChatAegis("m", base_url=lying.url).invoke("What is it?")) is not None) is cut


def test_a_window_that_fills_up_while_answering_is_told_once(lying, way, cache, caplog):
    """The server dropped the beginning of the prompt and went on."""
    lying.script = saying(3000, 1096, [{"model": "m:latest", "context_length": 4096}])
    model = ChatAegis("m", base_url=lying.url)
    for _ in range(2):
        mark = was_cut(ask(model, way, "What is it?"))
        assert mark == {"how": "shifted", "prompt_tokens": 3000, "window_tokens": 4096}
    assert not cache._cache
    assert len([r for r in caplog.records if "window_full" in r.message]) == 1
    lying.script = saying(3000, 1095, [])
    assert was_cut(ask(model, way, "What is it?")) is None
    assert lying.requests.count(None) == 1  # the window is asked for once, not with every answer


def test_a_model_that_cannot_have_the_window_it_was_asked_for(server, way):
    """The server gives what the model was trained for, and that counts."""
    model = ChatAegis("tiny", base_url=server.base_url, num_ctx=8192)
    with pytest.raises(AegisContextOverflowError, match="256"):
        ask(model, way, "word " * 300)
    mark = was_cut(ask(model, way, "word " * 240))
    assert mark["how"] == "shifted"
    assert mark["window_tokens"] == 256


def test_short_calls_ask_nothing(server, way):
    ask(ChatAegis("m", base_url=server.base_url), way, "What is it?")
    assert set(server.routes) == {"/api/chat"}
