"""Addresses of a Redis that Sentinels watch, as one setting: where they are, and what they call it.

    redis+sentinel://[user:password@]host[:port][,host[:port]...][/service][/db][?arguments]

As in langchain-redis and redisvl, user and password are those of Redis and of the Sentinels. Where they differ,
`sentinel_username` and `sentinel_password` among the arguments are the Sentinels'; an empty one is none. All other
arguments are redis-py's, e.g. `ssl_ca_certs`. `rediss+sentinel://` speaks TLS to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.sentinel
from redis.connection import parse_url

from langchain_aegis.errors import AegisConfigError
from langchain_aegis.settings import redact_url

SCHEMES: Final = ("redis+sentinel://", "rediss+sentinel://")
_PORT: Final = 26379
_SERVICE: Final = "mymaster"
_OWN: Final = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True, slots=True)
class Sentinels:
    """Who watches a Redis.

    Attributes:
        places: Host and port of each.
        service: What they call the Redis.
        told: Arguments of redis-py's connections to the Redis.
        asked: Arguments of those to the Sentinels.
        tls: Whether both are over TLS.
    """

    places: tuple[tuple[str, int], ...]
    service: str
    told: dict[str, Any]
    asked: dict[str, Any]
    tls: bool

    def client(self, **more: Any) -> redis.Redis:
        """Return a client of the master, whichever server that is; nothing is connected yet.

        Args:
            more: Further arguments of redis-py's connections, to the Redis and to the Sentinels.
        """
        tls = {"ssl": True} if self.tls else {}
        watching = redis.sentinel.Sentinel(self.places, sentinel_kwargs={**self.asked, **tls, **more})
        made: redis.Redis = watching.master_for(self.service, **self.told, **tls, **more)
        return made


def sentinels_of(url: str) -> Sentinels | None:
    """Return whom an address names, or None if it is none of Sentinels.

    Raises:
        AegisConfigError: It cannot be read; the message quotes neither user nor password.
    """
    if not url.startswith(SCHEMES):
        return None
    try:
        return _read(url)
    except ValueError as exc:
        raise AegisConfigError(
            f"redis_url cannot be read: {redact_url(url)!r} (try redis+sentinel://host:26379,host:26379/{_SERVICE}/0)"
        ) from exc


def _read(url: str) -> Sentinels:
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    named = [unquote(part) for part in parts.path.strip("/").split("/") if part]
    service, db = (*named, *(_SERVICE, "0")[len(named) :])  # more parts than two are an error
    arguments = parse_qsl(parts.query, keep_blank_values=True)
    own = {name.removeprefix("sentinel_"): value for name, value in arguments if name in _OWN}
    tls = parts.scheme.startswith("rediss")
    query = urlencode([pair for pair in arguments if pair[0] not in _OWN])
    told: dict[str, Any] = dict(
        parse_url(f"redis{'s' if tls else ''}://{login}{at}host:1/{int(db)}{'?' if query else ''}{query}")
    )
    for place in ("host", "port", "connection_class"):
        told.pop(place, None)
    shared = {name: value for name, value in told.items() if name.startswith("ssl_")}
    who: dict[str, Any] = {name: told[name] for name in ("username", "password") if name in told}
    who = {name: value for name, value in {**who, **own}.items() if value}
    return Sentinels(tuple(map(_place, hosts.split(","))), service, told, {**shared, **who}, tls)


def _place(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.username is not None:
        raise ValueError("not a host and a port")
    return parts.hostname, parts.port or _PORT
