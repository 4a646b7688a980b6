"""Name one hit, so that whoever saw it can say later that it was wrong.

A lookup id names the question that was asked and the entry that was served. It is signed: it may travel through a
browser and back, and nobody can make one up to remove somebody else's entries.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from functools import lru_cache
from typing import Any

from langchain_aegis.nonces import nonces

_DIGEST = 16  # bytes of an exact key
_NONCE = 6  # two hits never have the same id
_MAC = 10
_SIZE = 2 * _DIGEST + _NONCE + _MAC


def lookup_id(mac_key: bytes, asked: str, served: str) -> str:
    """Return a new id of the hit that answered `asked` with the entry `served`; both exact keys, 32 hex characters."""
    body = bytes.fromhex(asked + served) + nonces.draw()[:_NONCE]
    return base64.urlsafe_b64encode(body + _mac(mac_key, body)).decode()


def read_lookup_id(mac_key: bytes, text: str) -> tuple[str, str] | None:
    """Return the exact keys asked for and served, or None if this cache made no such id."""
    try:
        data = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error, AttributeError):
        return None
    body, mac = data[:-_MAC], data[-_MAC:]
    if len(data) != _SIZE or not hmac.compare_digest(mac, _mac(mac_key, body)):
        return None
    return body[:_DIGEST].hex(), body[_DIGEST : 2 * _DIGEST].hex()


def _mac(mac_key: bytes, body: bytes) -> bytes:
    digest = _keyed(mac_key).copy()
    digest.update(body)
    mac: bytes = digest.digest()
    return mac


@lru_cache(maxsize=8)
def _keyed(mac_key: bytes) -> Any:
    """Return the digest that has taken in the key."""
    return hashlib.blake2b(key=mac_key, digest_size=_MAC, person=b"aegis-lookup-v1")
