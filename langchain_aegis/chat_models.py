"""A chat model on Ollama that takes ChatOllama's place."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any, Self, cast

from langchain_core.caches import BaseCache
from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.globals import get_llm_cache
from langchain_core.language_models._utils import _update_message_content_to_blocks
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.utils import secret_from_env
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator

from langchain_aegis.admission import Admission
from langchain_aegis.answers import Whole, read_chunk, read_result
from langchain_aegis.asking import Asking, turn_of
from langchain_aegis.bodies import wire_message, wire_tools
from langchain_aegis.client import OllamaClient
from langchain_aegis.digests import note_asked
from langchain_aegis.endpoint import Endpoint
from langchain_aegis.errors import AegisConfigError, AegisOptionError
from langchain_aegis.followed import afound, found
from langchain_aegis.hits import CachedChat
from langchain_aegis.identity import llm_string
from langchain_aegis.options import (
    ALIASES,
    MODEL_OPTIONS,
    Call,
    Standing,
    check_keep_alive,
    check_model,
    check_names,
    check_stop,
    merge,
    option_error,
    resolve_aliases,
    standing,
)
from langchain_aegis.overflow import Fit, Policy, Trim
from langchain_aegis.pools import Pool
from langchain_aegis.reloads import Place, Rule, place, resolve_strict, runner_options
from langchain_aegis.replays import StreamEntry
from langchain_aegis.servers import addresses_of, admission_of
from langchain_aegis.settings import AegisSettings, normalise_base_url
from langchain_aegis.spread import Asks, Spread
from langchain_aegis.stamps import follows
from langchain_aegis.traits import in_bulk
from langchain_aegis.tuning import tuned
from langchain_aegis.warming import Report, Target, Warmed, awarm, warm


class ChatAegis(CachedChat):
    """ChatOllama with its own transport, checked options, errors of one tree, and a name for the cache.

    Messages, tools and structured output are converted by ChatOllama, so an application changes the constructor's
    name only. All of ChatOllama's arguments are accepted, and Ollama's options that it lacks. Unknown ones are
    refused, also in a call. A call's options are merged over the constructor's:
    `model.invoke(x, temperature=0, num_predict=50)`.

    Args:
        model: Name of the model; default `OLLAMA_MODEL_GENERATION`.
        base_url: Address of the server; default `OLLAMA_BASE_URL`. `user:password@` in it is sent, never shown. A list:
            several servers that have the model. Each call goes to the least busy of those that can be reached, or to
            one that has just read how its prompt begins.
        recheck_s: Seconds for which one of several servers that cannot be reached is left alone.
        max_concurrency: How many calls of this process (with `AEGIS_SHARED_SLOTS`: of all processes) the server gets at
            once, shared by all models of that address (the smallest value wins; default 4). Further calls wait for
            their turn, for as long as `timeout`, items of `batch` and `abatch` after single calls;
            `BatchingChatModel` bounds the queue, too.
        window_ms: 0: waiting calls run first come, first served, tenants in turn. Else those that share a long
            prefix, or model and runner options, are put next to each other while all slots are busy. Nobody waits
            longer for that than this, twice a service time, or 2 s, whichever is longest. Default `BATCH_WINDOW_MS`.
        tuning: "dgx-spark", "workstation", "laptop" or "cpu": how long models stay loaded, how many calls run at once,
            and how long to wait for an answer there, as `aegis plan` prints it; never an option of the model. "auto"
            changes nothing.
        on_overflow: What happens to a prompt that does not fit into the model's window: "raise" an
            AegisContextOverflowError, "warn" and let the server cut it, or "trim" it. What is made of a part of a
            prompt says so (`was_cut`), and is never cached.
        trim: `trim(messages, error) -> messages`, for "trim": returns a shorter prompt, for example with fewer
            retrieved documents. `error` holds `prompt_tokens` and `window_tokens`. Called at most 3 times per call;
            when the prompt still does not fit, or was not changed, the error is raised.
        on_reload: What happens when calls of this process use one model with different runner options (`num_ctx`,
            `num_thread`, ...), for each of which the server would reload it: "share" one set (the largest window) and
            warn once, "raise" an AegisReloadError, or "allow" it. `strict=True` is another way to write "raise".
        timeout: Seconds that a whole answer may take; default `AEGIS_DEADLINE_S`.
        max_retries: How often a call is repeated while the server is overloaded or cannot be reached.
        max_tokens: Another name of `num_predict`.
        api_key: Sent as bearer token; default `OLLAMA_API_KEY`.

    Raises:
        AegisConfigError: No model is named, or `base_url` is no address.
        AegisOptionError: An argument is unknown or has the wrong type.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    tuning: str = "auto"
    on_overflow: Policy = "raise"
    trim: Trim | None = Field(default=None, exclude=True, repr=False)
    on_reload: Rule = "share"
    max_concurrency: int | None = Field(default=None, gt=0)
    window_ms: float | None = Field(default=None, ge=0)
    timeout: float | None = None
    max_retries: int | None = Field(default=None, ge=0, le=10)
    api_key: SecretStr | None = Field(default_factory=secret_from_env("OLLAMA_API_KEY", default=None), repr=False)
    streaming: bool | None = None
    base_url: str | list[str] | None = Field(default=None, repr=False)  # type: ignore[assignment]  # a list is new
    recheck_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)

    # Ollama's options that ChatOllama lacks
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_keep: int | None = None
    num_batch: int | None = None
    main_gpu: int | None = None
    draft_num_predict: int | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    penalize_newline: bool | None = None

    # May hold credentials: neither shown nor serialised.
    client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)
    sync_client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)
    async_client_kwargs: dict[str, Any] | None = Field(default={}, exclude=True, repr=False)

    _endpoint: Endpoint = PrivateAttr()
    _default_keep_alive: str = PrivateAttr()
    _slots: int | None = PrivateAttr(default=None)
    _window_ms: float = PrivateAttr()
    _made_at: Place = PrivateAttr()

    def __init__(self, model: str | None = None, **arguments: Any) -> None:
        known = {*type(self).model_fields, *ALIASES, "strict"}
        check_names(arguments, known, f"argument of {type(self).__name__}:")
        values = resolve_strict(resolve_aliases(arguments))
        if model is None or values.get("base_url") is None:
            settings = AegisSettings.from_env()
            model = settings.model_generation if model is None else model
            if values.get("base_url") is None:
                values["base_url"] = settings.ollama_base_url
        if model is None:
            raise AegisConfigError('no model is named; write ChatAegis("name") or set OLLAMA_MODEL_GENERATION')
        values["base_url"] = _addresses(values["base_url"])
        try:
            super().__init__(model=check_model(model), **values)
        except ValidationError as exc:
            raise option_error(type(self).__name__, exc) from exc

    @model_validator(mode="after")
    def _set_clients(self) -> Self:
        """Take the place of ChatOllama's, which would build two clients for each model."""
        if (self.on_overflow == "trim") != (self.trim is not None):
            raise AegisOptionError('on_overflow="trim" and trim= (what shortens the prompt) go together')
        if self.top_logprobs is not None and self.logprobs is None:
            self.logprobs = True
        if self.top_logprobs is not None and self.logprobs is False:
            raise AegisOptionError("top_logprobs needs logprobs=True")
        if self.keep_alive is not None:
            check_keep_alive(self.keep_alive)
        settings = tuned(AegisSettings.from_env(), self.tuning)
        self._default_keep_alive = settings.keep_alive
        # The smallest number that anybody asks for wins, so the default of all is not asked for.
        told = settings.max_concurrency if settings.max_concurrency != AegisSettings.max_concurrency else None
        self._slots = told if self.max_concurrency is None else self.max_concurrency
        self._window_ms = settings.window_ms if self.window_ms is None else self.window_ms
        self._made_at = place()
        addresses = addresses_of(self) or (str(self.base_url or settings.ollama_base_url),)
        self._endpoint = Endpoint.of(
            addresses[0],
            settings,
            api_key=self.api_key.get_secret_value() if self.api_key else None,
            timeout=self.timeout,
            retries=self.max_retries,
            client_kwargs=self.client_kwargs,
            sync_client_kwargs=self.sync_client_kwargs,
            async_client_kwargs=self.async_client_kwargs,
        )
        if self.validate_model_on_init:
            for address in addresses:
                self._endpoint.check_has(self.model, address)
        return self

    # -- what LangChain asks about the model --

    @property
    def _llm_type(self) -> str:
        return "chat-aegis"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Say that the model can be serialised; credentials are left out."""
        return True

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Arguments that are serialised as the name of an environment variable."""
        login = {"base_url": "OLLAMA_BASE_URL"} if "@" in str(self.base_url) else {}
        return {"api_key": "OLLAMA_API_KEY", **login}

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # The inner dicts and lists too: whoever is given this may change it.
        return {
            name: value.copy() if isinstance(value, (dict, list)) else value
            for name, value in self._standing().identity.items()
        }

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        # LangChain's own switches the warnings of the whole process off and on, in every call.
        return {**self.asdict(), "stop": stop, **kwargs}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        return self._named(self._call(stop, kwargs) if kwargs or stop is not None else self._defaults())

    def _named(self, call: Call) -> str:
        """Return what a cache is told about a call."""
        told = self._standing()
        text = told.llm_string if call is told.call else llm_string(call.identity(output_version=told.output_version))
        note_asked(text, (call.model, self._clients))
        return text

    def _clients(self) -> list[OllamaClient]:
        addresses = self.base_url if isinstance(self.base_url, list) else [self.base_url]
        return [self._endpoint.client(address) for address in addresses]

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        call = self._call(stop, kwargs)
        params = LangSmithParams(ls_provider="ollama", ls_model_name=call.model, ls_model_type="chat")
        if (temperature := call.options.get("temperature")) is not None:
            params["ls_temperature"] = temperature
        if (num_predict := call.options.get("num_predict")) is not None:
            params["ls_max_tokens"] = num_predict
        if call.stop:
            params["ls_stop"] = list(call.stop)
        return params

    def _call(self, stop: list[str] | None, arguments: dict[str, Any]) -> Call:
        """Return what a call with these arguments asks for."""
        if tools := arguments.get("tools"):
            plain = [tool if isinstance(tool, dict) else convert_to_openai_tool(tool) for tool in tools]
            arguments = {**arguments, "tools": plain}
        return merge(self._defaults(), arguments, stop=stop, resolve_format=self._resolve_format_param)

    def _defaults(self) -> Call:
        return self._standing().call

    def _standing(self) -> Standing:
        told: tuple[Any, ...] = (
            self.model,
            None if self.stop is None else check_stop(self.stop),
            self.format or None,
            self.reasoning,
            self.logprobs,
            self.top_logprobs,
            self._default_keep_alive if self.keep_alive is None else self.keep_alive,
            self.on_overflow == "warn",  # False makes the server refuse what it would cut in silence
            self.output_version if self.output_version != "v0" else None,
            *map(self.__dict__.get, MODEL_OPTIONS),
        )
        try:
            return standing(*told)
        except TypeError:  # a schema cannot be a key
            return standing.__wrapped__(*told)

    # -- calls --

    def batch(
        self, inputs: list[LanguageModelInput], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Answer each input, in order; they wait for their turn after single calls."""
        with in_bulk():
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self, inputs: list[LanguageModelInput], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Answer each input, in order; they wait for their turn after single calls."""
        with in_bulk():
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def _chat_params(self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        return self._body(self._call(stop, kwargs), messages)

    def _body(self, call: Call, messages: list[BaseMessage]) -> dict[str, Any]:
        converted = self._convert_messages_to_ollama_messages(messages)
        body = call.request([wire_message(dict(message)) for message in converted])
        if call.tools:
            body["tools"] = wire_tools(call.tools)
        if self.on_overflow == "warn":
            body["truncate"] = False  # at first, to learn that the prompt does not fit
        return body

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(stop, kwargs)
        return read_result(self._way(call, messages).whole(), reasoning=call.think)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(stop, kwargs)
        return read_result(await self._way(call, messages).awhole(), reasoning=call.think)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._stream_or_replay(messages, stop, kwargs):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, verbose=self.verbose)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with contextlib.aclosing(self._astream_or_replay(messages, stop, kwargs)) as stream:
            async for chunk in stream:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, verbose=self.verbose)
                yield chunk

    def _stream_or_replay(
        self, messages: list[BaseMessage], stop: list[str] | None, arguments: dict[str, Any]
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(stop, arguments)
        entry = self._entry(messages, call)
        if entry:
            yield from found(entry)
            if entry.answered:
                return
        whole = Whole()
        with entry or contextlib.nullcontext():
            for part in self._way(call, messages).parts():
                chunk = read_chunk(part, reasoning=call.think)
                if entry:
                    whole.add(part)
                    entry.send(chunk)
                if (rest := entry.rest(chunk) if entry else chunk) is not None:
                    yield rest
            # Reached only when the consumer took all of it, and the server said that it was all.
            if entry and (complete := whole.part()):
                entry.store(self._storable(complete, call))

    async def _astream_or_replay(
        self, messages: list[BaseMessage], stop: list[str] | None, arguments: dict[str, Any]
    ) -> AsyncGenerator[ChatGenerationChunk, None]:
        call = self._call(stop, arguments)
        entry = self._entry(messages, call)
        if entry:
            async with contextlib.aclosing(afound(entry)) as answer:
                async for chunk in answer:
                    yield chunk
            if entry.answered:
                return
        whole = Whole()
        with entry or contextlib.nullcontext():
            async with contextlib.aclosing(self._way(call, messages).aparts()) as parts:
                async for part in parts:
                    chunk = read_chunk(part, reasoning=call.think)
                    if entry:
                        whole.add(part)
                        entry.send(chunk)
                    if (rest := entry.rest(chunk) if entry else chunk) is not None:
                        yield rest
            if entry and (complete := whole.part()):
                await entry.astore(self._storable(complete, call))

    def _entry(self, messages: list[BaseMessage], call: Call) -> StreamEntry | None:
        consulted = not StreamEntry.applies(self)
        if self.cache is False or (consulted and not follows()):
            return None
        cache = self.cache if isinstance(self.cache, BaseCache) else get_llm_cache()
        if not cache:
            return None
        return StreamEntry(cache, messages, self._named(call), self._shown_config, consulted=consulted)

    def _storable(self, part: dict[str, Any], call: Call) -> ChatGeneration:
        """Return the generation that LangChain would store had the answer not been streamed."""
        generation = read_result(part, reasoning=call.think).generations[0]
        generation.message.response_metadata = dict(generation.generation_info or {})
        if self.output_version == "v1":
            generation.message = _update_message_content_to_blocks(generation.message, "v1")
        return generation

    def warm(self, *, system: str | None = None, pull: bool = True, report: Report | None = None) -> Warmed:
        """Have the server load the model as calls will need it, and read the beginning of their prompts.

        Args:
            system: A system prompt that calls begin with; read now, it costs them nothing.
            pull: Download the model if the server does not have it; a download that breaks off goes on by itself.
            report: Called with a `langchain_aegis.warming.Progress` for each step.

        Returns:
            What became of it; of several servers, all are made ready, and the first is told that has no room for it.

        Raises:
            AegisModelNotFoundError: There is no such model, or it is not there and `pull` is False.
            AegisConfigError: `keep_alive` is 0, so that nothing stays loaded.
        """
        found = [
            warm([target], client, self._endpoint.timeouts, pull=pull, report=report)[0]
            for client, target in self._warmth(system)
        ]
        return next((each for each in found if not each.resident), found[0])

    async def awarm(self, *, system: str | None = None, pull: bool = True, report: Report | None = None) -> Warmed:
        """Do what `warm` does, without blocking the event loop."""
        found = [
            (await awarm([target], client, self._endpoint.timeouts, pull=pull, report=report))[0]
            for client, target in self._warmth(system)
        ]
        return next((each for each in found if not each.resident), found[0])

    def _warmth(self, system: str | None) -> list[tuple[OllamaClient, Target]]:
        """Return the clients of the model's servers, and what is to be warmed there."""
        body, where, rule = self._body(self._defaults(), []), self._made_at.text, self.on_reload
        return [
            (each, Target.of(body, each.base_url, rule=rule, where=where, embeds=False, system=system))
            for each in self._clients()
        ]

    def _way(self, call: Call, messages: list[BaseMessage]) -> Asks:
        """Return a call that is ready to be sent."""
        if isinstance(self.base_url, list):
            told = {"messages": messages, "tools": call.tools}
            return Spread(
                pool=cast("Pool", self._admission),
                turn=turn_of(call, told, self._endpoint.bounds(call.timeout_s), self._window_ms),
                at=lambda address: self.model_copy(update={"base_url": address})._way(call, messages),
                client=self._endpoint.client,
                recheck_s=self.recheck_s,
            )
        client = self._endpoint.client(self.base_url)
        fit = Fit(
            call,
            messages,
            client,
            body=self._body,
            policy=self.on_overflow,
            trim=self.trim,
            rule=self.on_reload,
            where=lambda: self._place(call),
        )
        return Asking(
            fit=fit, client=client, endpoint=self._endpoint, admission=self._admission, window_ms=self._window_ms
        )

    def _place(self, call: Call) -> str:
        """Return the file and line that chose the runner options of a call: where the model was made, or called."""
        own = self._defaults()
        same = runner_options(call.options, call.shift) == runner_options(own.options, own.shift)
        return (self._made_at if same else place()).text

    @property
    def _admission(self) -> Admission:
        """The slots of the server, shared by all that call it in this process; looked up, so a copy has its own."""
        return admission_of(self, max_concurrency=self._slots)


def _addresses(told: str | Sequence[str]) -> str | list[str]:
    """Return one address, or several without repeats."""
    if isinstance(told, str):
        return normalise_base_url(told)
    if not isinstance(told, (list, tuple)) or not told or not all(isinstance(each, str) for each in told):
        raise AegisConfigError(f"base_url must be an address or a list of addresses, got {type(told).__name__}")
    found = list(dict.fromkeys(normalise_base_url(each) for each in told))
    return found if len(found) > 1 else found[0]
