"""Certificates of one's own, made by the openssl command: right ones, and ones that nobody must believe."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """A CA in a directory.

    Attributes:
        file: Its certificate, as clients are given it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self.file = path / f"{name}.pem"
        self._openssl(
            "req",
            "-x509",
            *KEY,
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
            "-addext",
            "keyUsage=critical,keyCertSign",
            "-keyout",
            self._key(name),
            "-out",
            self.file,
        )

    def server(self, name: str, names: str, days: int = 2) -> ssl.SSLContext:
        """Return what a server shows: a certificate for `names` (as in "DNS:localhost") that ends in so many days."""
        asked, made, extra = (self._path / f"{name}.{end}" for end in ("csr", "crt", "ext"))
        # Python 3.13 believes none without all of these.
        extra.write_text(
            f"subjectAltName={names}\nbasicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        self._openssl("req", "-new", *KEY, "-subj", f"/CN={name}", "-keyout", self._key(name), "-out", asked)
        self._openssl(
            "x509", "-req", "-in", asked, "-CA", self.file, "-CAkey", self._key(self._name), "-CAcreateserial",
            "-days", str(days), "-extfile", extra, "-out", made,
        )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made, self._key(name))
        return context

    def _key(self, name: str) -> Path:
        return self._path / f"{name}.key"

    def _openssl(self, *told: object) -> None:
        done = subprocess.run(["openssl", *map(str, told)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def possible() -> bool:
    """Whether there is an openssl command."""
    return shutil.which("openssl") is not None
