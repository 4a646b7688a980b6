"""What the benchmarks of the cache ask: questions, paraphrases, answers that tell whose they are, and vectors.

Everything is drawn by a seed. A question differs from every other one in at least one slot, and its paraphrases fill
the same slots, so the right answer to any text is known: the question's own, or none.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
from langchain_core.embeddings import Embeddings
from langchain_core.load import dumps
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration

VERBS = (
    "archive", "audit", "compress", "duplicate", "encrypt", "export", "filter", "import", "lock", "merge", "migrate",
    "preview", "print", "publish", "rename", "restore", "schedule", "share", "sign", "sort", "split", "tag",
    "translate", "validate",
)  # fmt: skip
THINGS = (
    "backup", "branch", "calendar", "certificate", "comment", "contract", "dashboard", "dataset", "folder", "image",
    "invoice", "label", "notebook", "password", "pipeline", "playlist", "policy", "receipt", "report", "snapshot",
    "spreadsheet", "survey", "template", "ticket", "webhook",
)  # fmt: skip
PLACES = (
    "Airtable", "Docker", "Dropbox", "Excel", "Figma", "GitLab", "Grafana", "Jira", "Kafka", "Kubernetes", "Notion",
    "Okta", "Outlook", "Postgres", "Salesforce", "Shopify", "Slack", "Stripe", "Tableau", "Terraform", "Trello",
    "WordPress", "Zendesk", "Zoom",
)  # fmt: skip
WITH = (
    "audit log", "billing plan", "dark theme", "guest access", "proxy server", "rate limit", "read only mode",
    "retention period", "team calendar", "time zone", "two factor login", "weekly digest",
)  # fmt: skip
# A stored wording, then paraphrases. A text that was answered by meaning is not answered so again, so each is asked
# once, and there are several.
WORDINGS = (
    ("How do I {v} a {t} in {p} with the {w}?",
     "How can I {v} a {t} in {p} with the {w}?",
     "How could I {v} a {t} in {p} with the {w}?",
     "How does one {v} a {t} in {p} with the {w}?",
     "Please tell me how I can {v} a {t} in {p} with the {w}."),
    ("What is the best way to {v} a {t} in {p} with the {w}?",
     "What's the best way to {v} a {t} in {p} with the {w}?",
     "Which is the best way to {v} a {t} in {p} with the {w}?",
     "What would be the best way to {v} a {t} in {p} with the {w}?",
     "In {p}, what's the best way to {v} a {t} with the {w}?"),
)  # fmt: skip
PARAPHRASES = len(WORDINGS[0]) - 1
SYSTEM = (
    "You are the assistant of a software company's support desk. Answer in one short paragraph, in plain English, for "
    "readers who use these tools every day but do not administer them. Name the menu in which a setting is found, say "
    "which rights are needed to change it, and warn before any step that cannot be undone. If several products are "
    "mentioned, answer for the one that is asked about. Do not invent settings; where you are not sure, say so and "
    "point to the manual. Never ask for passwords or other secrets, and never repeat one that you were told."
)
ANSWER_BYTES = 1024
KNOWN = 20_000  # items that can be asked for; of more entries, the others are only there, to be searched among
_SPREAD = 0.25  # length of what a paraphrase's vector is moved by: a cosine of 0.97
_TOPICS = 256


@dataclass(frozen=True, slots=True)
class Item:
    """One question: its number, its wordings, and the answer that only it may get."""

    number: int
    question: str
    paraphrases: tuple[str, ...]
    answer: str


class Workload:
    """Items 0, 1, 2, ... of a seed.

    Args:
        seed: Draws everything.
        answer_bytes: Length of each answer.
    """

    def __init__(self, seed: int, answer_bytes: int = ANSWER_BYTES) -> None:
        self.seed, self.answer_bytes = seed, answer_bytes
        self._sizes = (len(WORDINGS), len(WITH), len(PLACES), len(THINGS), len(VERBS))
        self.total = int(numpy.prod(self._sizes))
        drawn = random.Random(seed)
        # A step without a common divisor visits every combination once, without a list of all.
        self._start = drawn.randrange(self.total)
        self._step = next(s for s in iter(lambda: drawn.randrange(self.total), None) if numpy.gcd(s, self.total) == 1)
        self._filler = " ".join(drawn.choices(VERBS + THINGS + PLACES, k=answer_bytes // 4 + 200))

    def item(self, number: int) -> Item:
        """Return an item; numbers beyond `total` have names of their own in the slots."""
        turn, within = divmod(number, self.total)
        code, slots = (self._start + within * self._step) % self.total, []
        for size in self._sizes:
            code, at = divmod(code, size)
            slots.append(at)
        thing = THINGS[slots[3]] + (f" {_name(turn)}" if turn else "")
        told = {"v": VERBS[slots[4]], "t": thing, "p": PLACES[slots[2]], "w": WITH[slots[1]]}
        question, *paraphrases = (wording.format(**told) for wording in WORDINGS[slots[0]])
        head = f"[{number}] To {told['v']} a {thing} in {told['p']}: "
        at = number * 7 % 200
        return Item(number, question, tuple(paraphrases), (head + self._filler[at:])[: self.answer_bytes])

    def items(self, start: int, stop: int) -> list[Item]:
        """Return a range of items."""
        return [self.item(number) for number in range(start, stop)]


def _name(turn: int) -> str:
    letters = "bcdfghjklmnprstvwz"
    return "".join(letters[turn // 18**i % 18] + "aeiou"[i % 5] for i in range(4)).capitalize()


class Prompts:
    """Prompts as `llm.invoke` hands them to a cache: a system message of about 700 bytes, and a question."""

    @cached_property
    def _parts(self) -> list[str]:
        mark = "WHERE-THE-QUESTION-STANDS"
        return dumps([SystemMessage(SYSTEM), HumanMessage(mark)]).split(mark)

    def prompt(self, question: str) -> str:
        """Return the prompt of a question, without the time that `dumps` takes."""
        before, after = self._parts
        return before + json.dumps(question)[1:-1] + after

    def question(self, prompt: str) -> str:
        """Return the question of a prompt."""
        before, after = self._parts
        if prompt.startswith(before) and prompt.endswith(after):
            return str(json.loads(f'"{prompt[len(before) : -len(after)]}"'))
        return prompt


PROMPTS = Prompts()


def messages(question: str) -> list[SystemMessage | HumanMessage]:
    """Return the messages of a prompt."""
    return [SystemMessage(SYSTEM), HumanMessage(question)]


def generations(item: Item) -> list[ChatGeneration]:
    """Return an item's answer as a chat model returns it."""
    usage = {"input_tokens": 180, "output_tokens": len(item.answer) // 5, "total_tokens": 180 + len(item.answer) // 5}
    told = {"model_name": "bench", "finish_reason": "stop"}
    return [ChatGeneration(message=AIMessage(item.answer, response_metadata=told, usage_metadata=usage))]


class Vectors(Embeddings):
    """An embedder that costs as good as nothing: what is measured is then the cache.

    Vectors stand around a few hundred topics, as texts do; a question's paraphrases are at a cosine of about 0.97 of
    it, and no other question is above 0.8. What is timed is prepared, so that embedding it is one look into a dict.

    Args:
        workload: Whose texts it embeds.
        dimensions: Of its vectors.
    """

    model = "bench-vectors"

    def __init__(self, workload: Workload, dimensions: int = 384) -> None:
        self.workload, self.dimensions = workload, dimensions
        self._topics = numpy.random.default_rng(workload.seed).standard_normal((_TOPICS, dimensions), numpy.float32)
        self._ready: dict[str, list[float]] = {}

    def vector(self, number: int, paraphrase: int | None = None) -> numpy.ndarray:
        """Return the vector of a question, or of one of its paraphrases, of length 1."""
        drawn = numpy.random.default_rng((self.workload.seed, number))
        own = self._topics[drawn.integers(_TOPICS)] + drawn.standard_normal(self.dimensions, numpy.float32)
        own /= numpy.linalg.norm(own)
        if paraphrase is not None:
            moved = numpy.random.default_rng((self.workload.seed, number, paraphrase)).standard_normal(self.dimensions)
            own = own + _SPREAD * moved.astype(numpy.float32) / numpy.linalg.norm(moved)
            own /= numpy.linalg.norm(own)
        return own

    def around(self, drawn: numpy.random.Generator, many: int) -> numpy.ndarray:
        """Return vectors of no question, around the same topics, of length 1, shape `(many, dimensions)`."""
        own = self._topics[drawn.integers(_TOPICS, size=many)]
        own = own + drawn.standard_normal((many, self.dimensions), numpy.float32)
        return own / numpy.linalg.norm(own, axis=1, keepdims=True)

    def prepare(self, items: Sequence[Item], *, paraphrases: bool = False) -> None:
        """Make the vectors of what is embedded next, and forget all others.

        Args:
            items: Whose questions are embedded, alone or within their prompts: a cache that does not look for the
                question embeds all of the prompt.
            paraphrases: Whether their paraphrases are embedded, too.
        """
        self._ready = {}
        for item in items:
            for at, text in enumerate((item.question, *item.paraphrases) if paraphrases else (item.question,)):
                vector = self.vector(item.number, at - 1 if at else None).tolist()
                self._ready[text] = self._ready[PROMPTS.prompt(text)] = vector

    def embed_query(self, text: str) -> list[float]:
        """Return a prepared vector; of any other text one that is near nothing."""
        return self._ready.get(text) or [1.0] + [0.0] * (self.dimensions - 1)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    async def aembed_query(self, text: str) -> list[float]:
        return self.embed_query(text)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.embed_documents(texts)
