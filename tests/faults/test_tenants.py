"""Nobody is ever served what was stored for another one, however alike their names are."""

import json
import random
import re

import pytest
from caches import MODEL, prompt
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration

from faults import tenants
from faults.tenants import IDS, TIERS, Caller, History
from langchain_aegis.keys import Keyring, Who


def served_nothing_wrong(found, lookups):
    assert found.lookups == lookups
    assert not found.wrong, ascii(found.wrong[:3])
    assert found.shows_something, found.hits


@pytest.mark.row(54, 55, 56)
@pytest.mark.parametrize(("tier", "lookups"), [(TIERS[0], 600), (TIERS[1], 120)], ids=["exact", "semantic"])
def test_callers_with_ids_that_look_alike_get_their_own_answers_only(server, tier, lookups):
    """A little of what is promised; all of it: python tests/faults/tenants.py."""
    found = tenants.run(server.unix_url, tier, lookups, many=12, seed=lookups)
    served_nothing_wrong(found, lookups)
    assert set(found.tiers) == {tier.name}


@pytest.mark.slow
@pytest.mark.row(54, 55, 56)
@pytest.mark.deadline(400)
@pytest.mark.parametrize(("tier", "lookups"), [(TIERS[0], 100_000), (TIERS[1], 10_000)], ids=["exact", "semantic"])
def test_a_tenth_of_a_million_lookups_finds_nobody_elses_answer(server, tier, lookups):
    served_nothing_wrong(tenants.run(server.unix_url, tier, lookups, many=150), lookups)


@pytest.mark.row(54, 55)
def test_no_two_of_the_ids_are_one_and_none_stands_in_a_name():
    """As tenants, as users and as tasks; what is sent to Redis of them is hex."""
    ring = Keyring(b"a secret of 32 bytes, just for this", namespace="n")
    assert len(set(IDS)) > 200
    ids = [i for i in IDS if i.strip()]
    for field in ("tenant", "user", "task"):
        asked = prompt("How long may I keep a book?")
        keys = [ring.for_prompt(asked, MODEL, Who(**{field: i})) for i in dict.fromkeys(ids)]
        assert len({key.exact for key in keys}) == len({key.scope for key in keys}) == len(keys)
        for key in keys:
            assert re.fullmatch("[0-9a-f]{32} [0-9a-f]{32}", f"{key.exact} {key.scope}")
            assert all(re.fullmatch("namespace|[a-z-]+:[0-9a-f]{16}", thing) for thing in key.things), key.things


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        (["Acme", "u", None, "book", 1], "another tenant's"),
        (["acme", None, None, "book", 1], "another user's"),
        (["acme", "u", "t", "book", 1], "another task's"),
        (["acme", "u", None, "card", 1], "another question's"),
        (["acme", "u", None, "book", 0], "what was invalidated"),
        (["acme", "u", None, "book", 2], "what was never stored"),
        (["acme", "u", None, "book", 1], None),
    ],
)
def test_the_history_sees_what_is_wrong(told, kind):
    history = History(TIERS[0], [Caller("acme", "u")], random.Random(7))
    history._latest[Caller("acme", "u"), "book"] = 1
    message = AIMessage(json.dumps(told), response_metadata={"aegis_cache": {"tier": "exact"}})
    history._look_at([ChatGeneration(message=message)], Caller("acme", "u"), "book")
    assert [wrong[0] for wrong in history.found.wrong] == ([kind] if kind else [])
    assert history.found.hits == 1
