"""Two hundred callers at once, four slots: some wait, some share an answer, the rest is refused at once."""

import asyncio
from collections import Counter

from langchain_aegis import AegisOverloadedError, BatchingChatModel, ChatAegis
from langchain_aegis.testing import ScriptedOllama

SAME = ["What happened to the network?"] * 60
DIFFERENT = [f"Summarise ticket {number}." for number in range(140)]


async def main() -> None:
    with ScriptedOllama(slots=4, tokens_per_s=500) as server:
        model = BatchingChatModel(
            ChatAegis("scripted", base_url=server.base_url, temperature=0), max_concurrency=4, max_waiting=100
        )
        await model.ainvoke("How long does an answer take?")  # from then on a refusal can say when to come back
        server.forget()
        outcomes: Counter[str] = Counter()
        retry_after_s: list[float] = []

        async def caller(question: str) -> None:
            try:
                await model.ainvoke(question)
                outcomes["answered"] += 1
            except AegisOverloadedError as refusal:  # what a web service turns into 503 and Retry-After
                retry_after_s.append(refusal.retry_after_s)
                outcomes["refused"] += 1

        await asyncio.gather(*(caller(question) for question in SAME + DIFFERENT))
        asked = len(server.chats)
        print(f"{len(SAME + DIFFERENT)} callers: {outcomes['answered']} answered, {outcomes['refused']} refused")
        print(f"the model was asked {asked} times: {outcomes['answered'] - asked} callers shared an answer")
        print(f"at most {server.counters.max_running} generations ran at the same time")
        print(f"the refused ones were told to come back after {max(retry_after_s):.1f} s")

        # A batch is patient: nobody waits at a keyboard, so nothing of it is refused.
        answers = await model.abatch(list(DIFFERENT))
        print(f"the {len(DIFFERENT)} tickets as one batch: {len(answers)} answered")


if __name__ == "__main__":
    asyncio.run(main())
