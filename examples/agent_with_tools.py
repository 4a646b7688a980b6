"""An agent that calls a tool; asked again, it calls the tool again, but not the model."""

from typing import Any

from langchain.agents import create_agent
from langchain_core.globals import set_llm_cache
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from langchain_aegis import AegisSemanticCache, ChatAegis, was_cached
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.testing import ScriptedOllama

calls: list[str] = []


@tool
def opening_hours(weekday: str) -> str:
    """Look up the opening hours of the library on a weekday."""
    calls.append(weekday)
    return f"The library is open from 10:00 to 16:00 ({weekday})."


def ask(agent: Any, question: str) -> None:
    print(f"\n> {question}")
    for message in agent.invoke({"messages": [("user", question)]})["messages"][1:]:
        if isinstance(message, AIMessage):
            origin = "cache" if was_cached(message) else "model"
            said = [f"{call['name']}({call['args']})" for call in message.tool_calls] or [str(message.text)]
            print(f"  {origin}: {said[0]}")
        else:
            print(f"  tool:  {message.text}")


def main() -> None:
    with EmbeddedRedis(shared=False) as redis, ScriptedOllama() as server:
        set_llm_cache(AegisSemanticCache(redis.url, MiniLMEmbeddings()))
        model = ChatAegis("scripted", base_url=server.base_url, temperature=0)
        agent = create_agent(model, tools=[opening_hours], system_prompt="You answer visitors of a library.")
        ask(agent, "Is the library open on Saturday?")
        ask(agent, "Is the library open on Saturday?")
        # With tools only the very same prompt is a hit: what rests on a tool's result is never served by likeness.
        ask(agent, "Is the library open on Sunday?")
        set_llm_cache(None)
        print(f"\n3 questions, {len(server.chats)} calls of the model, {len(calls)} of the tool")


if __name__ == "__main__":
    main()
