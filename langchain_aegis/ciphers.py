"""AES-GCM of the optional package `cryptography`, so that who can read Redis cannot read what lies there."""

from __future__ import annotations

import os
from typing import Any, Final

from langchain_aegis.errors import AegisConfigError

_NONCE: Final = 12  # bytes; drawn anew for each text, so that a key is good for some billions of them
_TAG: Final = 16  # bytes


def _found() -> tuple[Any, Any, Any, Any]:
    """Return what is needed of the package. Raises AegisConfigError."""
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as exc:
        raise AegisConfigError(
            "encrypt (AEGIS_ENCRYPT) needs the package `cryptography`: pip install 'langchain-aegis[crypto]'"
        ) from exc
    return AESGCM, SHA256, HKDF, InvalidTag


def require() -> None:
    """Raise AegisConfigError if what encrypts is not installed."""
    _found()


class Cipher:
    """Encrypts for one purpose, under a key that is derived from a secret. May be used from any thread.

    Args:
        secret: At least 16 bytes.
        purpose: What is encrypted: each has a key of its own.

    Raises:
        AegisConfigError: `cryptography` is not installed.
    """

    def __init__(self, secret: bytes, purpose: str) -> None:
        aes, sha256, hkdf, self._wrong = _found()
        label = f"langchain-aegis {purpose} encryption v1".encode()
        self._aes = aes(hkdf(algorithm=sha256(), length=32, salt=None, info=label).derive(secret))

    def seal(self, data: bytes, about: bytes) -> bytes:
        """Return `data` encrypted: nonce, ciphertext, tag.

        Args:
            data: What nobody shall read.
            about: What it belongs to. It is not in what is returned, and `open` must be told the same.
        """
        nonce = os.urandom(_NONCE)
        sealed: bytes = nonce + self._aes.encrypt(nonce, data, about)
        return sealed

    def open(self, sealed: bytes, about: bytes) -> bytes | None:
        """Return what `seal` was given; None if it was changed, or belongs to something else."""
        if len(sealed) < _NONCE + _TAG:
            return None
        try:
            data: bytes = self._aes.decrypt(sealed[:_NONCE], sealed[_NONCE:], about)
        except self._wrong:
            return None
        return data
