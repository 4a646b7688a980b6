"""Random bytes that are fetched in advance: every one is given once, and a child of a fork has its own."""

import os
import threading

import pytest

from langchain_aegis.nonces import SIZE, Nonces


def test_no_two_are_the_same_whoever_draws():
    nonces, drawn = Nonces(), [[] for _ in range(4)]
    threads = [threading.Thread(target=lambda to=to: to.extend(nonces.draw() for _ in range(2_000))) for to in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given = [nonce for to in drawn for nonce in to]
    assert {len(nonce) for nonce in given} == {SIZE}
    assert len(set(given)) == 8_000


def test_the_system_is_asked_once_for_many(monkeypatch):
    nonces, asked, draw = Nonces(), [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or draw(size))
    for _ in range(256):
        nonces.draw()
    assert asked == [4096]
    nonces.draw()
    assert asked == [4096, 4096]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_draws_its_own():
    nonces = Nonces()
    nonces.draw()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, nonces.draw())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, SIZE)
    os.close(read)
    os.close(write)
    assert len(theirs) == SIZE
    assert theirs not in {nonces.draw() for _ in range(255)}
