"""The way of a text to its vector: this process, Redis, a request that others share.

Written once, as flows; what is under way for one caller is under way for all of them, whether it is Redis or the
embedder that is asked.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from langchain_aegis.bounds import WINDOW_MS
from langchain_aegis.embedding_requests import Vector, embed_wishes, pack, unpack
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.flows import Flow, arun, run
from langchain_aegis.gathering import Gathering, Slots
from langchain_aegis.lanes import Performer, Wish
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.scope import current
from langchain_aegis.traits import NO_TRAITS, Traits

if TYPE_CHECKING:
    from langchain_aegis.embedding_cache import AegisEmbeddingCache

MAX_BATCH: Final = 64
MAX_BATCH_CHARS: Final = 65_536
_SPLIT_CHARS: Final = 4_000  # computing so much takes longer than a request costs
_RECALLED_AT_ONCE: Final = 256
_FRESH_S: Final = 30.0  # for so long a model is taken to be the same if nothing is asked of it


@dataclass(frozen=True, slots=True)
class LearnDigest:
    """Step of a flow: ask the server for the model's digest; the answer is None if it tells none."""


@dataclass(frozen=True, slots=True)
class _Get:
    """Step of a flow: get texts from a gathering."""

    gathering: Gathering[Any]
    texts: Sequence[str]
    arguments: Mapping[str, Any]


class Kept:
    """What a cache keeps of one embedder.

    Args:
        cache: Where it is kept.
        fields: Everything apart from the model itself that changes a vector; plain JSON values.
        name: The model's name.
        learns: The embedder's server can be asked for the model's digest.
    """

    def __init__(self, cache: AegisEmbeddingCache, fields: Mapping[str, Any], name: str, *, learns: bool) -> None:
        self.cache = cache
        self.dimensions: int | None = None  # of the newest vector
        self._fields = {**fields, "version": cache.version}
        self._name = name
        self._learns = learns
        self._digest: str | None = None
        self._asked_at = -math.inf
        self._model: str | None = None
        if not learns:
            self._model = self._key(name=name)

    @property
    def model(self) -> str | None:
        """The name of the model's vectors; None while it has to be asked for, or is not known."""
        return self._model if self.is_fresh else None

    @property
    def is_fresh(self) -> bool:
        """Whether the model need not be asked for now."""
        return not self._learns or time.monotonic() - self._asked_at < _FRESH_S

    def learn(self) -> Flow[bool]:
        """Ask which model it is now; returns whether that is known for sure."""
        if not self._learns:
            return True
        try:
            digest = yield LearnDigest()
        except Exception as exc:  # whatever it is, the embedder's own request will say it
            logger.debug("the digest of an embedding model cannot be learnt", exc_info=exc)
            digest = None
        self._asked_at = time.monotonic()
        if digest is None:
            if self._digest is None:  # else: the server is away, and what it had is what it had
                self._model = None if self.cache.version is None else self._key(name=self._name)
                if self._model is None:
                    warn_once(
                        "embedding_cache_without_digest",
                        "the server tells no digest of the embedding model, so vectors are not kept; "
                        "name its state: AegisEmbeddingCache(version=...)",
                    )
            return self._digest is None
        if digest != self._digest:
            self._digest, self.dimensions = digest, None
            self._model = self._key(digest=digest)
        return True

    def _key(self, **model: str) -> str:
        return self.cache.model_key(json.dumps({**self._fields, **model}, sort_keys=True))


class GatheredEmbeddings:
    """Vectors of one embedder, for all its callers.

    Args:
        kept: What a cache keeps of it; None: every text is asked for.
        admission: Each request takes a slot of it; None: nothing bounds them.
        max_batch: Most texts of a request.
        max_chars: Most characters of a request's texts together; a longer text goes alone.
        traits: What the admission may know of a request.
        window_ms: See `Admission.enter`.
    """

    def __init__(
        self,
        *,
        kept: Kept | None = None,
        admission: Slots | None = None,
        max_batch: int = MAX_BATCH,
        max_chars: int = MAX_BATCH_CHARS,
        traits: Traits = NO_TRAITS,
        window_ms: float = WINDOW_MS,
    ) -> None:
        self._kept = kept
        gathering = partial(
            Gathering[Vector], admission=admission, max_batch=max_batch, max_chars=max_chars, traits=traits,
            window_ms=window_ms,
            split_chars=_SPLIT_CHARS,
        )  # fmt: skip
        self.max_batch = max_batch
        self.asked = gathering(embed_wishes)
        self._asked_and_kept = gathering(self._embed) if kept is not None else self.asked
        self._recalled: Gathering[Vector | None] = Gathering(self._recall, max_batch=_RECALLED_AT_ONCE)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way and nobody waits."""
        return self.asked.idle and self._asked_and_kept.idle and self._recalled.idle

    def embed(
        self, texts: Sequence[str], performer: Performer, *, documents: bool = False, deadline: float | None = None
    ) -> list[Vector]:
        """Return one vector for each text, in their order; each is the caller's own list.

        Raises:
            AegisOverloadedError: Too many texts wait.
            AegisDeadlineError: The deadline, a time of `time.monotonic()`, passed.
            Exception: What the embedder raised.
        """
        return run(
            self._flow(texts, documents, deadline),
            lambda step: step.gathering.get(step.texts, performer, **step.arguments),
        )

    async def aembed(
        self, texts: Sequence[str], performer: Performer, *, documents: bool = False, deadline: float | None = None
    ) -> list[Vector]:
        """As `embed`, in an event loop."""
        return await arun(
            self._flow(texts, documents, deadline),
            lambda step: step.gathering.aget(step.texts, performer, **step.arguments),
        )

    def _flow(self, texts: Sequence[str], documents: bool, deadline: float | None) -> Flow[list[Vector]]:
        kept, mode = self._kept, current().cache
        missing = list(dict.fromkeys(texts))
        found: dict[str, Vector] = {}
        if kept is not None and mode == "use":
            found = yield from self._from_cache(kept, missing, deadline)
            missing = [text for text in missing if text not in found]
        cached = list(found)
        arguments: dict[str, Any] = {"documents": documents, "deadline": deadline}
        if documents:
            arguments["place_of"] = lambda text: f"This was text {texts.index(text) + 1} of {len(texts)}."
        if mode == "use":
            arguments["known"] = self._in_memory
        while missing:
            missing.sort(key=len)  # neighbours need little padding
            for start in range(0, len(missing), self.max_batch):
                part = missing[start : start + self.max_batch]
                vectors = yield _Get(self.asked if mode == "off" else self._asked_and_kept, part, arguments)
                found.update(zip(part, vectors, strict=True))
                arguments["wait"] = "patient"  # it has begun
            # Vectors of another length than those of now are another model's.
            dimensions = len(found[missing[0]])
            missing = [text for text in cached if len(found[text]) != dimensions]
            cached, arguments["known"] = [], None
        return [list(found[text]) for text in texts]

    def _from_cache(self, kept: Kept, texts: Sequence[str], deadline: float | None) -> Flow[dict[str, Vector]]:
        found = {text: vector for text in texts if (vector := self._in_memory(text)) is not None}
        # Redis has nothing yet of what another caller is asking the embedder for.
        missing = [text for text in texts if text not in found and not self._asked_and_kept.has(text)]
        if kept.is_fresh and not (kept.cache.shared and kept.model):
            return found
        for start in range(0, len(missing), _RECALLED_AT_ONCE):
            part = missing[start : start + _RECALLED_AT_ONCE]
            vectors = yield _Get(self._recalled, part, {"deadline": deadline})
            found.update((text, vector) for text, vector in zip(part, vectors, strict=True) if vector is not None)
        return found

    def _in_memory(self, text: str) -> Vector | None:
        kept = self._kept
        if kept is None or (model := kept.model) is None:
            return None
        return kept.cache.recall(model, text, kept.dimensions)

    def _recall(self, wishes: list[Wish[Vector | None]]) -> Flow[None]:
        """One request to Redis, after one for the model's digest if that is due."""
        found: dict[str, Vector] = {}
        if (kept := self._kept) is not None:
            try:
                if not kept.is_fresh:
                    yield from kept.learn()
                if (model := kept.model) is not None:
                    texts = [wish.text for wish in wishes if wish.seats]
                    found = {text: vector for text in texts if (vector := self._in_memory(text)) is not None}
                    missing = [text for text in texts if text not in found]
                    found |= yield from kept.cache.ask_redis(model, missing, kept.dimensions)
            except Exception as exc:  # whatever it is, the embedder can still be asked
                _swallow("read", exc)
        for wish in wishes:
            wish.land(found.get(wish.text))

    def _embed(self, wishes: list[Wish[Vector]]) -> Flow[None]:
        """One request to the embedder, whose vectors are kept."""
        kept = self._kept
        if kept is None:
            yield from embed_wishes(wishes)
            return
        if not kept.is_fresh:
            yield from kept.learn()
        kept.cache.missed(len(wishes))
        yield from embed_wishes(wishes, partial(self._keep, kept, kept.model))

    def _keep(self, kept: Kept, model: str | None, texts: list[str], vectors: list[Vector]) -> Flow[list[Vector]]:
        """Keep vectors, if the model is still the one that it was when they were asked for."""
        packed = [pack(vector) for vector in vectors]
        try:
            if model is not None and (yield from kept.learn()) and kept.model == model:
                kept.dimensions = len(vectors[0])
                yield from kept.cache.keep(model, {t: p for t, p in zip(texts, packed, strict=True) if p is not None})
        except Exception as exc:  # whatever it is, the vectors are there
            _swallow("write", exc)
        return [v if p is None else unpack(p) for v, p in zip(vectors, packed, strict=True)]


def check_batch(max_batch: object, max_batch_chars: object) -> None:
    """Raise AegisConfigError if a request's bounds cannot be used."""
    for name, value in (("max_batch", max_batch), ("max_batch_chars", max_batch_chars)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AegisConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_cache(cache: object) -> None:
    """Raise AegisConfigError if `cache` is neither None nor an AegisEmbeddingCache."""
    if cache is None:
        return
    from langchain_aegis.embedding_cache import AegisEmbeddingCache  # brings redis

    if not isinstance(cache, AegisEmbeddingCache):
        raise AegisConfigError(f"cache must be an AegisEmbeddingCache, got {type(cache).__name__}")


def _swallow(what: str, exc: Exception) -> None:
    """Note a failure that must not cost the user his call."""
    warn_once(
        f"embedding_cache_{what}:{type(exc).__name__}",
        f"the embedding cache failed ({type(exc).__name__}); the embedder is asked instead",
    )
    logger.debug("the embedding cache failed", exc_info=exc)
