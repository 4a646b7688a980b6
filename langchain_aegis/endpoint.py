"""The Ollama server that a model talks to, made of the connection arguments of its constructor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from langchain_aegis.attempts import Timeouts
from langchain_aegis.client import OllamaClient, shared_client
from langchain_aegis.errors import AegisModelNotFoundError
from langchain_aegis.identity import normalise_model
from langchain_aegis.options import check_timeout
from langchain_aegis.settings import AegisSettings


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Address, headers and bounds of a model's calls."""

    base_url: str
    headers: Mapping[str, str]
    timeouts: Timeouts
    retries: int = 0
    own: OwnClients | None = None  # where httpx gets arguments that nobody else shares

    @classmethod
    def of(
        cls,
        base_url: str,
        settings: AegisSettings,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        sync_client_kwargs: Mapping[str, Any] | None = None,
        async_client_kwargs: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the endpoint that these constructor arguments describe; see ChatAegis for their meaning."""
        common = dict(client_kwargs or {})
        headers = dict(common.pop("headers", None) or {})
        if api_key is not None and not any(name.lower() == "authorization" for name in headers):
            headers["authorization"] = f"Bearer {api_key}"
        timeouts = Timeouts.of(settings)
        if "timeout" in common:
            timeouts = timeouts.like(common.pop("timeout"))
        if timeout is not None:
            timeouts = timeouts.within(check_timeout(timeout))
        sync_options, async_options = (
            {**common, **{name: value for name, value in (own or {}).items() if name != "timeout"}}
            for own in (sync_client_kwargs, async_client_kwargs)
        )
        own = None
        if sync_options or async_options:
            own = OwnClients(headers, sync_options, async_options)
        return cls(base_url=base_url, headers=headers, timeouts=timeouts, retries=retries or 0, own=own)

    def client(self, base_url: str | None = None) -> OllamaClient:
        """Return the client for the endpoint's address, or for another one of the same model."""
        address = base_url or self.base_url
        return shared_client(address, self.headers) if self.own is None else self.own.at(address)

    def bounds(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Return the arguments of a client's call: how long, and how often."""
        return {"timeouts": self.timeouts.within(timeout_s), "retries": self.retries}

    def check_has(self, model: str, base_url: str | None = None) -> None:
        """Raise AegisModelNotFoundError if the server does not list `model`."""
        client = self.client(base_url)
        names = [str(each.get("model") or each.get("name")) for each in client.tags(timeouts=self.timeouts)]
        if normalise_model(model) not in names and not any(name.startswith(f"{model}:") for name in names):
            raise AegisModelNotFoundError(
                f"the server at {client.base_url} does not have the model {model!r}; run `ollama pull {model}` there."
                " It has:"
                f" {', '.join(names) or 'none'}"
            )


class OwnClients:
    """The clients of one model, one for each address that it calls."""

    def __init__(
        self, headers: Mapping[str, str], sync_options: Mapping[str, Any], async_options: Mapping[str, Any]
    ) -> None:
        self._arguments: dict[str, Any] = {
            "headers": headers,
            "sync_options": sync_options,
            "async_options": async_options,
        }
        self._clients: dict[str, OllamaClient] = {}

    def at(self, base_url: str) -> OllamaClient:
        """Return the client for an address; made on first use, without any I/O."""
        client = self._clients.get(base_url)
        return client or self._clients.setdefault(base_url, OllamaClient(base_url, **self._arguments))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
