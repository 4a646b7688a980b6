"""How many paraphrases does a RAG application's cache answer, around the model call and around the whole pipeline?

The graph is the unmodified one of examples/rag_graph.py, with k = 4 over some hundred docstrings of the standard
library, found by the small embedding model. 60 questions are asked, each again as it is, as a paraphrase, and in the
shape of a near question that has another answer. Run: python benchmarks/rag_paraphrases.py [--write]
"""

import argparse
import asyncio
import importlib
import importlib.util
import inspect
import math
import re
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from langchain_core.documents import Document

from langchain_aegis import AegisSemanticCache, ChatAegis, aegis_scope, was_cached
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.testing import ScriptedOllama

ROOT = Path(__file__).parents[1]
K = 4
MODULES = (
    "base64 bisect calendar collections contextlib copy csv difflib functools glob hashlib heapq html itertools json "
    "math os os.path queue random re secrets shutil socket statistics string subprocess tempfile textwrap threading "
    "time urllib.parse uuid zipfile zlib"
)
TYPES = (str, list, dict, set, bytes, int, float)

# A question, a paraphrase, and a near question with another answer.
ASKED = [
    ("How do I get the size of a file?", "How can I find out how big a file is?",
     "How do I get the size of a directory?"),
    ("How do I delete a file?", "How can I remove a file?", "How do I delete a directory?"),
    ("How do I rename a file?", "How can I change the name of a file?", "How do I copy a file?"),
    ("How do I get the current working directory?", "How can I find out the current working directory?",
     "How do I change the current working directory?"),
    ("How do I check whether a path exists?", "How can I test if a path exists?",
     "How do I check whether a path is a file?"),
    ("How do I join two paths?", "How can I combine two paths?", "How do I split a path?"),
    ("How do I copy a directory tree?", "How can I copy a whole directory tree?", "How do I delete a directory tree?"),
    ("How do I move a file?", "How can I move a file to another place?", "How do I copy a file with its metadata?"),
    ("How do I create a temporary file?", "How can I make a temporary file?", "How do I create a temporary directory?"),
    ("How do I get the value of an environment variable?", "How can I read an environment variable?",
     "How do I delete an environment variable?"),
    ("How do I get the process id?", "How can I find out the id of my process?",
     "How do I get the parent's process id?"),
    ("How many CPUs does the system have?", "What is the number of CPUs in the system?",
     "How many threads does the system have?"),
    ("How do I list the files in a directory?", "How can I see which files are in a directory?",
     "How do I list the open files of a process?"),
    ("How do I change the owner of a file?", "How can I set another owner for a file?",
     "How do I change the permissions of a file?"),
    ("How do I wait for a child process?", "How can I wait until a child process has ended?",
     "How do I kill a child process?"),
    ("How do I convert a string to upper case?", "How can I make a string upper case?",
     "How do I convert a string to lower case?"),
    ("How do I split a string?", "How can I divide a string into parts?", "How do I join strings?"),
    ("How do I remove whitespace from the end of a string?", "How can I strip trailing whitespace from a string?",
     "How do I remove whitespace from the start of a string?"),
    ("How do I replace a substring?", "How can I substitute a part of a string?", "How do I find a substring?"),
    ("How do I check whether a string starts with a prefix?", "How can I test if a string begins with a prefix?",
     "How do I check whether a string ends with a suffix?"),
    ("How do I centre a string?", "How can I centre a text in a given width?", "How do I pad a string with zeros?"),
    ("How do I encode a string?", "How can I turn a string into bytes?", "How do I decode bytes?"),
    ("How do I append an item to a list?", "How can I add an item at the end of a list?",
     "How do I insert an item at the start of a list?"),
    ("How do I sort a list in place?", "How can I put a list in order in place?", "How do I reverse a list in place?"),
    ("How do I count how often a value is in a list?", "How can I find the number of occurrences of a value in a list?",
     "How do I find the index of a value in a list?"),
    ("How do I remove all items from a dictionary?", "How can I empty a dictionary?",
     "How do I remove one item from a dictionary?"),
    ("How do I get the union of two sets?", "How can I build the union of two sets?",
     "How do I get the intersection of two sets?"),
    ("How do I compute the median?", "How can I calculate the median of some data?", "How do I compute the mean?"),
    ("How do I compute the standard deviation?", "How can I calculate the standard deviation of a sample?",
     "How do I compute the variance?"),
    ("How do I compute the square root of a number?", "How can I calculate a square root?",
     "How do I compute the cube root of a number?"),
    ("How do I convert degrees to radians?", "How can I turn an angle in degrees into radians?",
     "How do I convert radians to degrees?"),
    ("How do I compute the greatest common divisor?", "How can I find the greatest common divisor of two numbers?",
     "How do I compute the least common multiple?"),
    ("How do I compute the factorial of a number?", "How can I calculate a factorial?",
     "How do I compute the logarithm of a number?"),
    ("How do I check whether a float is infinite?", "How can I test if a float is infinity?",
     "How do I check whether a float is not a number?"),
    ("How do I choose a random element of a list?", "How can I pick a random item from a list?",
     "How do I delete a random element of a list?"),
    ("How do I shuffle a list?", "How can I bring a list into random order?", "How do I sort a list?"),
    ("How do I get a random number between 0 and 1?", "How can I draw a random float in [0, 1)?",
     "How do I get a random number between 0 and 100?"),
    ("How do I generate a secure random token?", "How can I create a random token that is secure?",
     "How do I compare two tokens securely?"),
    ("How do I get all permutations of a list?", "How can I list every permutation of some items?",
     "How do I get all combinations of a list?"),
    ("How do I repeat an element forever?", "How can I yield the same object again and again?",
     "How do I cycle through elements forever?"),
    ("How do I group consecutive elements by a key?", "How can I put neighbouring elements with the same key together?",
     "How do I sort elements by a key?"),
    ("How do I find the n largest elements?", "How can I get the n biggest elements of a data set?",
     "How do I find the n smallest elements?"),
    ("How do I insert into a sorted list?", "How can I add an item to a sorted list and keep it sorted?",
     "How do I search in a sorted list?"),
    ("How do I make a deep copy of an object?", "How can I copy an object deeply?",
     "How do I make a shallow copy of an object?"),
    ("How do I cache the results of a function?", "How can I memoize a function?",
     "How do I clear the cached results of a function?"),
    ("How do I parse a JSON string?", "How can I read a JSON document from a string?", "How do I write a JSON string?"),
    ("How do I find out whether a year is a leap year?", "How can I check if a year is a leap year?",
     "How do I find out which weekday a date is?"),
    ("How do I suspend execution for some seconds?", "How can I sleep for a number of seconds?",
     "How do I measure the time that execution takes?"),
    ("How do I format a time as a string?", "How can I turn a time into a formatted string?",
     "How do I parse a time from a string?"),
    ("How do I wrap a paragraph of text?", "How can I break a paragraph into lines of a given width?",
     "How do I remove the indentation of a text?"),
    ("How do I shorten a text to a given width?", "How can I truncate a text so that it fits a width?",
     "How do I indent a text?"),
    ("How do I split a URL into its components?", "How can I parse a URL into its parts?",
     "How do I join a base URL with a relative URL?"),
    ("How do I escape HTML?", "How can I convert special characters to HTML-safe sequences?",
     "How do I unescape HTML?"),
    ("How do I encode bytes with Base64?", "How can I turn bytes into Base64?", "How do I decode Base64?"),
    ("How do I compile a regular expression?", "How can I precompile a regular expression pattern?",
     "How do I escape special characters in a regular expression?"),
    ("How do I find all matches of a regular expression?", "How can I get every match of a pattern in a string?",
     "How do I replace all matches of a regular expression?"),
    ("How do I run a command in a subshell?", "How can I execute a shell command?",
     "How do I get the output of a shell command?"),
    ("How do I get the current thread?", "How can I find out which thread is running?",
     "How do I get the number of running threads?"),
    ("How do I find files that match a pattern?", "How can I list the paths that match a wildcard pattern?",
     "How do I escape the special characters of a file pattern?"),
    ("How do I get the name of the host?", "How can I find out the current host name?",
     "How do I get the address of a host name?"),
]  # fmt: skip


def documents() -> list[Document]:
    """Return the first paragraph of each short docstring; its source is the full name of what it describes."""
    places = [(name, importlib.import_module(name)) for name in MODULES.split()] + [
        (kind.__name__, kind) for kind in TYPES
    ]
    found = {}
    for place, holder in places:
        for name, thing in sorted(vars(holder).items()):
            if name.startswith("_") or not callable(thing):
                continue
            paragraphs = (inspect.getdoc(thing) or "").split("\n\n")
            text = " ".join(paragraphs[0].split())
            if 30 <= len(text) <= 300 and text not in found:
                found[text] = Document(f"{place}.{name}: {text}", metadata={"source": f"{place}.{name}"})
    return list(found.values())


class Retrieval:
    """Finds the K nearest documents; what was found for each question is kept in `found`."""

    def __init__(self, embeddings: MiniLMEmbeddings, kept: list[Document]) -> None:
        self._embeddings, self._documents = embeddings, kept
        self._matrix = np.array(embeddings.embed_documents([document.page_content for document in kept]))
        self.found: dict[str, list[Document]] = {}

    async def __call__(self, question: str) -> list[Document]:
        if question not in self.found:
            vector = np.array(await self._embeddings.aembed_query(question))
            nearest = np.argsort(-(self._matrix @ vector), kind="stable")[:K]
            self.found[question] = [self._documents[i] for i in nearest]
        return self.found[question]

    def same(self, *, ordered: bool) -> int:
        """Return for how many paraphrases the same documents were found as for their questions."""
        form = list if ordered else frozenset
        names = {q: form(d.metadata["source"] for d in found) for q, found in self.found.items()}
        return sum(names[question] == names[paraphrase] for question, paraphrase, _ in ASKED)


@dataclass
class Result:
    """Of one way to cache: how many of the three kinds of later questions were answered from the cache."""

    name: str
    repeats: int
    paraphrases: int
    wrong: int  # paraphrases and near questions that got the answer to another question

    def row(self) -> str:
        n = len(ASKED)
        low, high = interval(self.paraphrases, n)
        rate = f"{self.paraphrases} of {n} ({100 * self.paraphrases / n:.0f} %, 95 %: {100 * low:.0f}-{100 * high:.0f})"
        return f"| {self.name} | {self.repeats} of {n} | {rate} | {self.wrong} of {2 * n} |"


def interval(hits: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z = 1.96
    share, middle = hits / n, z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + middle - half) / (1 + z * z / n), (share + middle + half) / (1 + z * z / n)


async def measure(name, ask) -> Result:
    """Ask everything of `ask(question) -> (text, whether it came from the cache)`; no two made answers are the same."""
    answers = {}  # text -> which question it was made for, or for the near question of which one

    async def asked(question, number, kind):
        text, cached = await ask(question)
        if not cached:
            answers[text] = number, kind
        return cached, answers[text] == (number, kind)

    wrong = sum([(await asked(question, number, "question"))[0] for number, (question, _, _) in enumerate(ASKED)])
    repeats = paraphrases = 0
    for number, (question, paraphrase, near) in enumerate(ASKED):
        repeats += all(await asked(question, number, "question"))
        cached, right = await asked(paraphrase, number, "question")
        paraphrases += cached and right
        wrong += cached and not right
        wrong += (await asked(near, number, "near"))[0]
    return Result(name, repeats, paraphrases, wrong)


def load_graph():
    spec = importlib.util.spec_from_file_location("rag_graph", ROOT / "examples" / "rag_graph.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chunk_spans(text: str) -> list[tuple[int, int]]:
    """Return where the documents stand in the example's prompt: its lines between "Context:" and "Question:"."""
    start, end = text.index("Context:\n") + len("Context:\n"), text.index("\n\nQuestion:")
    return [(start + line.start(), start + line.end()) for line in re.finditer(r"[^\n]+", text[start:end])]


async def run(told) -> str:
    begun = time.perf_counter()
    embeddings = MiniLMEmbeddings()
    kept = documents()
    retrieve = Retrieval(embeddings, kept)
    for triple in ASKED:
        for question in triple:
            await retrieve(question)
    results = []
    with EmbeddedRedis(shared=False) as redis, ScriptedOllama() as server:

        def cache(**options):
            namespace = f"bench-{uuid.uuid4().hex[:8]}"
            return AegisSemanticCache(
                redis.url, embeddings, namespace=namespace, mode=told.mode, op_budget_s=5, embed_budget_s=30, **options
            )

        def graph(**options):
            # At this temperature every answer that the model makes is another one.
            model = ChatAegis("scripted", base_url=server.base_url, temperature=0.8, **options)
            return load_graph().build_graph(model, retrieve)

        async def around_the_model(name, **options):
            async with cache(**options) as used:
                nodes = graph(cache=used)

                async def ask(question):
                    answer = (await nodes.ainvoke({"question": question}))["answer"]
                    return answer.text, was_cached(answer) is not None

                results.append(await measure(name, ask))

        await around_the_model("unmodified nodes, cache of the model call")
        if "chunks" in inspect.signature(AegisSemanticCache).parameters:
            await around_the_model("the same, `chunks=` compared as a set", chunks=chunk_spans)

        async with cache() as used:
            nodes = graph()

            async def ask(question):
                made = []

                async def generate():
                    made.append(await nodes.ainvoke({"question": question}))
                    return made[0]["answer"].text

                with aegis_scope(tenant="bench"):
                    text = await used.aget_or_generate(question, generate, pipeline="rag")
                return text, not made

            results.append(await measure("`get_or_generate` before retrieval", ask))

    n, python = len(ASKED), f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = [
        "| | Exact repeats that hit | Paraphrases that hit | Wrong answers |",
        "|---|---|---|---|",
        *(result.row() for result in results),
        "",
        textwrap.fill(
            f"{n} questions over {len(kept)} docstrings of the standard library (Python {python}), MiniLM, k = {K}, "
            f"mode `{told.mode}`. A paraphrase fetched the same documents in the same order "
            f"{retrieve.same(ordered=True)} times of {n}, in any order {retrieve.same(ordered=False)} times. Wrong "
            f"answers are counted over the {n} paraphrases and {n} near questions with another answer (delete a file, "
            "delete a directory).",
            width=120,
        ),
    ]
    print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=["strict", "balanced", "lenient"], default="balanced")
    parser.add_argument("--write", action="store_true", help="put the table into docs/cache.md")
    told = parser.parse_args()
    table = asyncio.run(run(told))
    print(table)
    if told.write:
        page = ROOT / "docs" / "cache.md"
        before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- rag -->")
        _, end, after = rest.partition("<!-- /rag -->")
        assert mark and end, "docs/cache.md has no place for the table"
        page.write_text(f"{before}{mark}\n\n{table}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
