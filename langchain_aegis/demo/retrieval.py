"""The documents of the demonstration in Redis, found by meaning."""

from __future__ import annotations

import asyncio
import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import redis
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

from langchain_aegis.errors import AegisConfigError, AegisConnectionError
from langchain_aegis.vectors import pack, similarities

_PASSAGE_CHARS = 600


def read_documents(directory: Path) -> list[Document]:
    """Return the passages of all .md and .txt files in `directory`; a passage's source is its file's name.

    Raises:
        AegisConfigError: There is no such directory or file, or one is not UTF-8 text.
    """
    passages: list[Document] = []
    try:
        paths = sorted(p for p in directory.iterdir() if p.suffix in (".md", ".txt") and p.is_file())
    except OSError as exc:
        raise AegisConfigError(f"{directory} cannot be read: {exc.strerror}") from exc
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise AegisConfigError(f"{path} cannot be read as UTF-8 text: {exc}") from exc
        passages += [Document(part, metadata={"source": path.name}) for part in _passages(text)]
    if not passages:
        raise AegisConfigError(f"{directory} holds no .md or .txt file with text in it")
    return passages


class Passages:
    """Documents in Redis, searched there if it can, compared here if it cannot.

    Args:
        redis_url: Where they are kept.
        embeddings: Embeds documents and questions.
        documents: What is kept; indexed again only if it has changed.
    """

    def __init__(self, redis_url: str, embeddings: Embeddings, documents: Sequence[Document]) -> None:
        self._redis = redis.Redis.from_url(redis_url, protocol=2, socket_timeout=10)
        self._embeddings = embeddings
        self._documents = documents
        texts = "\0".join(f"{d.metadata['source']}\0{d.page_content}" for d in documents)
        kind = getattr(embeddings, "model", type(embeddings).__name__)
        self.digest = hashlib.blake2b(f"{kind}\0{texts}".encode(), digest_size=8).hexdigest()
        self._prefix = f"aegis-demo:{self.digest}:"
        self._index = f"{self._prefix}idx"
        self._searched_here: list[bytes] | None = None

    def open(self) -> None:
        """Embed and index the documents. Raises AegisConnectionError if Redis does not answer."""
        packed = [pack(v) for v in self._embeddings.embed_documents([d.page_content for d in self._documents])]
        vectors = [p for p in packed if p is not None]
        if len(vectors) != len(self._documents):
            raise AegisConfigError("the embedder returned a vector without a direction")
        try:
            # The index first: what is written afterwards is indexed at once, what was there is indexed some time.
            try:
                self._redis.execute_command(
                    "FT.CREATE", self._index, "PREFIX", 1, self._prefix, "SCHEMA", "vec", "VECTOR", "FLAT", 6,
                    "TYPE", "FLOAT16", "DIM", len(vectors[0]) // 2, "DISTANCE_METRIC", "COSINE",
                )  # fmt: skip
            except redis.ResponseError as exc:
                if "already exists" not in str(exc).lower():
                    self._searched_here = vectors
            with self._redis.pipeline(transaction=False) as pipe:
                for i, (document, vector) in enumerate(zip(self._documents, vectors, strict=True)):
                    pipe.hset(f"{self._prefix}{i:05d}", mapping={"text": document.page_content, "vec": vector})
                pipe.execute()
            if self._searched_here is None and len(self._search(vectors[0], len(vectors))) < len(vectors):
                self._searched_here = vectors
        except redis.RedisError as exc:
            raise AegisConnectionError(f"Redis did not keep the documents: {type(exc).__name__}") from exc

    async def nearest(self, question: str, k: int = 3) -> list[Document]:
        """Return the `k` passages nearest to `question`, in the order in which they stand in the collection.

        A fixed order makes prompts with the same passages the same prompt: for the cache, and for Ollama's own
        prompt cache, which reuses a common beginning.

        Raises:
            AegisConnectionError: Redis does not answer any more.
        """
        vector = pack(await self._embeddings.aembed_query(question))
        if vector is None:
            return []
        try:
            found = await asyncio.to_thread(self._search, vector, k)
        except redis.RedisError as exc:
            raise AegisConnectionError(f"Redis did not find the documents: {type(exc).__name__}") from exc
        return [self._documents[i] for i in sorted(found)]

    def close(self) -> None:
        """Close the connection; the documents stay."""
        self._redis.close()

    def _search(self, vector: bytes, k: int) -> list[int]:
        if self._searched_here is not None:
            scores = similarities(vector, self._searched_here)
            return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        reply = self._redis.execute_command(
            "FT.SEARCH", self._index, f"*=>[KNN {k} @vec $v]", "PARAMS", 2, "v", vector, "NOCONTENT", "DIALECT", 2,
            "LIMIT", 0, k,
        )  # fmt: skip
        return [int(name.rpartition(b":")[2]) for name in reply[1:]]


def _passages(text: str) -> Iterable[str]:
    """Cut a text into passages, at paragraphs where possible, so that three fit into a small model's window."""
    passage = ""
    for paragraph in text.split("\n\n"):
        for piece in textwrap.wrap(paragraph.strip(), _PASSAGE_CHARS, replace_whitespace=False):
            if passage and len(passage) + len(piece) > _PASSAGE_CHARS:
                yield passage
                passage = ""
            passage = f"{passage}\n{piece}".strip()
    if passage:
        yield passage
