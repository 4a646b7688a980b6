"""A conversation that is held again is answered from the cache, turn by turn, whatever differs that no model sees."""

import asyncio
import uuid
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.globals import set_llm_cache
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    message_chunk_to_message,
)
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages
from pydantic import Field

from langchain_aegis import AegisSemanticCache, ChatAegis, was_cached

TURNS = (
    "How long may I keep a book?",
    "And a film?",
    "What happens if I am late?",
    "How much is that for two weeks?",
    "Where do I pay it?",
)
FIVE_MISSES, FIVE_HITS = [False] * 5, [True] * 5
DEADLINE_S = 60


class Apart(Embeddings):
    """No two texts are near each other: what is a hit here is an exact one."""

    model = "apart"

    def __init__(self):
        self.places = {}

    def embed_query(self, text):
        vector = [0.0] * 256
        vector[self.places.setdefault(text, len(self.places)) % 256] = 1.0
        return vector

    def embed_documents(self, texts):
        return [self.embed_query(text) for text in texts]


@pytest.fixture
async def cache(redis_url):
    async with AegisSemanticCache(
        redis_url, Apart(), namespace=f"t{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=30
    ) as made:
        yield made
        set_llm_cache(None)


@pytest.fixture
def model(server, cache):
    """Two calls with the same prompt differ in their answers: only a cache can make a conversation go the same way."""
    return ChatAegis("m", base_url=server.base_url, temperature=0.8, cache=cache)


async def reply(model, way, messages, config=None):
    """Ask in one of the ways in which applications do."""
    if way == "invoke":
        return model.invoke(messages, config)
    if way == "ainvoke":
        return await model.ainvoke(messages, config)
    if way == "batch":
        return model.batch([messages], config)[0]
    if way == "stream":
        chunks = list(model.stream(messages, config))
    else:
        chunks = [chunk async for chunk in model.astream(messages, config)]
    assert len({chunk.id for chunk in chunks}) == 1
    return sum(chunks[1:], chunks[0])


async def hold(model, ways, *, first=(), as_messages=True):
    """Hold the conversation; return its answers. What a stream gave goes on as a message, or as the chunk it is."""
    history, answers = [*first], []
    for question, way in zip(TURNS, ways, strict=True):
        history.append(HumanMessage(question, id=str(uuid.uuid4())))
        answer = await asyncio.wait_for(reply(model, way, history), DEADLINE_S)
        history.append(message_chunk_to_message(answer) if as_messages else answer)
        answers.append(answer)
    return answers


def hits(answers):
    return [was_cached(answer) is not None for answer in answers]


def texts(answers):
    return [answer.text for answer in answers]


ORDERS = {
    "invoke": ["invoke"] * 5,
    "ainvoke": ["ainvoke"] * 5,
    "stream": ["stream"] * 5,
    "astream": ["astream"] * 5,
    "mixed": ["invoke", "astream", "ainvoke", "stream", "batch"],
}


# -- the model and its cache, no graph


@pytest.mark.parametrize("again", ORDERS)
@pytest.mark.parametrize("before", ["invoke", "astream", "mixed"])
async def test_a_conversation_held_again_is_five_hits_of_five(server, model, before, again):
    """However its answers were taken the first time and are taken now."""
    first = await hold(model, ORDERS[before])
    second = await hold(model, ORDERS[again])
    assert (hits(first), hits(second)) == (FIVE_MISSES, FIVE_HITS)
    assert texts(second) == texts(first)
    assert len(server.chats) == 5


@pytest.mark.parametrize("again", ["invoke", "stream", "mixed"])
@pytest.mark.parametrize("before", ["invoke", "stream", "mixed"])
async def test_streamed_answers_may_stay_in_the_history_as_chunks(server, model, before, again):
    """`history.append(sum of chunks)` is what many applications do, and the model sees no difference."""
    first = await hold(model, ORDERS[before], as_messages=False)
    second = await hold(model, ORDERS[again], as_messages=False)
    assert (hits(first), hits(second)) == (FIVE_MISSES, FIVE_HITS)
    assert texts(second) == texts(first)
    assert len(server.chats) == 5


async def test_the_global_cache_answers_a_conversation_too(server, cache):
    set_llm_cache(cache)
    model = ChatAegis("m", base_url=server.base_url, temperature=0.8)
    first, second = await hold(model, ORDERS["mixed"]), await hold(model, ORDERS["ainvoke"])
    assert (hits(first), hits(second)) == (FIVE_MISSES, FIVE_HITS)
    assert len(server.chats) == 5


async def test_what_langchain_merges_into_a_hit_changes_no_later_turn(server, model):
    """It adds `total_cost` to the usage of a hit, which then stands in the history of the next turn."""
    runs = [await hold(model, ORDERS["ainvoke"]) for _ in range(3)]
    assert all("total_cost" in answer.usage_metadata for answer in runs[1] + runs[2])
    assert [hits(run) for run in runs] == [FIVE_MISSES, FIVE_HITS, FIVE_HITS]
    assert len(server.chats) == 5


async def test_a_system_prompt_is_part_of_every_turn(server, model):
    polite, rude = [SystemMessage("Be polite.")], [SystemMessage("Be rude.")]
    assert hits(await hold(model, ORDERS["ainvoke"], first=polite)) == FIVE_MISSES
    assert hits(await hold(model, ORDERS["ainvoke"], first=rude)) == FIVE_MISSES
    assert hits(await hold(model, ORDERS["ainvoke"], first=polite)) == FIVE_HITS


async def test_a_turn_after_another_answer_is_another_turn(server, model):
    """The same words of the user after something else was said are not the same question."""
    first = await hold(model, ORDERS["ainvoke"])
    history = [HumanMessage(TURNS[0]), AIMessage("Seven days."), HumanMessage(TURNS[1])]
    told = await model.ainvoke(history)
    assert was_cached(told) is None
    assert told.text != first[1].text


# -- any chat model of LangChain, whose metadata differs from call to call


class Foreign(BaseChatModel):
    """A model of another provider: timings, usage, ids and tool-call ids are new for every call."""

    calls: list[Any]
    tool_names: dict[int, str] = Field(default_factory=dict)  # in which turns it wants a tool

    @property
    def _llm_type(self):
        return "foreign"

    @property
    def _identifying_params(self):
        return {"model": "foreign-1"}

    def _generate(self, messages, stop=None, run_manager=None, **kwargs):
        self.calls.append(messages)
        number = len(self.calls)
        turn = sum(message.type == "human" for message in messages)
        called = []
        if turn in self.tool_names and messages[-1].type == "human":
            called = [{"name": self.tool_names[turn], "args": {"turn": turn}, "id": f"call_{uuid.uuid4().hex}"}]
        message = AIMessage(
            f"answer {number} to turn {turn}",
            id=f"msg_{uuid.uuid4().hex}",
            tool_calls=called,
            response_metadata={
                "done_reason": "stop", "created_at": f"2026-11-22T10:00:{number:02}Z", "total_duration": number * 7919,
                "model_name": "foreign-1", "headers": {"x-request-id": uuid.uuid4().hex},
            },
            usage_metadata={"input_tokens": number, "output_tokens": 5, "total_tokens": number + 5},
        )  # fmt: skip
        return ChatResult(generations=[ChatGeneration(message=message)])


def rewritten(messages):
    """The same conversation as another process would have it: other ids, timings, usage, tool-call ids."""
    calls = {}
    for message in messages:
        copied = message.model_copy(deep=True, update={"id": str(uuid.uuid4())})
        if isinstance(copied, AIMessage):
            copied.response_metadata = {"created_at": uuid.uuid4().hex, "eval_duration": 12345, "done": True}
            copied.usage_metadata = {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}
            for call in copied.tool_calls:
                call["id"] = calls.setdefault(call["id"], f"toolu_{uuid.uuid4().hex}")
        if isinstance(copied, ToolMessage):
            copied.tool_call_id = calls[copied.tool_call_id]
            copied.artifact = {"took_ms": 3}
        yield copied


async def hold_with_tools(model, *, disturb=lambda messages: messages):
    """Hold the conversation, doing what the model asks for; return all its answers."""
    history, answers = [SystemMessage("You work in a library.")], []
    for question in TURNS:
        history.append(HumanMessage(question))
        while True:
            history = list(disturb(history))
            answer = await asyncio.wait_for(model.ainvoke(history), DEADLINE_S)
            history.append(answer)
            answers.append(answer)
            calls = answer.tool_calls
            history += [ToolMessage(f"result of {c['name']}", tool_call_id=c["id"], name=c["name"]) for c in calls]
            if not answer.tool_calls:
                break
    return answers


async def test_other_ids_timings_usage_and_tool_call_ids_make_no_other_conversation(cache):
    model = Foreign(cache=cache, calls=[], tool_names={2: "lookup_fee", 4: "add"})
    first = await hold_with_tools(model)
    assert [was_cached(answer) for answer in first] == [None] * 7
    second = await hold_with_tools(model, disturb=rewritten)
    assert all(was_cached(answer) for answer in second)
    assert texts(second) == texts(first)
    assert [[c["name"] for c in a.tool_calls] for a in second] == [[c["name"] for c in a.tool_calls] for a in first]
    assert len(model.calls) == 7


async def test_swapped_tool_results_are_another_conversation(cache):
    """Renumbered ids still say which result belongs to which call."""
    model = Foreign(cache=cache, calls=[])

    def asked(first_id, second_id):
        calls = [{"name": "price", "args": {"of": x}, "id": f"call_{x}"} for x in ("book", "film")]
        return [
            HumanMessage("What do they cost?"),
            AIMessage("", tool_calls=calls),
            ToolMessage("1 euro", tool_call_id=first_id, name="price"),
            ToolMessage("3 euros", tool_call_id=second_id, name="price"),
        ]

    assert was_cached(await model.ainvoke(asked("call_book", "call_film"))) is None
    assert was_cached(await model.ainvoke(asked("call_film", "call_book"))) is None
    assert was_cached(await model.ainvoke(asked("call_book", "call_film"))) is not None


@tool
def fine(days: int) -> str:
    """Tell the fine for some days."""
    return f"{days} euros"


@pytest.mark.parametrize("way", ["invoke", "ainvoke", "stream", "astream"])
async def test_a_conversation_with_bound_tools_is_held_again_without_the_model(server, model, way):
    """ChatAegis makes up tool-call ids of its own; the second run has others after the first hit."""
    bound = model.bind_tools([fine])

    async def run():
        history, answers = [], []
        for question in TURNS:
            history.append(HumanMessage(question))
            for _ in range(2):  # the call, then the answer
                answer = await asyncio.wait_for(reply(bound, way, history), DEADLINE_S)
                history.append(message_chunk_to_message(answer))
                answers.append(answer)
                history += [ToolMessage("1 euro", tool_call_id=c["id"], name=c["name"]) for c in answer.tool_calls]
            history = list(rewritten(history))
        return answers

    first, second = await run(), await run()
    assert all(first[i].tool_calls for i in range(0, 10, 2))
    assert (hits(first), hits(second)) == ([False] * 10, [True] * 10)
    assert [a.tool_calls and a.tool_calls[0]["args"] for a in second] == [
        a.tool_calls and a.tool_calls[0]["args"] for a in first
    ]
    assert len(server.chats) == 10


# -- through a graph


class Chat(TypedDict):
    messages: Annotated[list[Any], add_messages]


def chat_graph(model, *, awaited):
    async def areply(state: Chat) -> Chat:
        return {"messages": [await model.ainvoke(state["messages"])]}

    def reply(state: Chat) -> Chat:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(Chat)
    graph.add_node("reply", areply if awaited else reply)
    graph.add_edge(START, "reply")
    return graph.compile(checkpointer=InMemorySaver())


async def hold_in_graph(graph, modes, awaited):
    """Hold the conversation in a thread of its own; return all messages of its state, and the streamed ones."""
    thread, streamed = {"configurable": {"thread_id": uuid.uuid4().hex}}, []
    for question, mode in zip(TURNS, modes, strict=True):
        turn = {"messages": [HumanMessage(question)]}
        if awaited:
            parts = [part async for part in graph.astream(turn, thread, stream_mode=mode)]
        else:
            parts = list(graph.stream(turn, thread, stream_mode=mode))
        streamed.append([part[0] for part in parts] if mode == "messages" else None)
    return graph.get_state(thread).values["messages"], streamed


@pytest.mark.parametrize("awaited", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize(
    ("before", "again"),
    [
        (["values"] * 5, ["values"] * 5),
        (["messages"] * 5, ["messages"] * 5),
        (["values", "messages", "updates", "messages", "values"], ["messages", "values", "messages"] + ["updates"] * 2),
    ],
    ids=["invoked", "streamed", "mixed"],
)
async def test_a_graphs_conversation_held_again_keeps_all_messages(server, model, awaited, before, again):
    graph = chat_graph(model, awaited=awaited)
    (first, _), (second, streamed) = [await hold_in_graph(graph, modes, awaited) for modes in (before, again)]
    assert (hits(first[1::2]), hits(second[1::2])) == (FIVE_MISSES, FIVE_HITS)
    assert [message.type for message in second] == ["human", "ai"] * 5
    assert texts(second) == texts(first)
    assert len({message.id for message in first + second}) == 20  # a repeated id would replace a message
    assert len(server.chats) == 5
    for answer, chunks in zip(second[1::2], streamed, strict=True):
        if chunks is not None:  # pieces of one message, and no whole one after them
            assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
            assert len([chunk for chunk in chunks if chunk.text]) > 2
            assert {chunk.id for chunk in chunks} == {answer.id}
            assert "".join(chunk.text for chunk in chunks) == answer.text


async def test_two_hits_in_one_run_are_two_messages(server, model):
    """The same prompt twice in one graph run: neither hit takes the place of the other."""

    async def ask(state: Chat) -> Chat:
        return {"messages": [await model.ainvoke(TURNS[0])]}

    graph = StateGraph(Chat)
    for name in ("one", "two", "three"):
        graph.add_node(name, ask)
    graph.add_edge(START, "one")
    graph.add_edge("one", "two")
    graph.add_edge("two", "three")
    compiled = graph.compile()
    for _ in range(2):
        ids = {m.id async for m, _ in compiled.astream({"messages": []}, stream_mode="messages")}
        state = await compiled.ainvoke({"messages": []})
        assert len(state["messages"]) == 3
        assert len({message.id for message in state["messages"]} | ids) == 6
    assert len(server.chats) == 1


@pytest.mark.filterwarnings("ignore:The v3 streaming protocol")
@pytest.mark.parametrize("version", ["v2", "v3"])
async def test_the_events_of_a_hit_are_those_of_a_stream(server, model, version):
    """A user interface that reads events shows the fifth turn of a known conversation piece by piece."""
    graph = chat_graph(model, awaited=True)

    async def fifth_turn():
        thread = {"configurable": {"thread_id": uuid.uuid4().hex}}
        for question in TURNS[:4]:
            await graph.ainvoke({"messages": [HumanMessage(question)]}, thread)
        turn, pieces, ids = {"messages": [HumanMessage(TURNS[4])]}, [], set()
        if version == "v2":
            async for event in graph.astream_events(turn, thread, version="v2"):
                if event["event"] == "on_chat_model_stream":
                    pieces.append(event["data"]["chunk"].text)
                    ids.add(event["data"]["chunk"].id)
        else:
            run = await graph.astream_events(turn, thread, version="v3")
            async for message in run.messages:
                pieces += [str(piece) async for piece in message.text]
                ids.add((await message).id)
        kept = (await graph.aget_state(thread)).values["messages"]
        assert len(kept) == 10
        assert ids == {kept[-1].id}
        assert "".join(pieces) == kept[-1].text
        assert len([piece for piece in pieces if piece]) > 2
        return kept[-1]

    fresh, hit = await fifth_turn(), await fifth_turn()
    assert (was_cached(fresh), len(server.chats)) == (None, 5)
    assert was_cached(hit)["tier"] == "exact"
    assert hit.text == fresh.text
    assert hit.id != fresh.id
