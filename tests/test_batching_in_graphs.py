"""An application's graphs, agents and chains do with the batching layer what they did without it.

Each test runs the same code with ChatOllama and with a model that takes its place, against one scripted server.
"""

import asyncio
import operator
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langchain_ollama import ChatOllama
from langgraph.graph import END, START, StateGraph

from langchain_aegis import AegisClosedError, BatchingChatModel, ChatAegis
from langchain_aegis.testing import ScriptedOllama

LONG_S = 30.0
TEXT = "The library lends films, but the reading room closes too early."
TASKS = ("sentiment", "topic", "language", "summary", "urgency")


def chat_ollama(**told):
    """Without certificates, which take longer to load than a test runs."""
    return ChatOllama(**told, client_kwargs={"verify": False})


MODELS = {
    "BatchingChatModel(ChatAegis)": lambda **told: BatchingChatModel(ChatAegis(**told)),
    "BatchingChatModel(ChatOllama)": lambda **told: BatchingChatModel(chat_ollama(**told)),
    "ChatAegis": ChatAegis,
}


@pytest.fixture(scope="module")
def running():
    with ScriptedOllama("m", words=12) as server:
        yield server


@pytest.fixture
def server(running):
    running.heal()
    running.forget()
    return running


@pytest.fixture(params=MODELS)
async def pair(request, server):
    """ChatOllama, and what takes its place."""
    told = {"model": "m", "base_url": server.base_url, "temperature": 0}
    models = chat_ollama(**told), MODELS[request.param](**told)
    yield models
    for model in models:  # ChatOllama leaves its connections open
        inner = getattr(model, "inner", model)
        if type(inner) is ChatOllama:
            inner._client._client.close()
            await inner._async_client._client.aclose()


class Heard(BaseCallbackHandler):
    """Counts what it is told of model calls, by run."""

    def __init__(self):
        self.starts, self.ends, self.errors = Counter(), Counter(), Counter()

    def on_chat_model_start(self, serialized, messages, *, run_id, **kwargs):
        self.starts[run_id] += 1

    def on_llm_end(self, response, *, run_id, **kwargs):
        self.ends[run_id] += 1

    def on_llm_error(self, error, *, run_id, **kwargs):
        self.errors[run_id] += 1

    def once(self, calls):
        """Whether exactly so many runs began, and each ended once."""
        return len(self.starts) == calls and self.starts == self.ends and set(self.starts.values()) == {1}


class Tokens(Heard):
    """Keeps the tokens, too."""

    def __init__(self):
        super().__init__()
        self.tokens = {}

    def on_llm_new_token(self, token, *, run_id, **kwargs):
        self.tokens[run_id] = self.tokens.get(run_id, "") + token


class Judged(TypedDict):
    text: str
    found: Annotated[list, operator.add]


def five_nodes(model, *, alike=False):
    """Five nodes that ask the model side by side, each for another thing, and one that puts it together."""

    def node(task):
        system = "You judge texts." if alike else f"You find the {task} of a text."

        async def ask(state):
            answer = await model.ainvoke([SystemMessage(system), HumanMessage(state["text"])])
            return {"found": [(task, answer)]}

        def ask_blocking(state):
            return {"found": [(task, model.invoke([SystemMessage(system), HumanMessage(state["text"])]))]}

        return RunnableLambda(ask_blocking, ask)

    graph = StateGraph(Judged)
    graph.add_node("together", lambda state: {"found": [("count", AIMessage(str(len(state["found"]))))]})
    for task in TASKS:
        graph.add_node(task, node(task))
        graph.add_edge(START, task)
        graph.add_edge(task, "together")
    graph.add_edge("together", END)
    return graph.compile()


@tool
def opening_hours(room: str) -> str:
    """Tell the opening hours of a room of the library."""
    return f"{room} is open from 10 to 18"


@tool
def borrow_film(title: str) -> str:
    """Borrow a film by its title."""
    return f"{title} is yours for a week"


def agent_of(model):
    return create_agent(model, [opening_hours, borrow_film], system_prompt="You help the readers of a library.")


def asked(text="What are the opening hours of the room Atlas?"):
    return {"messages": [("human", text)]}


def chain_of(model):
    prompt = ChatPromptTemplate.from_messages([("system", "Summarise in a sentence."), ("human", "{document}")])
    return prompt | model | StrOutputParser()


def said(message):
    """What a message says, without what differs in every run."""
    calls = [(call["name"], call["args"]) for call in getattr(message, "tool_calls", ())]
    usage = getattr(message, "usage_metadata", None)
    return type(message).__name__, message.content, calls, usage and (usage["input_tokens"], usage["output_tokens"])


def tree(run):
    """The shape of a run tree: types, names and parents. The model's class is the one thing that may differ."""
    name = "model" if run.run_type == "llm" else run.name
    assert all(child.parent_run_id == run.id and child.trace_id == run.trace_id for child in run.child_runs)
    return run.run_type, name, run.error, sorted((tree(child) for child in run.child_runs), key=repr)


async def results(work):
    async with asyncio.timeout(LONG_S):
        return await work


# A graph with five parallel nodes


@pytest.mark.parametrize("how", ["ainvoke", "invoke"])
async def test_five_parallel_nodes_find_the_same(pair, how):
    """Same state, in the same order; each model call has one start and one end; the same run tree."""
    states, trees = [], []
    for model in pair:
        heard, runs = Heard(), RunCollectorCallbackHandler()
        graph, state = five_nodes(model), {"text": TEXT, "found": []}
        config = {"callbacks": [heard, runs]}
        work = graph.ainvoke(state, config) if how == "ainvoke" else asyncio.to_thread(graph.invoke, state, config)
        found = (await results(work))["found"]
        assert heard.once(5)
        assert len({message.id for _, message in found}) == 6
        states.append([(task, said(message)) for task, message in found])
        trees += [tree(run) for run in runs.traced_runs]
    assert [task for task, _ in states[0]] == [
        *sorted(TASKS),
        "count",
    ]  # LangGraph orders what ran side by side by name
    assert states[0] == states[1]
    assert len(trees) == 2
    assert trees[0] == trees[1]


@pytest.mark.row(112)
async def test_five_nodes_with_one_question_make_one_call_and_five_runs(server):
    """What is merged at the server is still five runs for whoever looks at the graph."""
    model = BatchingChatModel(ChatAegis("m", base_url=server.base_url, temperature=0))
    heard, runs = Heard(), RunCollectorCallbackHandler()
    state = await results(
        five_nodes(model, alike=True).ainvoke({"text": TEXT, "found": []}, {"callbacks": [heard, runs]})
    )
    assert len(server.chats) == 1
    assert heard.once(5)
    answers = [message for task, message in state["found"] if task != "count"]
    assert len({message.content for message in answers}) == 1
    assert len({message.id for message in answers}) == 5
    assert not any(other is one for at, one in enumerate(answers) for other in answers[:at])
    parents = [run.parent_run_id for run in _of_type(runs.traced_runs, "llm")]
    assert len(set(parents)) == len(parents) == 5  # each below its own node


def _of_type(runs, kind):
    for run in runs:
        if run.run_type == kind:
            yield run
        yield from _of_type(run.child_runs, kind)


# Tokens


async def tokens_by_node(graph, state, config=None):
    """What `stream_mode="messages"` yields: the pieces of each run, in order, and the node that it is told for."""
    pieces = {}
    async for piece, metadata in graph.astream(state, config, stream_mode="messages"):
        pieces.setdefault((metadata["langgraph_node"], piece.id), []).append(piece.content)
    return pieces


@pytest.mark.parametrize("alike", [False, True], ids=["five questions", "one question"])
async def test_tokens_of_parallel_nodes_come_once(pair, alike):
    """`stream_mode="messages"`: each node's pieces are ChatOllama's, none twice and none at another node."""
    told = []
    for model in pair:
        heard = Tokens()
        graph = five_nodes(model, alike=alike)
        found = await results(tokens_by_node(graph, {"text": TEXT, "found": []}, {"callbacks": [heard]}))
        assert heard.once(5)
        assert sorted("".join(pieces) for pieces in found.values()) == sorted(heard.tokens.values())
        assert Counter(node for node, _ in found) == dict.fromkeys(TASKS, 1)
        told.append({node: [piece for piece in pieces if piece] for (node, _), pieces in found.items()})
    assert told[0] == told[1]
    assert all(len(told[0][task]) > 5 for task in TASKS)


async def test_five_streams_of_one_question_make_one_call(server):
    """Who joins a stream gets all of it; the server generates once."""
    model = BatchingChatModel(ChatAegis("m", base_url=server.base_url, temperature=0))
    found = await results(tokens_by_node(five_nodes(model, alike=True), {"text": TEXT, "found": []}))
    assert len(server.chats) == 1
    assert len(found) == 5
    assert len({tuple(piece for piece in pieces if piece) for pieces in found.values()}) == 1


def test_tokens_come_once_in_a_blocking_stream_too(pair):
    told = []
    for model in pair:
        pieces = {}
        for piece, metadata in five_nodes(model).stream({"text": TEXT, "found": []}, stream_mode="messages"):
            pieces.setdefault(metadata["langgraph_node"], []).append(piece.content)
        told.append({node: [piece for piece in found if piece] for node, found in pieces.items()})
    assert told[0] == told[1]


async def test_events_are_the_same(pair):
    """`astream_events`: the same events of each run, in the same order, with the same parents and data."""

    def shown(data):
        found = data.get("chunk", data.get("output"))
        return getattr(found, "content", found)

    told = []
    for model in pair:
        runs, names = {}, {}
        async with asyncio.timeout(LONG_S):
            async for event in chain_of(model).astream_events({"document": TEXT}, version="v2"):
                kind, run = event["event"], event["run_id"]
                name = "model" if "chat_model" in kind else event["name"]
                names[run] = name
                content = shown(event["data"])
                if content == "" and kind.endswith("_stream"):
                    continue  # the last line of the server: its figures, without text
                runs.setdefault((name, tuple(names[parent] for parent in event["parent_ids"])), []).append(
                    (kind, content)
                )
        told.append(runs)
    assert told[0] == told[1]
    model_events = told[0]["model", ("RunnableSequence",)]
    assert Counter(kind for kind, _ in model_events)["on_chat_model_start"] == 1
    assert "".join(text for kind, text in model_events if kind == "on_chat_model_stream") == model_events[-1][1]


@pytest.mark.row(112)
async def test_events_of_a_graph_have_the_right_parents(pair):
    """Each model run of five parallel nodes lies below its own node."""
    told = []
    for model in pair:
        names, found = {}, Counter()
        async with asyncio.timeout(LONG_S):
            graph = five_nodes(model, alike=True)
            async for event in graph.astream_events({"text": TEXT, "found": []}, version="v2"):
                names[event["run_id"]] = event["name"]
                if "chat_model" in event["event"]:
                    path = tuple(names[parent] for parent in event["parent_ids"])
                    found[event["event"], path, event["metadata"]["langgraph_node"]] += 1
        told.append(found)
        ends = {path for kind, path, _ in found if kind == "on_chat_model_end"}
        assert len(ends) == 5
        assert all(path[1] == node for _, path, node in found)
    assert {k: n for k, n in told[0].items() if "stream" not in k[0]} == {
        k: n for k, n in told[1].items() if "stream" not in k[0]
    }


# An agent with tools


@pytest.mark.parametrize("how", ["ainvoke", "invoke"])
async def test_an_agent_uses_its_tools_alike(pair, how):
    told, trees = [], []
    for model in pair:
        heard, runs = Heard(), RunCollectorCallbackHandler()
        agent, config = agent_of(model), {"callbacks": [heard, runs]}
        work = agent.ainvoke(asked(), config) if how == "ainvoke" else asyncio.to_thread(agent.invoke, asked(), config)
        state = await results(work)
        assert heard.once(2)
        told.append([said(message) for message in state["messages"]])
        trees += [tree(run) for run in runs.traced_runs]
    assert [kind for kind, *_ in told[0]] == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
    assert told[0][1][2][0][0] == "opening_hours"
    assert told[0] == told[1]
    assert trees[0] == trees[1]


async def test_an_agents_tokens_come_once(pair):
    told = []
    for model in pair:
        found = await results(tokens_by_node(agent_of(model), asked()))
        told.append([(node, [piece for piece in pieces if piece]) for (node, _), pieces in found.items()])
    assert told[0] == told[1]
    assert any(len(pieces) > 5 for _, pieces in told[0])


async def test_many_agents_at_once_keep_their_conversations_apart(server):
    """Twenty agents side by side: each sees its own tool's result, and the server never more than four at once."""
    model = BatchingChatModel(ChatAegis("m", base_url=server.base_url, temperature=0), max_concurrency=4)
    agent = agent_of(model)
    states = await results(
        asyncio.gather(*(agent.ainvoke(asked(f"What are the opening hours of the room R{i}?")) for i in range(20)))
    )
    for i, state in enumerate(states):
        call, result = state["messages"][1].tool_calls[0], state["messages"][2]
        assert call["id"] == result.tool_call_id
        assert f"R{i}?" in state["messages"][0].content
        assert result.content.startswith(call["args"]["room"])
        assert result.content in state["messages"][3].content
    assert len(server.chats) == 40
    assert server.counters.max_running <= 4


# A chain with batches

DOCUMENTS = [f"Document {i} says that shelf {i} holds {i * 7} books." for i in range(12)]


@pytest.mark.parametrize("how", ["batch", "abatch", "batch_as_completed", "abatch_as_completed"])
async def test_a_batch_of_a_chain_gives_the_same_in_the_same_order(pair, how, server):
    told, trees = [], []
    inputs = [{"document": document} for document in DOCUMENTS]
    for model in pair:
        chain, heard, runs = chain_of(model), Heard(), RunCollectorCallbackHandler()
        config = {"callbacks": [heard, runs]}
        if how == "batch":
            found = await results(asyncio.to_thread(chain.batch, inputs, config))
        elif how == "abatch":
            found = await results(chain.abatch(inputs, config))
        elif how == "batch_as_completed":
            pieces = await results(asyncio.to_thread(lambda c=chain, o=config: dict(c.batch_as_completed(inputs, o))))
            found = [pieces[i] for i in range(len(inputs))]
        else:
            async with asyncio.timeout(LONG_S):
                pieces = {i: text async for i, text in chain.abatch_as_completed(inputs, config)}
            found = [pieces[i] for i in range(len(inputs))]
        assert heard.once(len(inputs))
        told.append(found)
        trees.append(sorted((tree(run) for run in runs.traced_runs), key=repr))
    assert told[0] == told[1]
    assert trees[0] == trees[1]
    assert len(set(told[0])) == len(DOCUMENTS)


async def test_a_chain_in_a_node_streams_and_batches(pair):
    """A node that batches inside a graph: the graph's own stream tells each item's tokens once."""

    def graph_of(model):
        async def all_of_them(state):
            answers = await chain_of(model).abatch([{"document": d} for d in DOCUMENTS[:4]])
            return {"found": [("answer", AIMessage(text)) for text in answers]}

        graph = StateGraph(Judged)
        graph.add_node("all", all_of_them)
        graph.add_edge(START, "all")
        return graph.compile()

    told = []
    for model in pair:
        graph, heard, pieces = graph_of(model), Tokens(), {}
        async with asyncio.timeout(LONG_S):
            stream = graph.astream(
                {"text": TEXT, "found": []}, {"callbacks": [heard]}, stream_mode=["messages", "values"]
            )
            async for mode, data in stream:
                if mode == "messages":
                    pieces.setdefault(data[0].id, []).append(data[0].content)
                else:
                    answers = [message.content for _, message in data["found"]]
        assert heard.once(4)
        streamed = sorted("".join(found) for found in pieces.values())
        assert sorted(heard.tokens.values()) == sorted(answers)
        told.append((answers, streamed))
    assert told[0] == told[1]


# What the page shows


@pytest.mark.slow
def test_the_examples_of_the_page_run(monkeypatch):
    """The code of docs/batching.md, from its beginning to its end."""
    page = (Path(__file__).parent.parent / "docs" / "batching.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 6
    with ScriptedOllama(["llama3.2:8b", "all-minilm"], words=4) as server:
        monkeypatch.setenv("OLLAMA_BASE_URL", server.base_url)
        monkeypatch.setenv("OLLAMA_HOST", server.base_url)
        names = {}
        for block in blocks:
            exec(compile(block, "docs/batching.md", "exec"), names)  # noqa: S102 - our own page
        assert len(names["answers"]) == 500
        assert len(server.chats) == 1 + 4 * 500 + 1 + 1
        refusal = names["overloaded"](None, names["AegisOverloadedError"]("busy", retry_after_s=1.2))
        response = asyncio.run(refusal)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
        with pytest.raises(AegisClosedError):
            names["model"].invoke("after the end")
        names["embeddings"].inner._client._client.close()


def test_the_page_links_to_what_exists():
    page = Path(__file__).parent.parent / "docs" / "batching.md"
    text = page.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not file or (page.parent / file).exists(), target
        assert file or anchor in anchors, target
