"""A RAG graph of two nodes, which know nothing of langchain-aegis; `aegis demo` asks it, and so does this file."""

from collections.abc import Awaitable, Callable
from typing import Any, TypedDict

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langgraph.graph import END, START, StateGraph

PROMPT = """Answer the question in one short sentence, with the words of the context.

Context:
{context}

Question: {question}

Answer:"""


class State(TypedDict, total=False):
    question: str
    documents: list[Document]
    answer: AIMessage


def build_graph(model: BaseChatModel, retrieve: Callable[[str], Awaitable[list[Document]]]) -> Any:
    """Return a compiled graph: {"question": ...} in, `documents` and `answer` out."""

    async def find(state: State) -> State:
        return {"documents": await retrieve(state["question"])}

    async def generate(state: State) -> State:
        context = "\n".join(document.page_content for document in state["documents"])
        return {"answer": await model.ainvoke(PROMPT.format(context=context, question=state["question"]))}

    graph = StateGraph(State)
    graph.add_node("find", find)
    graph.add_node("generate", generate)
    graph.add_edge(START, "find")
    graph.add_edge("find", "generate")
    graph.add_edge("generate", END)
    return graph.compile()


if __name__ == "__main__":
    import sys

    from langchain_aegis.demo.run import run_demo

    sys.exit(run_demo())
