"""The second opinion: every kind of judge, in time, remembered, and never the end of a call."""

import asyncio
import contextvars
import json
import logging
import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableConfig, RunnableLambda
from pydantic import Field

from langchain_aegis import BatchingChatModel, ChatAegis
from langchain_aegis.breaker import Unavailable
from langchain_aegis.embedded import EmbeddedOllama
from langchain_aegis.embedded.wire_engine import End, Piece
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import forget_warnings
from langchain_aegis.scope import aegis_scope, current
from langchain_aegis.testing import ScriptedOllama
from langchain_aegis.verifiers import _PROBES, Judge, Verifier, _chat_verdict, _prompt, as_verifier

DEADLINE_S = 20
ASKED = ("How do I pay?", "How can I pay?")
BOTH = pytest.mark.parametrize("way", ["sync", "async"])


@pytest.fixture(autouse=True)
def _warnings():
    forget_warnings()


async def verdict(way, verifier, cached=ASKED[0], new=ASKED[1]):
    """Ask from a sync caller (in a thread) or from this event loop; fails if that takes for ever."""
    asking = asyncio.to_thread(verifier.verify, cached, new) if way == "sync" else verifier.averify(cached, new)
    return await asyncio.wait_for(asking, DEADLINE_S)


def patient(judge, **options):
    return Verifier(judge, budget_s=DEADLINE_S, **options)


class Encoder:
    """sentence-transformers' CrossEncoder in shape: scores from a function of the two texts."""

    def __init__(self, score, labels=None):
        self.score = score
        self.calls = []
        if labels is not None:
            self.config = type("Config", (), {"id2label": dict(enumerate(labels))})()

    def predict(self, pairs, batch_size=32):
        self.calls.append(list(pairs))
        return [self.score(a, b) for a, b in pairs]


def words(a, b):
    """Share of common words, in [0, 1]."""
    one, other = set(a.lower().split()), set(b.lower().split())
    return len(one & other) / len(one | other)


class TestWhatCanJudge:
    @BOTH
    @pytest.mark.parametrize(
        ("judge", "expected"),
        [
            (lambda cached, new: True, 1.0),
            (lambda cached, new: False, 0.0),
            (lambda cached, new: 0.25, 0.25),
            (lambda cached, new, model="x": 0.25, 0.25),
            (lambda *texts: len(texts) / 4, 0.5),
            (lambda pairs: [0.9 if a == b else 0.1 for a, b in pairs], 0.1),
            (lambda pairs, batch_size=8: [[0.9] if a == b else [0.1] for a, b in pairs], 0.1),
        ],
    )
    async def test_callables(self, way, judge, expected):
        assert await verdict(way, patient(judge)) == pytest.approx(expected)

    @BOTH
    async def test_async_callables(self, way):
        async def judge(cached, new):
            await asyncio.sleep(0)
            return 0.75

        async def scores(pairs):
            await asyncio.sleep(0)
            return [words(a, b) for a, b in pairs]

        class Called:
            async def __call__(self, cached, new):
                return True

        assert await verdict(way, patient(judge)) == 0.75
        assert await verdict(way, patient(scores)) == pytest.approx(words(*ASKED))
        assert await verdict(way, patient(Called())) == 1.0
        assert await verdict(way, patient(lambda cached, new: judge(cached, new))) == 0.75

    @BOTH
    async def test_the_order_is_cached_then_new(self, way):
        seen = []
        await verdict(way, patient(lambda cached, new: seen.append((cached, new)) or True))
        assert seen == [ASKED]

    @pytest.mark.parametrize(
        "judge", [None, "qwen3:8b", 0.5, object(), lambda: True, lambda a, b, c: True, lambda a, *, b: True, Encoder,
                  RunnableLambda(lambda x: x)],
    )  # fmt: skip
    def test_anything_else_is_refused_with_what_is_taken(self, judge):
        with pytest.raises(AegisConfigError, match=r"chat model.*\.predict.*\(cached, new\)"):
            Verifier(judge)

    @pytest.mark.parametrize("options", [{"budget_s": 0}, {"budget_s": math.nan}, {"budget_s": True}, {"memory": -1}])
    def test_numbers_out_of_range_are_refused(self, options):
        with pytest.raises(AegisConfigError, match=next(iter(options))):
            Verifier(lambda cached, new: True, **options)

    def test_a_judge_may_be_prepared(self):
        judge = as_verifier(lambda cached, new: True)
        assert as_verifier(judge) is judge
        assert Verifier(Judge(lambda cached, new: 0.5), budget_s=DEADLINE_S).verify(*ASKED) == 0.5

    @BOTH
    @pytest.mark.parametrize("said", [1.5, -0.1, math.nan, None, "0.9", [0.5, 0.5], math.inf])
    async def test_what_is_no_probability_is_a_failure(self, way, said):
        with pytest.raises(Unavailable, match="verifier_failed"):
            await verdict(way, patient(lambda cached, new: said))


class TestCrossEncoders:
    @BOTH
    async def test_both_directions_are_asked_in_one_call_and_the_lower_counts(self, way):
        encoder = Encoder(lambda a, b: 0.95 if a == b else 0.8 if (a, b) == ASKED else 0.3)
        verifier = patient(encoder)

        assert await verdict(way, verifier) == 0.3
        assert encoder.calls == [[ASKED, ASKED[::-1], *_PROBES]]

    def test_what_the_scores_mean_is_learned_once(self):
        encoder = Encoder(words)
        verifier = patient(encoder)
        for new in ("How can I pay?", "Where do I pay?", "How do I pay you?"):
            verifier.verify("How do I pay?", new)
        assert [len(call) for call in encoder.calls] == [4, 2, 2]

    def test_logits_go_through_a_sigmoid_even_where_one_looks_like_a_probability(self):
        """0.9 is a logit here, so it means 0.71: the probes told."""
        verifier = patient(Encoder(lambda a, b: 8.0 if a == b else 0.9 if a in ASKED else -10.0))
        assert verifier.verify(*ASKED) == pytest.approx(0.7109, abs=1e-4)
        assert verifier.verify(*reversed(ASKED)) == pytest.approx(0.7109, abs=1e-4)

    @given(st.floats(-1e308, 1e308))
    def test_every_logit_is_a_probability(self, logit):
        score = patient(Encoder(lambda a, b: 9.0 if a == b else logit if a in ASKED else -9.0)).verify(*ASKED)
        assert 0 <= score <= 1
        assert (score >= 0.5) == (1 + math.tanh(logit / 2) >= 1)

    def test_rounding_makes_no_logit(self):
        assert patient(Encoder(lambda a, b: 1.0000002 if a == b or a in ASKED else -1e-7)).verify(*ASKED) == 1.0

    @pytest.mark.parametrize(
        "score",
        [
            lambda a, b: 0.1 if a == b else 0.9,  # a distance
            lambda a, b: 5.0 if a == b else 0.4,  # similarity from 0 to 5
            lambda a, b: 0.7,
        ],
    )
    def test_a_model_that_cannot_tell_questions_apart_never_serves(self, score, caplog):
        verifier = patient(Encoder(score))
        for _ in range(2):
            with pytest.raises(Unavailable, match="verifier_failed"):
                verifier.verify(*ASKED)
        assert [r.message for r in caplog.records if "unrelated questions" in r.message]

    @pytest.mark.parametrize("at", [0, 1, 2])
    @pytest.mark.parametrize("scale", [1.0, 9.0])
    @pytest.mark.parametrize("labelled", [True, False])
    def test_nli_models_count_entailment_of_both_directions(self, at, scale, labelled):
        """Wherever the column stands; from labels or, without them, from a question and itself."""

        def score(a, b):
            sure = 1.0 if a == b else 0.8 if (a, b) == ASKED else 0.3 if a in ASKED else 0.0
            row = [(1 - sure) * 0.6, (1 - sure) * 0.4]
            row.insert(at, sure)
            return row if scale == 1 else [scale * math.log(max(value, 1e-9)) for value in row]

        labels = ["contradiction", "neutral"]
        labels.insert(at, "ENTAILMENT")
        verdict = patient(Encoder(score, labels if labelled else None)).verify(*ASKED)
        assert verdict == pytest.approx(0.3) if scale == 1 else verdict < 0.3

    def test_two_classes(self):
        def score(a, b):
            return [0.0, 1.0] if a == b else [0.4, 0.6] if a in ASKED else [0.9, 0.1]

        assert patient(Encoder(score, ["not_duplicate", "duplicate"])).verify(*ASKED) == pytest.approx(0.6)
        assert patient(Encoder(score)).verify(*ASKED) == pytest.approx(0.6)

    def test_the_column_may_be_told(self):
        encoder = Encoder(lambda a, b: [0.9, 0.1, 0.0] if a == b else [0.2, 0.8, 0.0])
        assert Verifier(as_verifier(encoder, entailment=0), budget_s=DEADLINE_S).verify(*ASKED) == pytest.approx(0.2)
        for wrong in (1, 3, -1):
            with pytest.raises(Unavailable):
                Verifier(as_verifier(encoder, entailment=wrong), budget_s=DEADLINE_S).verify(*ASKED)

    @pytest.mark.parametrize("result", [None, [], [0.9], 0.9, [[0.9], [0.1, 0.2], [0.3], [0.4]], [[]] * 4, ["x"] * 4])
    def test_another_shape_is_a_failure(self, result):
        with pytest.raises(Unavailable, match="verifier_failed"):
            patient(lambda pairs: result).verify(*ASKED)

    def test_arrays_are_read(self):
        numpy = pytest.importorskip("numpy")
        for score in (words, lambda a, b: [words(a, b), 1 - words(a, b)]):
            verifier = patient(lambda pairs, score=score: numpy.array([score(a, b) for a, b in pairs], "float32"))
            assert verifier.verify(*ASKED) == pytest.approx(words(*ASKED), abs=1e-6)


class TestTime:
    @BOTH
    @pytest.mark.parametrize("kind", ["blocking", "async"])
    async def test_a_late_judge_is_unavailable_and_its_verdict_is_remembered(self, way, kind):
        free, done = threading.Event(), threading.Event()

        def judge(cached, new):
            free.wait(DEADLINE_S)
            done.set()
            return 0.9

        async def ajudge(cached, new):
            return await asyncio.to_thread(judge, cached, new)

        verifier = Verifier(judge if kind == "blocking" else ajudge, budget_s=0.5)
        with pytest.raises(Unavailable, match="verifier_slow") as caught:
            await verdict(way, verifier)
        late = caught.value.late
        free.set()
        assert await asyncio.to_thread(done.wait, DEADLINE_S)
        result = late if isinstance(late, asyncio.Future) else asyncio.wrap_future(late)
        assert await asyncio.wait_for(result, DEADLINE_S) == 0.9
        assert await verdict(way, verifier) == 0.9

    async def test_a_blocking_judge_does_not_block_the_loop(self):
        free = threading.Event()
        asked = asyncio.create_task(patient(lambda cached, new: free.wait(DEADLINE_S)).averify(*ASKED))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not asked.done()
        free.set()
        assert await asyncio.wait_for(asked, DEADLINE_S) == 1.0

    @BOTH
    async def test_a_judge_that_raises_is_unavailable(self, way, caplog):
        def judge(cached, new):
            raise ValueError(cached)

        with pytest.raises(Unavailable, match="verifier_failed"):
            await verdict(way, patient(judge))
        assert "verifier_failed: the verifier failed (ValueError)" in caplog.text
        assert ASKED[0] not in caplog.text

    @BOTH
    @pytest.mark.parametrize("error", [TimeoutError, asyncio.CancelledError])
    async def test_a_judge_that_gives_up_by_itself_has_failed(self, way, error):
        async def judge(cached, new):
            raise error

        with pytest.raises(Unavailable, match="verifier_failed"):
            await verdict(way, patient(judge))

    @BOTH
    async def test_what_keeps_failing_is_left_alone(self, way):
        calls = []
        verifier = patient(lambda cached, new: calls.append(new) or math.nan)
        for at in range(9):
            with pytest.raises(Unavailable, match="verifier_failed"):
                await verdict(way, verifier, new=str(at))
        assert 5 <= len(calls) < 9
        assert verifier.breaker.open

    async def test_stuck_threads_do_not_pile_up_work(self):
        """What a thread comes to only after its caller has left is not asked any more."""
        free, calls = threading.Event(), []

        def judge(cached, new):
            calls.append(new)
            return free.wait(DEADLINE_S)

        verifiers = [Verifier(judge, budget_s=0.05) for _ in range(12)]  # each with a breaker of its own
        given_up = await asyncio.gather(
            *(v.averify("a", str(i)) for i, v in enumerate(verifiers)), return_exceptions=True
        )
        assert {type(each) for each in given_up} == {Unavailable}
        free.set()
        assert await verdict("async", patient(judge), "a", "last") == 1.0
        assert len(calls) <= 8 + 1
        assert calls[-1] == "last"

    async def test_a_cancelled_caller_cancels_an_async_judge(self):
        begun, cancelled = asyncio.Event(), asyncio.Event()

        async def judge(cached, new):
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        asking = asyncio.create_task(patient(judge).averify(*ASKED))
        await asyncio.wait_for(begun.wait(), DEADLINE_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(cancelled.wait(), DEADLINE_S)

    @BOTH
    async def test_the_judge_sees_its_callers_context(self, way):
        variable = contextvars.ContextVar("variable", default=None)
        variable.set("here")
        assert await verdict(way, patient(lambda cached, new: variable.get() == "here")) == 1.0


class TestMemory:
    @BOTH
    async def test_a_pair_is_asked_once(self, way):
        calls = []
        verifier = patient(lambda cached, new: calls.append(cached) or 0.4)
        assert [await verdict(way, verifier) for _ in range(3)] == [0.4] * 3
        assert len(calls) == 1

    def test_failures_are_not_remembered(self):
        results = iter([math.nan, 0.6])
        verifier = patient(lambda cached, new: next(results))
        with pytest.raises(Unavailable):
            verifier.verify(*ASKED)
        assert verifier.verify(*ASKED) == 0.6

    def test_the_oldest_go_first_and_no_text_is_kept(self):
        calls = []
        verifier = patient(lambda cached, new: bool(calls.append(new) or True), memory=2)
        for new in ("one", "two", "one", "three", "one", "two"):  # "two" had not been used for longest
            verifier.verify("zero", new)
        assert calls == ["one", "two", "three", "two"]
        assert all(isinstance(name, bytes) and len(name) == 16 for name in verifier._memory._verdicts)

    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), max_size=12))
    def test_no_pair_is_taken_for_another(self, pairs):
        verifier = patient(Judge(lambda cached, new: (hash((cached, new)) % 1000) / 1000))
        for cached, new in pairs:
            assert verifier.verify(cached, new) == (hash((cached, new)) % 1000) / 1000

    def test_nothing_may_be_remembered(self):
        calls = []
        verifier = patient(lambda cached, new: bool(calls.append(new) or True), memory=0)
        verifier.verify(*ASKED), verifier.verify(*ASKED)
        assert len(calls) == 2


class Says(BaseChatModel):
    """A chat model that answers the same text and metadata each time, and notes how it was called."""

    text: str = "Yes"
    metadata: dict = Field(default_factory=dict)
    seen: list = Field(default_factory=list)

    @property
    def _llm_type(self):
        return "says"

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.seen.append((messages, kwargs, current().cache))
        message = AIMessage(self.text, response_metadata=self.metadata)
        return ChatResult(generations=[ChatGeneration(message=message)])


class LikeOpenAI(Says):
    max_tokens: int | None = None
    logprobs: bool | None = None


def likely(**tokens):
    ranked = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return {**ranked[0], "top_logprobs": ranked}


class TestChatModels:
    @BOTH
    @pytest.mark.parametrize(("text", "expected"), [("Yes", 1), ("no", 0), (" **No**, as", 0), ("YES.", 1)])
    async def test_without_log_probabilities_the_word_decides(self, way, text, expected):
        assert await verdict(way, patient(Says(text=text))) == expected

    @BOTH
    @pytest.mark.parametrize("text", ["", "Maybe", "Nothing", "Yesterday", "The answer is Yes"])
    async def test_anything_else_is_no_verdict(self, way, text):
        with pytest.raises(Unavailable, match="verifier_failed"):
            await verdict(way, patient(Says(text=text)))

    def test_ollamas_and_openais_log_probabilities(self):
        token = likely(Yes=0.5, No=0.2, **{" yes": 0.1, "NO": 0.1, "▁No": 0.05, "Sure": 0.05})
        for said in ([token], {"content": [token], "refusal": None}, [likely(**{"\n": 0.9}), token]):
            found = _chat_verdict(AIMessage("No", response_metadata={"logprobs": said}))
            assert found == pytest.approx(0.6 / 0.95)

    def test_a_token_without_alternatives_speaks_for_itself(self):
        said = {"logprobs": [{"token": "No", "logprob": math.log(0.6)}]}
        assert _chat_verdict(AIMessage("No", response_metadata=said)) == 0.0

    def test_a_model_that_hardly_thinks_of_yes_or_no_gives_no_verdict(self):
        said = {"logprobs": [likely(The=0.9, Yes=0.05)]}
        with pytest.raises(AegisConfigError, match="neither Yes nor No"):
            _chat_verdict(AIMessage("The", response_metadata=said))

    @given(st.text(), st.text())
    def test_texts_cannot_leave_their_strings(self, cached, new):
        """The prompt is one JSON object; what templates read as marks is never in it as such."""
        content = _prompt(cached, new)[1].content
        assert content.endswith("\nYes or No?")
        assert json.loads(content.removesuffix("\nYes or No?")) == {"first": cached, "second": new}
        assert not set("<>[]|") & set(content)
        assert content.count("\n") == 1

    @BOTH
    async def test_the_cache_is_off_for_the_judge_alone(self, way):
        model = Says()
        with aegis_scope(cache="use"):
            await verdict(way, patient(model))
            assert current().cache == "use"
        assert [use for _, _, use in model.seen] == ["off"]

    @BOTH
    async def test_no_callback_of_the_caller_sees_the_judge(self, way):
        """Else a graph would stream the verdict to the user as if it were an answer."""
        starts = []

        class Watch(BaseCallbackHandler):
            def on_chat_model_start(self, serialized, messages, **kwargs):
                starts.append(messages)

        verifier, model = patient(Says()), Says()

        async def node(_):
            await verdict(way, verifier)
            return await model.ainvoke("x")

        await RunnableLambda(node).ainvoke("q", RunnableConfig(callbacks=[Watch()]))
        assert len(starts) == 1

    def test_openais_arguments(self):
        for model in (LikeOpenAI(), BatchingChatModel(LikeOpenAI())):
            inner = getattr(model, "inner", model)
            assert patient(model).verify(*ASKED) == 1.0
            (_, arguments, _), *_ = inner.seen
            assert arguments == {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 10}

    def test_an_unknown_model_gets_no_arguments(self):
        model = Says()
        patient(model).verify(*ASKED)
        assert model.seen[0][1] == {}


@pytest.fixture
def ollama(monkeypatch):
    """A server over a real socket whose model says Yes to equal questions, and counts what it was asked."""
    with ScriptedOllama() as server:

        async def generate(request):
            pair = json.loads(request.messages[-1]["content"].removesuffix("\nYes or No?"))
            yes = 0.9 if pair["first"].lower() == pair["second"].lower() else 0.2
            ranked = sorted([("Yes", yes), ("No", 0.95 - yes)], key=lambda each: -each[1])
            listed = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in ranked]
            told = ({**listed[0], "top_logprobs": listed[: request.top_logprobs]},) if request.logprobs else ()
            yield Piece(content=ranked[0][0], logprobs=told)
            yield End(reason="length", prompt_tokens=9, prompt_ns=1, tokens=1, tokens_ns=1)

        monkeypatch.setattr(server._engine, "generate", generate)
        yield server


def chat_aegis(server):
    return ChatAegis("scripted", base_url=server.base_url, num_ctx=512, temperature=0.7)


def chat_ollama(server):
    from langchain_ollama import ChatOllama

    return ChatOllama(model="scripted", base_url=server.base_url, num_ctx=512, temperature=0.7)


class TestOllama:
    @BOTH
    @pytest.mark.parametrize("make", [chat_aegis, chat_ollama, lambda server: BatchingChatModel(chat_ollama(server))])
    async def test_one_token_with_log_probabilities_is_asked_for(self, way, make, ollama):
        model = make(ollama)
        verifier = patient(model)
        assert await verdict(way, verifier, "How do I pay?", "how do I pay?") == pytest.approx(0.9 / 0.95)
        assert await verdict(way, verifier, "How do I pay?", "Who pays?") == pytest.approx(0.2 / 0.95)

        assert len(ollama.chats) == 2
        for body in ollama.chats:
            assert body["options"]["num_predict"] == 1
            assert body["options"]["temperature"] == 0
            assert body["options"]["num_ctx"] == 512  # another would have the server load the model anew
            assert (body["logprobs"], body["top_logprobs"], body["think"]) == (True, 10, False)
        if not isinstance(model, ChatAegis):
            theirs = getattr(model, "inner", model)
            theirs._client._client.close()
            await theirs._async_client._client.aclose()

    @BOTH
    async def test_a_server_that_fails_is_no_verdict(self, way, ollama):
        ollama.fail(400)
        with pytest.raises(Unavailable, match="verifier_failed"):
            await verdict(way, patient(chat_aegis(ollama)))

    @BOTH
    async def test_a_server_that_hangs_costs_the_budget(self, way, ollama):
        ollama.fail("hang", times=None)
        with pytest.raises(Unavailable, match="verifier_slow"):
            await verdict(way, Verifier(chat_aegis(ollama), budget_s=0.1))
        ollama.close()

    def test_answers_that_are_no_verdict_never_serve(self):
        """The scripted model quotes the question instead of judging it."""
        with ScriptedOllama() as server, pytest.raises(Unavailable, match="verifier_failed"):
            patient(chat_aegis(server)).verify(*ASKED)


@pytest.mark.slow
@BOTH
async def test_a_real_model_gives_log_probabilities_for_its_verdict(way):
    """SmolLM2-135M judges poorly; what counts is that llama.cpp's figures arrive as a number."""
    async with EmbeddedOllama() as server:
        model = ChatAegis("smollm2:135m", base_url=server.base_url)
        try:
            score = await verdict(way, Verifier(model, budget_s=90))
            assert 0 < score < 1
        except Unavailable as exc:
            logging.getLogger(__name__).info("no verdict: %s", exc)
            pytest.fail("the model said neither Yes nor No")
