"""Send one chat call to its server, in its turn, until its prompt fits or is refused."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_aegis.admission import Admission
from langchain_aegis.client import OllamaClient
from langchain_aegis.endpoint import Endpoint
from langchain_aegis.errors import AegisContextOverflowError
from langchain_aegis.options import Call
from langchain_aegis.overflow import Fit
from langchain_aegis.prefixes import traits_of_request


def turn_of(call: Call, body: Mapping[str, Any], bounds: Mapping[str, Any], window_ms: float) -> dict[str, Any]:
    """Return what admission is told of a call; it waits for as long as it takes, and before items of batches."""
    return {
        "wait": "patient",
        "deadline_s": bounds["timeouts"].deadline_s,
        "traits": traits_of_request(call, body),
        "window_ms": window_ms,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """One call, ready to be sent: `fit` is what is sent, and a slot of `admission` is held meanwhile."""

    fit: Fit
    client: OllamaClient
    endpoint: Endpoint
    admission: Admission
    window_ms: float

    def _bounds(self) -> dict[str, Any]:
        return self.endpoint.bounds(self.fit.call.timeout_s)

    def _turn(self, bounds: Mapping[str, Any]) -> dict[str, Any]:
        return turn_of(self.fit.call, self.fit.body, bounds, self.window_ms)

    def whole(self) -> dict[str, Any]:
        """Return the answer."""
        fit, bounds = self.fit, self._bounds()
        with self.admission.slot(**self._turn(bounds)):
            fit.in_turn()
            try:
                while True:
                    try:
                        return fit.ended(self.client.chat(fit.body, **bounds))
                    except AegisContextOverflowError as exc:
                        fit.again(exc)
            finally:
                fit.landed()

    async def awhole(self) -> dict[str, Any]:
        """Return the answer, without blocking the event loop."""
        fit, bounds = self.fit, self._bounds()
        async with self.admission.aslot(**self._turn(bounds)):
            await fit.ain_turn()
            try:
                while True:
                    try:
                        return await fit.aended(await self.client.achat(fit.body, **bounds))
                    except AegisContextOverflowError as exc:
                        await fit.aagain(exc)
            finally:
                fit.landed()

    def parts(self) -> Generator[dict[str, Any], None, None]:
        """Yield the parts of the answer; the last has `done: true`."""
        fit, bounds, begun = self.fit, self._bounds(), False
        # Held: whoever reads this stream may call the model in between, and must not wait for the slot taken here.
        with self.admission.slot(**self._turn(bounds)) as ticket, ticket.held():
            fit.in_turn()
            try:
                while True:
                    try:
                        for part in self.client.chat_stream(fit.body, **bounds):
                            if not begun:
                                fit.landed()
                            begun = True
                            yield fit.ended(part) if part.get("done") else part
                        return
                    except AegisContextOverflowError as exc:
                        if begun:
                            raise
                        fit.again(exc)
            finally:
                fit.landed()

    async def aparts(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the parts of the answer, without blocking the event loop."""
        fit, bounds, begun = self.fit, self._bounds(), False
        async with self.admission.aslot(**self._turn(bounds)) as ticket:
            with ticket.held():
                await fit.ain_turn()
                try:
                    while True:
                        try:
                            async with contextlib.aclosing(self.client.achat_stream(fit.body, **bounds)) as parts:
                                async for part in parts:
                                    if not begun:
                                        fit.landed()
                                    begun = True
                                    yield await fit.aended(part) if part.get("done") else part
                            return
                        except AegisContextOverflowError as exc:
                            if begun:
                                raise
                            await fit.aagain(exc)
                finally:
                    fit.landed()
