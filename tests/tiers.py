"""What tests of the local tier share: it is asked, filled and waited for."""

from caches import MODEL, chat, prompt, text_of
from conftest import wait_until

from langchain_aegis import aegis_scope
from langchain_aegis.pushes import ALIVE_S, clock
from langchain_aegis.writes import the_writer

MANY = 10_000_000  # bytes
BOOK, CARD = prompt("How long may I keep a book?"), prompt("What does a reader card cost?")


def tier_of(driver):
    return getattr(driver, "cache", driver)._connections.tier


def hits(driver):
    return tier_of(driver).stats().hits


def has_heard(driver):
    """Wait until the tier has heard of all that has happened up to now."""
    tier, now_s = tier_of(driver), clock()

    def heard():
        tier.get(b"")  # it is asked for what it hears only while somebody wants answers
        return tier._until_s - ALIVE_S >= now_s

    wait_until(heard, what="a proof that all was heard")


def asked(driver, question=BOOK):
    return text_of(driver.lookup(question, MODEL))


def taught(driver, answer, question=BOOK):
    """Have an answer kept in place of any other."""
    with aegis_scope(cache="refresh"):
        driver.lookup(question, MODEL)
    driver.update(question, MODEL, chat(answer))
    assert the_writer.drain(timeout_s=10)


def is_held(driver, question=BOOK):
    """Ask until the answer comes from the tier; returns it."""

    def local():
        before = hits(driver)
        found = driver.lookup(question, MODEL)
        return found if found is not None and hits(driver) > before else None

    return text_of(wait_until(local, what="an answer of the local tier"))
