"""Private names of langchain-core and langchain-ollama that this package calls or replaces.

The dependency ranges end below the next minor releases because of them.
"""

from __future__ import annotations

_CHAT = "langchain_core.language_models.chat_models:BaseChatModel"

# Name -> the parameters that are counted on; tests/test_canaries.py keeps the list true.
RELIES_ON: dict[str, tuple[str, ...]] = {
    f"{_CHAT}._generate_with_cache": ("messages", "stop", "run_manager"),
    f"{_CHAT}._agenerate_with_cache": ("messages", "stop", "run_manager"),
    f"{_CHAT}._replay_v2_events_for_cache_hit": ("generations", "run_manager"),
    f"{_CHAT}._areplay_v2_events_for_cache_hit": ("generations", "run_manager"),
    f"{_CHAT}._get_llm_string": ("stop",),
    f"{_CHAT}._get_ls_params": ("stop",),
    f"{_CHAT}._should_stream": ("async_api", "run_manager"),
    f"{_CHAT}._should_use_protocol_streaming": ("async_api", "run_manager"),
    f"{_CHAT}._streaming_disabled": (),
    f"{_CHAT}._convert_cached_generations": ("cache_val",),
    f"{_CHAT}._get_invocation_params": ("stop",),
    f"{_CHAT}._resolve_model_profile": (),
    f"{_CHAT}._combine_llm_outputs": ("_llm_outputs",),
    f"{_CHAT}._convert_input": ("model_input",),
    f"{_CHAT}._serialized": (),
    "langchain_core.language_models._compat_bridge:chunks_to_events": ("chunks", "message_id"),
    "langchain_core.language_models._utils:_update_message_content_to_blocks": ("message", "output_version"),
    "langchain_ollama.chat_models:ChatOllama._chat_params": ("messages", "stop"),
    "langchain_ollama.chat_models:ChatOllama._convert_messages_to_ollama_messages": ("messages",),
    "langchain_ollama.chat_models:ChatOllama._resolve_format_param": ("format_param", "response_format"),
    "langchain_ollama.chat_models:ChatOllama._set_clients": (),
    "langchain_ollama.chat_models:_get_tool_calls_from_response": ("response",),
    "langchain_ollama.embeddings:OllamaEmbeddings._set_clients": (),
}  # fmt: skip
