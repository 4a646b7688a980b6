"""Write messages and tools as ChatOllama's client writes them: other bytes would be another prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ollama import Tool
from pydantic import ValidationError

from langchain_aegis.errors import AegisOptionError


def wire_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return one of ChatOllama's messages as it is sent; `message` is used up."""
    # Ids of tool calls are left out, as ChatOllama's client leaves them out: made up anew for every call, they would
    # change the prompt. Go reads a missing field as an empty one.
    message.pop("tool_call_id", None)
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [{"function": call["function"]} for call in calls]
    return {name: value for name, value in message.items() if value}


def wire_tools(tools: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return tools as they are sent.

    Raises:
        AegisOptionError: One is not what Ollama takes.
    """
    try:
        wired = [Tool.model_validate(tool).model_dump(exclude_none=True) for tool in tools]
    except ValidationError as exc:
        raise AegisOptionError(f"a tool is not what Ollama takes: {exc.errors()[0]['msg']}") from exc
    for tool in wired:
        parameters = tool.get("function", {}).get("parameters", {})
        if "defs" in parameters:
            parameters["$defs"] = parameters.pop("defs")
    return wired
