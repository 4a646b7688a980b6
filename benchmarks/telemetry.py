"""What does it cost to count a chat call? CPU of the calling thread, medians and ranges of interleaved rounds.

Run: python benchmarks/telemetry.py
"""

import statistics
import time

from langchain_aegis.telemetry import counted, counted_stream

ROUNDS, CALLS, STREAMS, PARTS = 15, 5_000, 100, 500
PART = {"done": True, "done_reason": "stop", "eval_count": 5, "load_duration": 5}
BODY = {"model": "m:latest", "options": {"temperature": 0}}


class Client:
    base_url = "http://127.0.0.1:1"

    def chat(self, body):
        return PART

    def stream(self, body):
        for _ in range(PARTS):
            yield PART

    counted_chat = counted(chat)
    counted_stream = counted_stream(stream)


def cpu_s(call, times):
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times


def drained(stream):
    return lambda: [None for _ in stream(BODY)]


if __name__ == "__main__":
    client = Client()
    calls, parts = [], []
    for _ in range(ROUNDS):
        plain, watched = (cpu_s(lambda c=c: c(BODY), CALLS) for c in (client.chat, client.counted_chat))
        calls.append((watched - plain) * 1e6)
        plain, watched = (cpu_s(drained(s), STREAMS) / PARTS for s in (client.stream, client.counted_stream))
        parts.append((watched - plain) * 1e9)
    print(f"a call: {statistics.median(calls):.1f} µs ({min(calls):.1f} to {max(calls):.1f})")
    print(f"a part of a stream: {statistics.median(parts):.0f} ns ({min(parts):.0f} to {max(parts):.0f})")
