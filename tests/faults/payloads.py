"""What an attacker who can write to Redis would put under our names. None of it is an answer."""

import pickle
from collections import OrderedDict


class _Bomb:
    def __reduce__(self):
        return (print, ("it was unpickled",))


def constructor(*path, **kwargs):
    return {"lc": 1, "type": "constructor", "id": list(path), "kwargs": kwargs}


PROMPT = constructor("langchain", "prompts", "prompt", "PromptTemplate", template="{x}", input_variables=["x"])
CHAT = constructor("langchain", "chat_models", "openai", "ChatOpenAI", openai_api_key="sk-canary")
SECRET = {"lc": 1, "type": "secret", "id": ["AEGIS_FAULT_CANARY"]}
MESSAGE = {
    "content": "planted", "tool_calls": [], "usage": [0, 0], "metadata": {}, "extra": {}, "name": None, "took_ns": None,
}  # fmt: skip


def answer(*items):
    return {"kind": "generations", "items": list(items)}


def message(**changed):
    return answer({"message": {**MESSAGE, **changed}})


# As values: written as JSON by the test.
DOCUMENTS = {
    "secret": SECRET,
    "prompt template": PROMPT,
    "chat model": CHAT,
    "runnable": constructor("langchain", "schema", "runnable", "RunnableBinding", bound=PROMPT, kwargs={}),
    "fallbacks": constructor("langchain", "schema", "runnable", "RunnableWithFallbacks", runnable=CHAT, fallbacks=[]),
    "image prompt": constructor("langchain", "prompts", "image", "ImagePromptTemplate", template={"url": "{x}"}),
    "human message": constructor("langchain", "schema", "messages", "HumanMessage", content="x"),
    "system message": constructor("langchain", "schema", "messages", "SystemMessage", content="x"),
    "generation": constructor("langchain", "schema", "output", "ChatGeneration", message=PROMPT),
    "not implemented": {"lc": 1, "type": "not_implemented", "id": ["os", "system"], "repr": "x"},
    "id is a text": {"lc": 1, "type": "constructor", "id": "PromptTemplate", "kwargs": {}},
    "id is a dict": {"lc": 1, "type": "constructor", "id": {"a": 1}, "kwargs": {}},
    "id is empty": {"lc": 1, "type": "constructor", "id": [], "kwargs": {}},
    "kwargs are a list": {"lc": 1, "type": "constructor", "id": ["langchain", "x"], "kwargs": []},
    "escaped": {"__lc_escaped__": SECRET},
    "items hold a constructor": answer(PROMPT),
    "items hold a secret": answer(SECRET),
    "message is a constructor": answer({"message": PROMPT}),
    "message is a text": answer({"message": "x"}),
    "message is a number": answer({"message": 7}),
    "message is nothing": answer({"message": None}),
    "message says nothing": answer({"message": {}}),
    "content is a number": message(content=7),
    "content is a dict": message(content={"a": 1}),
    "calls are numbers": message(tool_calls=[1, 2]),
    "calls lack their fields": message(tool_calls=[{"name": "f"}]),
    "call has odd arguments": message(tool_calls=[{"name": "f", "args": "x", "id": "1"}]),
    "usage is a text": message(usage="many"),
    "usage is a dict": message(usage={"input_tokens": 1, "output_tokens": 2}),
    "usage lacks a count": message(usage=[1]),
    "usage counts in texts": message(usage=["1", "2"]),
    "usage tells more in a text": message(usage=[1, 2, "more"]),
    "metadata are a list": message(metadata=[1]),
    "extra is a text": message(extra="x"),
    "name is a list": message(name=["x"]),
    "items are a text": {"kind": "generations", "items": "x"},
    "items are a dict": {"kind": "generations", "items": {"message": MESSAGE}},
    "no items": {"kind": "generations"},
    "another kind": {"kind": "pickle", "items": []},
    "kind is a list": {"kind": ["generations"], "items": []},
    "a text is a number": answer({"text": 7, "info": None}),
    "a list": [1, 2, 3],
    "a text": "planted",
    "a number": 7,
    "nothing": None,
}

_PLAIN = b'{"message":{"content":"planted","tool_calls":[],"usage":[0,0],"metadata":{%s},"extra":{},"name":null}}'
_WITH = b'{"kind":"generations","items":[' + _PLAIN + b"]}"

# As bytes: no JSON, or such as no writer of ours writes.
BYTES = {
    "empty": b"",
    "no JSON": b"planted",
    "half": b'{"kind":"generations","items":[{"mess',
    "not UTF-8": b'{"kind":"generations","items":["\xff\xfe"]}',
    "null bytes": b"\x00" * 64,
    "byte order mark": b"\xef\xbb\xbf" + _WITH % b"",
    "pickle": pickle.dumps(_Bomb()),
    "pickle of an older protocol": pickle.dumps(_Bomb(), 0),
    "pickle of containers": pickle.dumps(OrderedDict(a=[_Bomb()])),
    "python": b"__import__('os').system('true')",
    "deep lists": b"[" * 5_000 + b"]" * 5_000,
    "very deep lists": b"[" * 200_000 + b"]" * 200_000,
    "very deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "deep inside": b'{"kind":"generations","items":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep and unclosed": b"[" * 200_000,
    "long whole number": b"9" * 5_000,
    "long whole number inside": _WITH % (b'"model":' + b"9" * 5_000),
    "not a number": _WITH % b'"model":NaN',
    "infinite": _WITH % b'"model":-Infinity',
    "huge exponent": _WITH % b'"model":1e999999',
    "the same name twice": b'{"kind":"value","kind":"generations","items":["x"],"items":["y"]}',
    "lone surrogate": b'{"kind":"generations","items":["\\ud800"]}',
    "compressed": b"\x1f\x8b\x08\x00" + b"\x00" * 200,
    "msgpack": b"\x82\xa4kind\xabgenerations\xa5items\x90",
}
BYTES |= {
    f"{name}, said to be plain": data.replace(b'"generations"', b'"plain"', 1)
    for name, data in BYTES.items()
    if b'{"kind":"generations"' in data
}
