"""A stream of questions, and the caches that it is put to: ours on a real Redis, and plain cosine.

Each factory returns an object with `lookup(text) -> answer | None`, `store(text, answer)` and `close()`. Embeddings are
MiniLM's; REPLAY_VECTORS=file keeps them for the next run.
"""

import base64
import os
import random
import uuid
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from langchain_core.embeddings import Embeddings
from langchain_core.outputs import Generation

from langchain_aegis import AegisSemanticCache
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings

LLM = "[('model', 'replay')]"  # what LangChain says about the model: the same for every question


def replay(pairs, factory, *, queries=4000, seed=7):
    """Put a stream of exact repeats, paraphrases and near misses to a cache; return counts, and the wrong answers.

    Topics are drawn, some more popular than others, and then a wording of the topic. A miss stores the topic's answer;
    a hit is right if it is the same topic's. Texts mean the same only if labels say so, directly or in a chain: what
    nobody labelled counts as wrong.

    Returns:
        Counts: "repeat" of texts that were asked before, "new" of those that were not, each with "_right" and "_wrong"
        answers from the cache; "possible" of new texts whose topic was already answered; "labelled" of wrong answers
        that a label calls a trap. And (text that was answered, text that was asked) of each wrong answer by meaning.
    """
    topics = _topics(pairs)
    traps = {frozenset((pair.cached, pair.new)) for pair in pairs if not pair.duplicate}
    draw = random.Random(seed)
    draw.shuffle(topics)
    weights = [len(texts) / (at + 200) for at, texts in enumerate(topics)]
    chosen = draw.choices(range(len(topics)), weights, k=queries)
    stream = [(draw.choice(topics[topic]), topic) for topic in chosen]
    counts, wrong, seen, answered, stored, cache = Counter(), [], set(), set(), {}, factory()
    try:
        for text, topic in stream:
            kind = "repeat" if text in seen else "new"
            counts[kind] += 1
            counts["possible"] += kind == "new" and topic in answered
            seen.add(text)
            answer = cache.lookup(text)
            if answer is None:
                answer = f"answer {len(stored)}"
                stored[answer] = topic, text
                answered.add(topic)
                cache.store(text, answer)
                continue
            right = stored[answer][0] == topic
            counts[f"{kind}_{'right' if right else 'wrong'}"] += 1
            if kind == "new" and not right:
                wrong.append((stored[answer][1], text))
                counts["labelled"] += frozenset(wrong[-1]) in traps
    finally:
        cache.close()
    return counts, wrong


def _topics(pairs):
    """Return the texts that mean the same, in groups."""
    parent = {text: text for pair in pairs for text in (pair.cached, pair.new)}

    def root(text):
        while parent[text] != text:
            text = parent[text]
        return text

    for pair in pairs:
        if pair.duplicate:
            parent[root(pair.cached)] = root(pair.new)
    groups = defaultdict(list)
    for text in sorted(parent):
        groups[root(text)].append(text)
    return [groups[name] for name in sorted(groups)]


class Remembered(Embeddings):
    """An embedder that is asked for each text once."""

    def __init__(self, inner, path=None):
        self.inner, self.model, self.path, self.known = inner, inner.model, path and Path(path), {}
        if self.path and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                text, vector = line.rsplit("\t", 1)
                self.known[text.encode().decode("unicode_escape")] = np.frombuffer(base64.b64decode(vector), "<f4")

    def embed_documents(self, texts):
        new = list(dict.fromkeys(text for text in texts if text not in self.known))
        for start in range(0, len(new), 256):
            batch = new[start : start + 256]
            made = [np.asarray(v, "<f4") for v in self.inner.embed_documents(batch)]
            self.known.update(zip(batch, made, strict=True))
            if self.path:
                with self.path.open("a", encoding="utf-8") as file:
                    for text, vector in zip(batch, made, strict=True):
                        escaped = text.encode("unicode_escape").decode()
                        file.write(f"{escaped}\t{base64.b64encode(vector.tobytes()).decode()}\n")
        return [self.known[text].tolist() for text in texts]

    def embed_query(self, text):
        return self.embed_documents([text])[0]


_minilm = None


def remember(path):
    """Keep what the small model embeds in a file, or with None in memory only."""
    global _minilm
    _minilm = Remembered(MiniLMEmbeddings(), path)


def minilm():
    """Return the small model, with one memory for all caches of the process."""
    if _minilm is None:
        remember(os.environ.get("REPLAY_VECTORS"))
    return _minilm


def prepare(texts):
    """Embed everything in batches before anything is timed."""
    minilm().embed_documents(list(texts))


class Plain:
    """Exact repeats, then the nearest question if its cosine reaches the threshold; in memory."""

    def __init__(self, threshold=0.92):
        self.threshold, self.answers, self.texts, self.rows = threshold, {}, [], []

    def lookup(self, text):
        if text in self.answers:
            return self.answers[text]
        if not self.rows:
            return None
        cosines = np.stack(self.rows) @ _unit(text)
        nearest = int(cosines.argmax())
        return self.answers[self.texts[nearest]] if cosines[nearest] >= self.threshold else None

    def store(self, text, answer):
        self.answers[text] = answer
        self.texts.append(text)
        self.rows.append(_unit(text))

    def close(self):
        pass


class Aegis:
    """AegisSemanticCache as LangChain calls it, on a Redis of its own."""

    def __init__(self, **options):
        self.redis = EmbeddedRedis(shared=False)
        self.redis.__enter__()
        self.cache = AegisSemanticCache(
            self.redis.url, minilm(), namespace=f"replay-{uuid.uuid4().hex[:8]}", op_budget_s=10, embed_budget_s=60,
            **options,
        )  # fmt: skip

    def lookup(self, text):
        found = self.cache.lookup(text, LLM)
        return None if found is None else found[0].text

    def store(self, text, answer):
        self.cache.update(text, LLM, [Generation(text=answer)])

    def close(self):
        self.stats = self.cache.stats()
        self.cache.close()
        self.redis.__exit__(None, None, None)


def plain():
    """Plain cosine 0.92."""
    return Plain()


def aegis():
    """Our cache, balanced; REPLAY_MIN_SIMILARITY sets another threshold."""
    told = os.environ.get("REPLAY_MIN_SIMILARITY")
    return Aegis(min_similarity=float(told)) if told else Aegis()


def aegis_strict():
    """Our cache, strict."""
    return Aegis(mode="strict")


def aegis_lenient():
    """Our cache, lenient."""
    return Aegis(mode="lenient")


def _unit(text):
    vector = np.asarray(minilm().embed_query(text), np.float32)
    return vector / np.linalg.norm(vector)
