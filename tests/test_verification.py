"""Whether one question's answer may serve another question."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis.lexicon import lexicon
from langchain_aegis.profiles import COUNTS, NAMES, PHRASES, REPEATS, STARTS
from langchain_aegis.tokens import PLAIN_TEXT, SYMBOL, TOKEN, WORD
from langchain_aegis.verification import (
    CLOSE,
    FAR,
    GUARDS,
    NEAR,
    Profile,
    compare,
    hardly_differ,
    nearness,
    profile,
    thresholds,
)

KEY = b"a key of the tests"
profile("")  # reads the lexicon, so that no example pays for it
NOUNS = ["printer", "ladder", "boiler", "ferry", "lamp", "gate", "kettle", "tent"]
KNOWN = {"how", "do", "i", "enable", "disable", "from", "to", "the", "three", "reasons", "minutes", "orders", "table"}
VOCABULARY = (
    "How do I enable disable not 30 minutes from Paris to Rome the Redis v2.4 three reasons € 500 Frage wie lange "
    'über kein "orders" parse_config non-members 18-year-old briefly in a table turn off July May 5k 2 million'
)
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=14).map(" ".join))


def reasons(cached: str, new: str) -> tuple[str, ...]:
    return compare(profile(cached, key=KEY), profile(new, key=KEY))


@given(TEXTS)
def test_every_question_may_serve_itself(text: str) -> None:
    one = profile(text, key=KEY)
    assert compare(one, one) == ()


@given(TEXTS)
def test_a_profile_survives_its_bytes(text: str) -> None:
    one = profile(text, key=KEY)
    assert Profile.decode(one.encode()) == one


@given(TEXTS, TEXTS)
def test_the_order_of_the_two_questions_makes_no_difference(left: str, right: str) -> None:
    one, other = profile(left, key=KEY), profile(right, key=KEY)
    assert compare(one, other) == compare(other, one)


@given(TEXTS, st.sampled_from([str.upper, str.lower, str.title]), st.sampled_from(["", " ", "?", "!", " ?", "  "]))
def test_case_of_known_words_punctuation_and_spaces_do_not_matter(
    text: str, change: Callable[[str], str], end: str
) -> None:
    known = " ".join(word for word in text.split() if word.lower() in KNOWN)
    assert compare(profile(known, key=KEY), profile("  " + change(known).replace(" ", "  ") + end, key=KEY)) == ()


ADDED = st.sampled_from(["7", "30 minutes", "v9.9", "not", "Quedlinburg", "without", "7 %", "LN-4711"])


@given(st.lists(st.sampled_from(NOUNS), min_size=2, max_size=5, unique=True), ADDED)
def test_one_more_number_negation_or_name_always_blocks(nouns: list[str], added: str) -> None:
    text = "How do I use the " + " and the ".join(nouns)
    assert reasons(text, text) == ()
    for other in (f"{text} {added}?", f"Which is the best way to use the {' and the '.join(nouns)} {added}?"):
        assert reasons(text, other) != ()
        assert reasons(other, text) != ()


@given(TEXTS, st.sampled_from(["7777", "Quedlinburgx", "LN-4711"]))
def test_what_no_lexicon_knows_is_never_dropped(text: str, added: str) -> None:
    assert reasons(text, f"{text} . {added}") != ()


@given(st.binary(max_size=200))
def test_other_bytes_raise_only_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert Profile.decode(data).encode() == data


@given(TEXTS, st.integers(0, 400), st.integers(0, 255))
def test_changed_bytes_are_refused_or_are_a_profile_of_their_own(text: str, at: int, byte: int) -> None:
    data = bytearray(profile(text, key=KEY).encode())
    data[at % len(data)] = byte
    with contextlib.suppress(ValueError):
        assert Profile.decode(bytes(data)).encode() == data
    with pytest.raises(ValueError):
        Profile.decode(bytes(data) + b"\0")


@given(st.text(alphabet="aehozAEHOZäöüÄÖÜß ,:;!?()\n\t\u00a0").filter(lambda text: "()" not in text))
def test_a_plain_text_has_the_tokens_that_any_text_has(text: str) -> None:
    assert PLAIN_TEXT.fullmatch(text)
    assert WORD.findall(text) == TOKEN.findall(text)
    assert not SYMBOL.findall(text)


def test_what_is_more_than_words_is_no_plain_text() -> None:
    for mark in (*"0_-'\"./\\@#%&*+<=>[]^`{|}~€°„“”’é→🙂", "()"):
        assert not PLAIN_TEXT.fullmatch(f"How deep is it{mark}"), mark


@given(TEXTS)
def test_what_a_profile_says_that_it_lacks_it_lacks(text: str) -> None:
    one = profile(text, key=KEY)
    assert bool(one.flags & COUNTS) == bool(one.numbers or one.quantities)
    assert bool(one.flags & NAMES) == bool(one.names or one.identifiers)
    assert bool(one.flags & STARTS) == (one.source >= 0)
    assert bool(one.flags & REPEATS) == (len(one.order) > len(one.terms))
    assert bool(one.flags & PHRASES) == any(term in lexicon().parts for term in one.terms)
    assert one.opposed == {code ^ 1 for code in one.opposites} - one.opposites


def test_a_profile_of_another_version_is_refused() -> None:
    data = profile("How deep is the lake?", key=KEY).encode()
    for version in {*range(256)} - {data[0]}:
        with pytest.raises(ValueError, match="version"):
            Profile.decode(bytes((version,)) + data[1:])


@given(TEXTS, TEXTS)
def test_guards_that_are_switched_off_do_not_block(left: str, right: str) -> None:
    one, other = profile(left, key=KEY), profile(right, key=KEY)
    assert compare(one, other, off=frozenset(GUARDS)) == ()
    for code in compare(one, other):
        assert code in GUARDS
        assert code not in compare(one, other, off=frozenset({code}))


def test_a_profile_holds_no_word_and_is_small() -> None:
    text = "How much did the Miller wedding at Lake Constance cost in July 2024, including 35 guests from Quedlinburg?"
    data = profile(text, key=KEY).encode()
    assert len(data) <= 250
    for word in text.lower().split():
        assert len(word) < 4 or word.encode() not in data.lower()
    assert profile(text, key=b"another").encode() != data


def test_thresholds_name_what_was_measured() -> None:
    for mode in ("strict", "balanced", "lenient"):
        value, known = thresholds("all-minilm:latest", mode)
        assert known
        assert 0.5 < value < 1
        assert not thresholds("somebody/else", mode)[1]
    assert thresholds("bge-m3", "balanced") == (0.92, False)
    with pytest.raises(ValueError, match="mode"):
        thresholds("all-minilm", "bold")


def test_a_text_of_any_length_has_a_profile() -> None:
    long = "a1-b " * 50_000
    one = profile(long, key=KEY)
    assert Profile.decode(one.encode()) == one
    assert compare(one, profile(long + "x", key=KEY)) != ()


BLOCKED = [
    ("How far may the drone fly with 3 batteries?", "How far may the drone fly with 4 batteries?", "number"),
    ("How do I move from release 2.1 to 2.2?", "How do I move from release 2.1 to 2.3?", "number"),
    ("Is the lamp free for orders over 1,000 pieces?", "Is the lamp free for orders over 10,000 pieces?", "number"),
    ("Is the gate open on 2026-01-02?", "Is the gate open on 2026-02-01?", "number"),
    ("What does get() return for a lamp?", "What does set() return for a lamp?", "identifier"),
    ("Which flag makes the ferry -v?", "Which flag makes the ferry -V?", "identifier"),
    ("Who wrote the third letter?", "Who wrote the second letter?", "number"),
    ("Wie lange reichen 5 Liter Farbe?", "Wie lange reichen 5 Milliliter Farbe?", "quantity"),
    ("May the tank be empty for 2 hours?", "May the tank be empty for 2 days?", "quantity"),
    ("What does render_page return?", "What does render_form return?", "identifier"),
    ("Explain the option --quiet", "Explain the option --force", "identifier"),
    ('What is in column "owner"?', 'What is in column "holder"?', "identifier"),
    ("Who maintains order LN-4711?", "Who maintains order LN-4771?", "identifier"),
    ("How do I loop in C?", "How do I loop in C++?", "identifier"),
    ("Which valves are tested?", "Which valves are not tested?", "negation"),
    ("Welche Ventile sind geprüft?", "Welche Ventile sind nicht geprüft?", "negation"),
    ("Where are stamped parcels kept?", "Where are unstamped parcels kept?", "negation"),
    ("How do I enable the alarm?", "How do I disable the alarm?", "antonym"),
    ("How do I turn the siren on?", "How do I turn the siren off?", "antonym"),
    ("Wie erhöhe ich die Lautstärke?", "Wie senke ich die Lautstärke?", "antonym"),
    ("Which event is in July?", "Which event is in August?", "exclusive"),
    ("How do I restart it in production?", "How do I restart it in staging?", "exclusive"),
    ("What is the fare in euros?", "What is the fare in Swiss francs?", "exclusive"),
    ("Läuft das Programm unter Windows?", "Läuft das Programm unter Linux?", "exclusive"),
    ("Do I need a visa for Norway?", "Do I need a visa for Peru?", "exclusive"),
    ("When is the ferry cleaned?", "Where is the ferry cleaned?", "question_word"),
    ("Why is the door open?", "Is the door open?", "question_word"),
    ("How do I get from Graz to Linz?", "How do I get from Linz to Graz?", "direction"),
    ("Convert pesos to yen", "Convert yen to pesos", "direction"),
    ("Does the pump feed the boiler?", "Does the boiler feed the pump?", "order"),
    ("Which views use the tables of March?", "Which views are used by the tables of March?", "order"),
    ("Explain tides briefly", "Explain tides in detail", "shape"),
    ("List the moons as JSON", "List the moons in a table", "shape"),
    ("Explain tides", "Explain tides for children", "shape"),
    ("Give me four reasons to swim", "Give me reasons to swim", "number"),
    ("Who leads Siemensberg?", "Who leads Boschtal?", "entity"),
    ("How do I wash a jacket?", "How do I wash a scarf?", "substitution"),
    ("Wie wasche ich eine Jacke?", "Wie wasche ich einen Schal?", "substitution"),
    ("What covers the policy?", "What covers the ladder policy?", "restriction"),
    ("How deep is the lake?", "Which bakery sells rye?", "topic"),
    ("Which forms may members send?", "Which forms must members send?", "antonym"),
    ("Welche Formulare dürfen Mieter senden?", "Welche Formulare müssen Mieter senden?", "antonym"),
    ("How do I clean the filter?", "How often must the filter be cleaned?", "question_word"),
    ("Who repairs the lamp?", "What does the lamp show?", "question_word"),
    ("Can the porter carry my trunk?", "Which trunk did the porter carry?", "question_word"),
    ("How do I get net weight from gross weight?", "How do I get gross weight from net weight?", "direction"),
    ("How do I move from Vela 20 to Vela 18?", "How do I move from Vela 18 to Vela 20?", "direction"),
    ("Wie drehe ich das Wasser auf?", "Wie drehe ich das Wasser zu?", "antonym"),
    ("Is the ferry free of charge?", "What does the ferry charge?", "antonym"),
    ("Explain tides in one sentence", "Explain tides", "shape"),
    ("Who was the keeper of the tower?", "Who is the keeper of the tower?", "exclusive"),
    ("How do I cancel my boat ticket?", "What is the process for upgrading my boat ticket?", "substitution"),
    ("Wie lackiere ich ein altes Boot?", "Auf welche Weise kann man ein altes Boot reparieren?", "substitution"),
    ("Mozart Geburtstag", "Mozart birthday", "language"),
    ("WLAN Passwort", "WiFi password", "language"),
    ("How do I reset the router?", "Wie setze ich den Router zurück?", "language"),
    ("Where is the museum?", "Wo ist das Museum?", "language"),
]


@pytest.mark.parametrize(("cached", "new", "code"), BLOCKED)
def test_a_difference_that_changes_the_answer_is_named(cached: str, new: str, code: str) -> None:
    assert code in reasons(cached, new)


@pytest.mark.parametrize(
    ("cached", "new"),
    [
        ("How do I reserve a kayak?", "How can I book a kayak?"),
        ("How do I reserve a kayak?", "Hello, quick question: how do I reserve a kayak? Thanks!"),
        ("How do I reserve a kayak?", "How do I resreve a kayak"),
        ("Is zorblaxing a way to zorblax the lake?", "Is zorlbaxed a way to zorlbax the lake?"),
        ("What does parse_map return?", "What does parse_map() return?"),
        ("Where is the boat house?", "What is the location of the boat house?"),
        ("What does a guide cost?", "How much is a guide?"),
        ("Can four persons share a tent?", "Can 4 people share a tent?"),
        ("Is there a raft for 6 persons?", "Is there a six-person raft?"),
        ("May an 18-year-old rent a boat?", "May an 18 year old rent a boat?"),
        ("Do I get fifteen percent off?", "Do I get 15 % off?"),
        ("What is the price for non-members?", "What is the price if I am not a member?"),
        ("I can't remember my passphrase", "I forgot my passphrase"),
        ("Which maps does the guide use?", "Which maps are used by the guide?"),
        ("On the river, which rules hold?", "Which rules hold on the river?"),
        ("How long is a warranty of 24 months?", "How long is a warranty of 2 years?"),
        ("How do I log in?", "How do I sign in?"),
        ("What is the charge per month?", "What is the monthly charge?"),
        ("When does the ferry sail?", "Could you tell me when the ferry sails?"),
        ("May dogs use the ferry?", "Are dogs allowed to use the ferry?"),
        ("What is the way to fold the tent?", "How do I fold the tent?"),
        ("What's the depth of the lake?", "How deep is the lake?"),
        ("Where is the return form kept?", "Where is the form for a return kept?"),
        ("Wie melde ich mein Boot an?", "Wie kann ich mein Boot anmelden?"),
        ("Wann wurde das Boot gekündigt?", "Wann hat man das Boot kündigen müssen?"),
        ("Welche Frist gilt für die Kündigung?", "Welche Kündigungsfrist gilt?"),
        ("Wie buche ich ein Kajak?", "Wie kann ich ein Kajak reservieren?"),
        ("Was kostet das Zelt pro Tag?", "Was kostet das Zelt täglich?"),
    ],
)
def test_another_way_to_ask_the_same_is_served(cached: str, new: str) -> None:
    assert reasons(cached, new) == ()


def test_one_undecided_language_blocks_nothing() -> None:
    assert "language" not in reasons("Kayak tours?", "Which are the kayak tours?")
    assert "language" in reasons("Kubernetes installieren?", "Install Kubernetes?")
    assert "language" in reasons("Quelle est la longueur du lac ?", "What is the length of the lake?")


@pytest.mark.parametrize(
    ("cached", "new"),
    [
        ("How much is the rent?", "How much is the deposit?"),
        ("Where is the shop?", "Where is the room?"),
        ("What is the height of the tower?", "What is the balance of the tower?"),
        ("In which city is the office?", "In which country is the office?"),
    ],
)
def test_what_is_asked_for_is_compared_where_both_ask_in_the_same_way(cached, new):
    assert compare(profile(cached), profile(new))


def test_a_german_way_has_its_ends():
    assert "direction" in reasons("Welche Verbindung gibt es ab Ulm nach Bonn?", "Wie komme ich von Bonn nach Ulm?")
    assert reasons("Welche Verbindung gibt es ab Ulm nach Bonn?", "Wie komme ich von Ulm nach Bonn?") == ()


def test_what_asks_may_stand_behind_a_clause():
    how = profile("What can I do about cramp?").question
    assert profile("When I sit for long I get cramp. What can I do?").question == how
    assert profile("When does the shop open?").question == profile("Tell me when the shop opens.").question != how
    assert profile("Is there any way to mend it?").question == profile("Can I mend it?").question


def test_the_farther_away_the_more_two_questions_must_share():
    def reasons_by_nearness(*questions):
        return [compare(*map(profile, questions), near=near) for near in (FAR, NEAR, CLOSE)]

    papers = (
        "Which documents will I be asked for when I register a boat?",
        "What papers do they want to see for registering a boat?",
    )
    assert reasons_by_nearness(*papers) == [("substitution",), (), ()]
    chess = "How can I improve my chess?", "What are some ways to improve my chess openings?"
    assert reasons_by_nearness(*chess) == [("restriction",), ("restriction",), ()]
    same = "How do I improve my chess?", "What can I do to improve at chess?"
    assert reasons_by_nearness(*same) == [(), (), ()]


def test_to_own_a_thing_is_more_than_to_have_it_as_ones_own():
    assert reasons("Who owns the painting?", "Who painted the painting?") == ("restriction",)
    assert reasons("Can I bring my own dog to the hotel?", "Can I bring my dog to the hotel?") == ()


def test_and_excuses_only_what_it_joins():
    chile = "What do the teams of Chile and Peru have to do to win against Brazil?"
    assert reasons(chile, "What do the teams of Brazil and Peru have to do to win against Chile?") == ("order",)
    assert reasons(chile, "What do the teams of Peru and Chile have to do to win against Brazil?") == ()


def test_a_quality_may_stand_for_another_word_only_in_a_close_question():
    anew = (
        "What are some interesting museums that one should see in Riga?",
        "Which are the cheap museums to see in Riga?",
    )
    added = "What are some museums that one should see in Riga?", "Which are the cheap museums to see in Riga?"
    assert [compare(*map(profile, anew), near=near) for near in (FAR, NEAR, CLOSE)] == [("substitution",)] * 2 + [()]
    assert compare(*map(profile, added), near=CLOSE) == ("restriction",)
    denied = "Which museums can one visit with the Riga card?", "What museums are ineligible for the Riga card?"
    assert compare(*map(profile, denied), near=CLOSE) == ("substitution",)


@pytest.mark.parametrize("lowest", [0.5, 0.65, 0.92, 1.0])
def test_questions_are_the_nearer_the_more_similar_they_are(lowest):
    found = [nearness(lowest + step / 20 * (1 - lowest), lowest) for step in range(21)]
    assert found == sorted(found)
    assert found[-1] == CLOSE
    assert set(found) == ({CLOSE} if lowest == 1.0 else {FAR, NEAR, CLOSE})
    assert nearness(float("nan"), lowest) == FAR


@pytest.mark.parametrize(
    ("cached", "trap", "guard"),
    [
        ("How much notice do I get?", "How much notice do I give?", "antonym"),
        ("Can I sit the test without the course?", "Can I take the course without the test?", "direction"),
        ("Kann ich die Prüfung ohne den Kurs machen?", "Kann ich den Kurs ohne die Prüfung machen?", "direction"),
    ],
)
def test_giving_is_not_getting_and_what_is_left_out_is_not_what_is_there(cached, trap, guard):
    assert guard in reasons(cached, trap)


def test_a_word_that_asks_is_no_giving_and_a_sentence_may_begin_with_what_is_left_out():
    assert reasons("Can you give me the price?", "Can I get the price?") == ()
    assert reasons("Can I sit the test without the course?", "Without the course, may I sit the test?") == ()


@pytest.mark.parametrize(
    ("cached", "new", "alike"),
    [
        ("How do I reserve a study room?", "How can I reserve a study room?", True),
        ("How do I reserve a study room?", "How to reserve a study room?", True),
        ("How do I buy tickets?", "How do I purchase a ticket?", False),  # one, or several
        ("How do I buy tickets?", "How could I purchase the tickets?", True),
        ("Wie kann ich das Zelt buchen?", "Wie könnte man das Zelt reservieren?", True),
        ("Can anyone join the club?", "Can you join the club?", False),
        ("How can I train my dog?", "How should I train my dog?", False),
        ("What is the best lamp? Why?", "What is the best lamp?", False),
        ("Does the parser call the lexer?", "Does the lexer call the parser?", False),
        ("How do I feed a cat?", "How do I feed a cow?", False),
    ],
)
def test_a_hit_in_hardly_other_words_may_be_repeated(cached, new, alike):
    assert hardly_differ(profile(cached), profile(new)) is alike
    assert hardly_differ(profile(new), profile(cached)) is alike
