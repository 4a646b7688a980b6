"""Keys of records: the first signs, all are accepted, and with encryption nothing can be read or moved without them."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_aegis import AegisEmbeddingCache, AegisSemanticCache, AegisSettings
from langchain_aegis.ciphers import Cipher
from langchain_aegis.entries import CLEAR, FIELDS, Record, _joined, unseal
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.home import record_secrets
from langchain_aegis.keys import Keyring, Who
from langchain_aegis.notices import forget_warnings
from langchain_aegis.seals import Seal

NEW, OLD, OTHER = b"n" * 32, b"o" * 32, b"x" * 32
RECORD = Record(
    key="0" * 32, scope="1" * 32, emb="abcd1234", digest="sha256:feed", created_ms=1, fresh_ms=2, expires_ms=3,
    epochs="f00:3", answer=b'{"kind":"value","item":"Paris, the answer"}', fields="p" + "a" * 104, negative=True,
    profile=b"words of the question", vec=b"\x00<\x00\x00", src=("source:1", "source:2"), sets=("tenant:1", "source:1"),
    task="write to the bank", question="What is the capital?",
)  # fmt: skip
SEALED = Seal([NEW], encrypt=True)


def stored(record, seal):
    return {name.encode(): value for name, value in record.sealed(seal).items()}


def signed_again(fields, seal):
    """The same fields with a true signature: what somebody could write who has the key of signatures alone."""
    values = [fields.get(name.encode(), b"") for name in FIELDS[:-1]]
    return {**fields, b"mac": seal.sign(_joined(values))}


# -- keys by id -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
def test_the_first_key_signs_and_each_that_is_listed_is_accepted(encrypt):
    old, both, turned, new = (
        Seal(listed, encrypt=encrypt) for listed in ([OLD], [OLD, NEW], [NEW, OLD], [NEW])
    )  # as an operator goes on: added, put first, alone
    by_old, by_new = stored(RECORD, both), stored(RECORD, turned)
    assert [unseal(by_old, seal) for seal in (old, both, turned, new)] == [RECORD, RECORD, RECORD, None]
    assert [unseal(by_new, seal) for seal in (old, both, turned, new)] == [None, RECORD, RECORD, RECORD]


def test_the_id_of_another_key_that_is_listed_does_not_make_a_signature_its_own():
    both = Seal([NEW, OLD])
    by_new, by_old = stored(RECORD, Seal([NEW])), stored(RECORD, Seal([OLD]))
    swapped = by_old[b"mac"][:4] + by_new[b"mac"][4:]
    assert unseal({**by_new, b"mac": swapped}, both) is None
    assert unseal({**by_new, b"mac": by_new[b"mac"][4:]}, both) is None


@pytest.mark.parametrize("secrets", [[], [NEW, NEW], [NEW, OLD, NEW]])
def test_no_key_and_the_same_one_twice_are_refused(secrets):
    with pytest.raises(AegisConfigError, match="AEGIS_RECORD_KEYS"):
        Seal(secrets)


def test_a_key_that_is_not_listed_is_said_once(caplog):
    forget_warnings()
    for _ in range(3):
        assert unseal(stored(RECORD, Seal([OTHER])), Seal([NEW, OLD])) is None
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["unknown_record_key"]
    assert "AEGIS_RECORD_KEYS" in caplog.text


def test_names_do_not_change_with_the_keys_of_records():
    """Else an invalidation would find nothing that another host has stored."""
    one, other = Keyring(OLD), Keyring(OLD, record_secrets=(NEW, OLD), encrypt=True)
    assert one.thing("tenant", "acme") == other.thing("tenant", "acme")
    assert (one.fingerprint, one.profile_key) == (other.fingerprint, other.profile_key)
    keys = [ring.for_pipeline("How long?", Who(), pipeline="p", version="") for ring in (one, other)]
    assert (keys[0].exact, keys[0].scope) == (keys[1].exact, keys[1].scope)


def test_the_word_secret_stands_for_the_secret_that_is_in_use():
    listed = AegisSettings(record_keys=("a new key of records", "secret"))
    assert record_secrets(listed, OLD) == (b"a new key of records", OLD)
    assert record_secrets(AegisSettings(), OLD) == (OLD,)
    assert Seal([OLD]).mac_keys == Seal(record_secrets(AegisSettings(), OLD)).mac_keys


# -- encryption -------------------------------------------------------------------------------------------------------


def test_an_encrypted_record_comes_back_as_it_was():
    assert unseal(stored(RECORD, SEALED), SEALED) == RECORD
    bare = replace(RECORD, question="", task="", profile=b"", src=(), fields="", digest="", negative=False, fresh_ms=0)
    assert unseal(stored(bare, SEALED), SEALED) == bare


def test_of_an_encrypted_record_nothing_can_be_read_but_what_redis_works_with():
    fields = stored(RECORD, SEALED)
    assert {name.decode() for name in fields} == {*CLEAR, "answer", "mac"}
    told = b"".join(fields.values())
    for text in (b"Paris", b"capital", b"bank", b"words of", b"sha256:feed", b"source:2", b"p" + b"a" * 104):
        assert text not in told
    assert b"source:1" in told  # `sets`: its name in the lists by which it is invalidated


def test_the_same_record_is_another_ciphertext_each_time():
    assert len({stored(RECORD, SEALED)[b"answer"] for _ in range(100)}) == 100


def test_plain_and_encrypted_records_are_misses_to_each_other_and_that_is_said_once(caplog):
    forget_warnings()
    plain = Seal([NEW])
    for _ in range(2):
        assert unseal(stored(RECORD, plain), SEALED) is None
        assert unseal(stored(RECORD, SEALED), plain) is None
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["other_encryption"]


def test_neither_becomes_the_other_by_its_version_even_with_a_true_signature():
    plain = Seal([NEW])
    as_encrypted = signed_again({**stored(RECORD, plain), b"v": b"2"}, SEALED)
    as_plain = signed_again({**stored(RECORD, SEALED), b"v": b"1"}, plain)
    assert unseal(as_encrypted, SEALED) is None
    found = unseal(as_plain, plain)  # true to what is signed, which is no answer
    assert found is None or not found.answer.startswith(b"{")


@pytest.mark.row(27)
def test_every_flipped_bit_of_an_encrypted_record_is_a_miss():
    fields = stored(RECORD, SEALED)
    for field, value in fields.items():
        for bit in range(len(value) * 8):
            changed = bytearray(value)
            changed[bit // 8] ^= 1 << bit % 8
            assert unseal({**fields, field: bytes(changed)}, SEALED) is None, (field, bit)


@pytest.mark.row(28)
def test_an_encrypted_record_cut_anywhere_is_a_miss():
    fields = stored(RECORD, SEALED)
    for field, value in fields.items():
        for length in range(len(value)):
            assert unseal({**fields, field: value[:length]}, SEALED) is None, (field, length)
            assert unseal({**fields, field: value[length + 1 :]}, SEALED) is None, (field, length)


@pytest.mark.row(27, 28)
def test_the_ciphertext_alone_is_proof_against_every_flipped_bit_and_cut():
    """Whoever has the key of signatures, but not that of encryption, cannot change what is hidden."""
    fields = stored(RECORD, SEALED)
    hidden = fields[b"answer"]
    changed = [hidden[:length] for length in range(len(hidden))]
    for bit in range(len(hidden) * 8):
        other = bytearray(hidden)
        other[bit // 8] ^= 1 << bit % 8
        changed.append(bytes(other))
    for other in changed:
        assert unseal(signed_again({**fields, b"answer": other}, SEALED), SEALED) is None


@pytest.mark.row(29)
@pytest.mark.parametrize("field", sorted(CLEAR - {"v"}))
def test_a_ciphertext_opens_beside_its_own_key_and_other_fields_alone(field):
    """Even with a true signature: it cannot be moved to another question, tenant, vector or time."""
    other = {
        "key": "2" * 32, "scope": "3" * 32, "emb": "deadbeef", "created_ms": 9, "expires_ms": 99, "epochs": "f00:9",
        "vec": b"\x00>\x00\x00", "sets": ("tenant:9",),
    }[field]  # fmt: skip
    mine, theirs = stored(RECORD, SEALED), stored(replace(RECORD, **{field: other}), SEALED)
    moved = {**theirs, b"answer": mine[b"answer"]}
    assert unseal(signed_again(theirs, SEALED), SEALED) is not None
    assert unseal(signed_again(moved, SEALED), SEALED) is None


@pytest.mark.row(31)
@given(st.binary(max_size=300))
def test_whatever_stands_in_place_of_the_ciphertext_is_a_miss(data):
    assert unseal(signed_again({**stored(RECORD, SEALED), b"answer": data}, SEALED), SEALED) is None


@pytest.mark.row(31)
@given(st.binary(max_size=300))
def test_whatever_is_hidden_under_our_own_key_raises_nothing(data):
    fields = stored(RECORD, SEALED)
    clear = [b"" if name == "answer" else fields.get(name.encode(), b"") for name in FIELDS[:-1]]
    planted = signed_again({**fields, b"answer": SEALED.hide(data, _joined(clear))}, SEALED)
    found = unseal(planted, SEALED)
    assert found is None or isinstance(found, Record)


records = st.builds(
    Record,
    key=st.text(alphabet="0123456789abcdef", min_size=32, max_size=32), scope=st.just("1" * 32), emb=st.just("e"),
    digest=st.text(), created_ms=st.integers(1, 2**50), expires_ms=st.integers(1, 2**50), epochs=st.just("f:1"),
    answer=st.binary(max_size=200), profile=st.binary(max_size=50), vec=st.binary(max_size=50), negative=st.booleans(),
    task=st.text(alphabet=st.characters(codec=None)), question=st.text(alphabet=st.characters(codec=None)),
)  # fmt: skip


@given(records, st.booleans())
def test_every_record_comes_back_as_it_was(record, encrypt):
    seal = Seal([NEW, OLD], encrypt=encrypt)
    assert unseal(stored(record, seal), seal) == record


def test_each_purpose_has_a_key_of_its_own():
    hidden = Cipher(NEW, "record").seal(b"text", b"about")
    assert Cipher(NEW, "record").open(hidden, b"about") == b"text"
    assert Cipher(NEW, "record").open(hidden, b"other") is None
    assert Cipher(NEW, "embedding").open(hidden, b"about") is None
    assert Cipher(OLD, "record").open(hidden, b"about") is None


def test_many_threads_encrypt_and_decrypt_at_once():
    def round_trips(number):
        record = replace(RECORD, key=f"{number:032x}", answer=b"%d" % number * 500)
        return all(unseal(stored(record, SEALED), SEALED) == record for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trips, range(16)))


@pytest.mark.parametrize("made", [AegisSemanticCache, AegisEmbeddingCache, lambda settings: Seal([NEW], encrypt=True)])
def test_without_the_package_it_is_said_at_once_what_to_install(monkeypatch, made):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(AegisConfigError, match=r"langchain-aegis\[crypto\]"):
        made(settings=AegisSettings(encrypt=True))
    assert Seal([NEW]).sign(b"")  # who does not encrypt needs it for nothing


# -- what is promised in writing --------------------------------------------------------------------------------------


def test_the_guide_to_security_names_what_stays_in_clear_and_every_setting_and_leads_somewhere():
    root = Path(__file__).parent.parent
    text = (root / "SECURITY.md").read_text()
    table = text.partition("| Encrypted | In clear, and why |")[2].partition("\n\n")[0]
    in_clear = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row)}
    assert in_clear - {"negative"} == CLEAR
    cache_guide = (root / "docs/cache.md").read_text()
    for variable in ("AEGIS_SECRET_KEY", "AEGIS_RECORD_KEYS", "AEGIS_ENCRYPT"):
        assert variable in text
        assert f"| `{variable}` |" in cache_guide
    for warning in ("another_secret", "other_encryption", "unknown_record_key"):
        assert f"`{warning}`" in text
    heads = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"(?m)^#+ (.*)$", text)}
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        assert target.startswith("https://arxiv.org/") or not target or (root / target).exists(), target
        assert not anchor or anchor in heads
    for name in ("README.md", "docs/reliability.md", "docs/cache.md"):
        assert "SECURITY.md)" in (root / name).read_text()
