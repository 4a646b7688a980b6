"""A cache around a whole RAG pipeline: asked before retrieval, and emptied of what rests on a document that changed."""

from langchain_aegis import AegisSemanticCache, Answer, ChatAegis
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.testing import ScriptedOllama

DOCUMENTS = {
    "loans.md": "A borrowed book may be kept for 28 days. It can be extended twice.",
    "fees.md": "The fine for a late book is 20 cents a day. The reader card costs 12 euros a year.",
}


class Library:
    """Retrieval, prompt and model, as an application has them."""

    def __init__(self, model: ChatAegis) -> None:
        self.model = model
        self.retrieved = 0

    def answer(self, question: str) -> Answer:
        self.retrieved += 1
        words = set(question.lower().strip("?").split())
        source = max(DOCUMENTS, key=lambda name: len(words & set(DOCUMENTS[name].lower().split())))
        prompt = f"Context:\n{DOCUMENTS[source]}\n\nQuestion: {question}\n\nAnswer:"
        return Answer(self.model.invoke(prompt).text, sources=[source])  # what the answer rests on


def main() -> None:
    embeddings = MiniLMEmbeddings()
    embeddings.embed_query("Loads the model now, not during the first question.")
    with EmbeddedRedis(shared=False) as redis, ScriptedOllama() as server:
        cache = AegisSemanticCache(redis.url, embeddings)
        library = Library(ChatAegis("scripted", base_url=server.base_url, temperature=0))

        def ask(question: str) -> None:
            before = library.retrieved
            # Change the version with the prompt or the index: versions never share answers.
            cache.get_or_generate(question, lambda: library.answer(question), pipeline="library", version="1")
            made = library.retrieved > before
            print(f"  {'retrieved and asked the model' if made else 'from the cache':29} | {question}")

        print("The first two are questions of their own, the others are not:")
        ask("How long may I keep a borrowed book?")
        ask("What is the fine for a late book?")
        ask("How long can I keep a borrowed book?")  # other words would fetch other documents, too
        ask("What's the fine for a late book?")

        DOCUMENTS["loans.md"] = "A borrowed book may be kept for 14 days."
        print(
            f"loans.md has changed: {cache.invalidate(sources=['loans.md'])} answer rests on it, and is not served now:"
        )
        ask("How long can I keep a borrowed book?")
        ask("What is the fine for a late book?")
        print(f"6 questions, {len(server.chats)} asked of the model")
        cache.close()


if __name__ == "__main__":
    main()
