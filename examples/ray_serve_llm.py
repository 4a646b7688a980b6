"""Several replicas of vLLM behind Ray Serve, and the application in front; type-checked here, run where GPUs are."""

# pip install 'ray[llm]' 'langchain-aegis[openai]'
# python ray_serve_llm.py serve                      on the cluster, until Ctrl-C
# python ray_serve_llm.py ask http://head:8000/v1    where the application runs

import asyncio
import sys

from langchain_openai import ChatOpenAI
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from langchain_aegis import AegisSemanticCache, BatchingChatModel, was_cached

MODEL, REPLICAS, MAX_NUM_SEQS = "qwen3-8b", 4, 128


def deployment() -> serve.Application:
    config = LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": "Qwen/Qwen3-8B"},
        engine_kwargs={"max_num_seqs": MAX_NUM_SEQS, "max_model_len": 32768},
        deployment_config={
            "num_replicas": REPLICAS,
            "max_ongoing_requests": MAX_NUM_SEQS,  # of a replica; what is more waits in front of all of them
            # Calls that begin alike go to one replica, which has read their beginning before.
            "request_router_config": {"request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter"},
        },
        accelerator_type="L4",
    )
    return build_openai_app({"llm_configs": [config]})


def model(base_url: str) -> BatchingChatModel:
    # One address is one server: all replicas together are its slots. Ray tells neither number, so it is said here.
    inner = ChatOpenAI(model=MODEL, base_url=base_url, api_key=lambda: "none", temperature=0, max_retries=0)
    return BatchingChatModel(inner, max_concurrency=REPLICAS * MAX_NUM_SEQS, cache=AegisSemanticCache())


async def ask(base_url: str) -> None:
    chat = model(base_url)
    for question in ("What is the notice period?", "What is the notice period?"):
        answer = await chat.ainvoke(f"Context:\nThe notice period is 3 months.\n\nQuestion: {question}")
        print(f"{'from the cache' if was_cached(answer) else 'from a replica'}: {answer.text}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve.run(deployment(), blocking=True)
    else:
        asyncio.run(ask(sys.argv[2]))
