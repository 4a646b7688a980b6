"""Two tenants ask the same question of the same model; neither ever reads the other's answer."""

from langchain_core.globals import set_llm_cache

from langchain_aegis import AegisSemanticCache, ChatAegis, aegis_scope, was_cached
from langchain_aegis.embedded import EmbeddedRedis, MiniLMEmbeddings
from langchain_aegis.testing import ScriptedOllama


def ask(model: ChatAegis, tenant: str) -> None:
    # A web application opens the scope once per request, around everything that it does for it.
    with aegis_scope(tenant=tenant):
        answer = model.invoke("What is the notice period of our contract?")
    print(f"  {tenant:7} {'from the cache' if was_cached(answer) else 'from the model'}")


def main() -> None:
    embeddings = MiniLMEmbeddings()
    embeddings.embed_query("Loads the model now, not during the first question.")
    with EmbeddedRedis(shared=False) as redis, ScriptedOllama() as server:
        cache = AegisSemanticCache(redis.url, embeddings, require_tenant=True)
        set_llm_cache(cache)
        model = ChatAegis("scripted", base_url=server.base_url, temperature=0)

        print("Each tenant fills a cache of its own:")
        for tenant in ("acme", "globex", "acme", "globex"):
            ask(model, tenant)

        print("A call that names no tenant bypasses the cache, with one warning:")
        answer = model.invoke("What is the notice period of our contract?")
        print(f"  nobody  {'from the cache' if was_cached(answer) else 'from the model'}")

        print(f"invalidate(tenant='acme') removes {cache.invalidate(tenant='acme')} answer, and nothing of globex:")
        for tenant in ("acme", "globex"):
            ask(model, tenant)
        set_llm_cache(None)
        cache.close()


if __name__ == "__main__":
    main()
