"""What records are signed with, and encrypted if that is wanted: keys by id, which may change while all is served."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from langchain_aegis.ciphers import Cipher
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.notices import warn_once

PLAIN: Final = b"1"
ENCRYPTED: Final = b"2"
_ID: Final = 4  # bytes of a key's id, which begins a signature
_MAC: Final = 16  # bytes of the rest


def derive(secret: bytes, purpose: str) -> bytes:
    """Return the 32-byte key for one purpose."""
    return hmac.digest(secret, f"langchain-aegis {purpose} v1".encode(), "sha256")


class Seal:
    """Signs records with the first of some keys, and accepts what any of them has signed. May be used from any thread.

    One that encrypts takes no record that is not encrypted, and the other way round: what it serves was never there in
    clear since it was made, whatever another host does.

    Args:
        secrets: At least 16 bytes each, all different.
        encrypt: Whether what tells something is encrypted before it is signed.

    Raises:
        AegisConfigError: There is no secret, two are the same, or `cryptography` is not installed.

    Attributes:
        version: Of the records that it makes and reads.
        encrypts: Whether it encrypts.
        mac_keys: What else is signed is signed with these, the first one first.
    """

    def __init__(self, secrets: Sequence[bytes], *, encrypt: bool = False) -> None:
        ids = [derive(secret, "key id")[:_ID] for secret in secrets]
        if not ids or len(set(ids)) < len(ids):
            raise AegisConfigError("records need at least one secret, and each is named once: see AEGIS_RECORD_KEYS")
        self.version = ENCRYPTED if encrypt else PLAIN
        self.encrypts = encrypt
        self.mac_keys = tuple(derive(secret, "mac") for secret in secrets)
        # Digests that have taken in the key, which costs as much as a quarter of a record.
        self._keyed = {
            i: hashlib.blake2b(key=key, digest_size=_MAC, person=b"aegis-record-v1")
            for i, key in zip(ids, self.mac_keys, strict=True)
        }
        self._id, self._first = ids[0], self._keyed[ids[0]]
        self._ciphers = {i: Cipher(s, "record") for i, s in zip(ids, secrets, strict=True)} if encrypt else {}

    def sign(self, signed: bytes) -> bytes:
        """Return the signature of what a record says: the key's id, and a MAC."""
        digest = self._first.copy()
        digest.update(signed)
        return self._id + digest.digest()

    def holds(self, signature: bytes, signed: bytes) -> bool:
        """Return whether one of the keys has signed this."""
        digest = self._first.copy()
        digest.update(signed)
        return hmac.compare_digest(signature, self._id + digest.digest()) or self._holds_otherwise(signature, signed)

    def hide(self, data: bytes, about: bytes) -> bytes:
        """Return `data` encrypted under the first key; `about` says which record it belongs to."""
        return self._ciphers[self._id].seal(data, about)

    def show(self, hidden: bytes, about: bytes, signature: bytes) -> bytes | None:
        """Return what `hide` was given in the record that has this signature, which holds; None if it is no such."""
        return self._ciphers[signature[:_ID]].open(hidden, about)

    def other(self, version: bytes) -> None:
        """Say that a record of another version was met, if whoever made it differs in nothing but encryption."""
        if version in (PLAIN, ENCRYPTED):
            warn_once(
                "other_encryption",
                f"an entry is {'not ' if self.encrypts else ''}encrypted, and this process's are"
                f"{'' if self.encrypts else ' not'}: it is a miss. Give every host of a Redis the same AEGIS_ENCRYPT",
            )

    def _holds_otherwise(self, signature: bytes, signed: bytes) -> bool:
        """Return whether another key than the first has signed this."""
        if (keyed := self._keyed.get(signature[:_ID])) is None:
            warn_once(
                "unknown_record_key",
                "an entry is signed with a key that this process does not have: it is a miss. Give every host the same "
                "AEGIS_SECRET_KEY and AEGIS_RECORD_KEYS; a new key is listed second everywhere before it comes first",
            )
            return False
        digest = keyed.copy()
        digest.update(signed)
        return hmac.compare_digest(signature[_ID:], digest.digest())
