"""Lend a process slots that it shares with others, by leases in Redis.

One thread of the process asks for all of its calls: which of them runs is decided in the process when a slot comes, so
nobody but that thread ever waits for Redis. A ring of its bell is all that a call costs where it is made. The thread
says in one round trip what the process uses, gives back and wants (`slot_scripts.TURN`), and is then either lent slots
at once, or told later, by a message on the channel that it has subscribed to: it does not ask again and again.

It asks all the same once in a while: each second while calls wait, and when a lease of somebody ends who may have died,
for nobody tells of that. Where nothing is pushed (before Redis 6, or where `SUBSCRIBE` is forbidden), it asks every
20 ms while calls wait.

While Redis does not answer, the process goes on with its share of the slots: as many as would be each one's if all
workers that were last seen had the same. It counts again what it then uses as soon as Redis is back, and takes no more
than its share until the others will have done so.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import secrets
import select
import socket
import threading
import time
import weakref
from typing import Any, Final

from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from langchain_aegis.admission import Admission
from langchain_aegis.forks import reset_after_fork
from langchain_aegis.notices import logger, warn_once
from langchain_aegis.settings import AegisSettings
from langchain_aegis.shared_admission import SharedAdmission
from langchain_aegis.slot_link import SlotLink, dialing
from langchain_aegis.slot_scripts import names_of, read_turn, turn

_PATIENCE_S: Final = 1.0  # for an answer: calls that wait for a slot take seconds, and a busy machine answers late
_ASK_AGAIN_S: Final = 1.0  # while calls wait
_POLL_S: Final = 0.02  # the same where nothing is pushed
_RENEWED: Final = 3  # times in the length of a lease
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 1.0  # before another connection is made
_REFUSED_PAUSE_S: Final = 5.0
_CAUTIOUS_S: Final = 1.5  # longer than the last pause: so long after Redis is back others may not have been counted
_GOODBYE_S: Final = 0.3


class _Share:
    """One process's part of one server's slots: what its admission asks, and what it was lent."""

    def __init__(self, lender: SlotLender, names: tuple[str, str, str]) -> None:
        self._lender = lender
        self.names = names
        self.admission: weakref.ref[SharedAdmission] | None = None
        self.reset()

    def reset(self) -> None:
        """Be another worker."""
        self.worker = secrets.token_hex(8)
        self.slots: list[str] = []  # names of those that are this worker's, as far as it knows
        self.changed = True  # something may be needed, or not any more
        self.joined = False  # what it uses was counted over the connection that there is now
        self.due_s = 0.0
        self.cautious_until_s: float | None = None  # till then no more than its share is wanted; inf: nobody is asked
        self._numbers = itertools.count(1)

    def look(self, admission: SharedAdmission) -> bool:
        """Note that an admission needs more slots, or fewer; returns whether somebody will see to that."""
        self.changed = True
        return self._lender.ring()

    def living(self) -> SharedAdmission | None:
        """Return the admission, unless nobody uses it any more."""
        return None if self.admission is None else self.admission()

    def own(self) -> str:
        """Return a name for a slot that was taken while nobody could be asked."""
        return f"{self.worker}:own{next(self._numbers)}"


class SlotLender:
    """Lends slots of several servers to one process.

    Args:
        url: Of the Redis where they are counted.
        namespace: First part of every name.
        lease_s: After which the slots of a process that says nothing are free again.

    Raises:
        AegisConfigError: The URL cannot be used.
    """

    def __init__(self, url: str, namespace: str, lease_s: float) -> None:
        self._make = dialing(url, _PATIENCE_S)
        self._namespace = namespace
        self._lease_ms = round(lease_s * 1000)
        self._shares: list[_Share] = []
        self._link: SlotLink | None = None
        self._bell: socket.socket | None = None
        self._rope: socket.socket | None = None
        self._says_goodbye = False
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        """Start afresh: in the child of a fork, connection, thread and slots are the parent's, who does not notice."""
        for inherited in (self._bell, self._rope):
            if inherited is not None:
                inherited.close()
        if self._link is not None:
            with contextlib.suppress(Exception):  # it may be half made
                self._link.abandon()
        self._link = self._bell = self._rope = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._rung = self._closing = self._ended = self._pushes = False
        self._channel = f"{self._namespace}:slots:{secrets.token_hex(8)}"
        for share in self._shares:
            share.reset()

    def admission(self, server: str) -> SharedAdmission:
        """Return a new admission for a server, by its address, that is lent its slots here."""
        share = _Share(self, names_of(self._namespace, server))
        made = SharedAdmission(share)
        share.admission = weakref.ref(made)
        with self._lock:
            self._shares.append(share)
        return made

    def ring(self) -> bool:
        """Have the thread look at what has changed; returns whether there is one, or one can be started."""
        if self._ended or (self._thread is None and not self._start()):
            return False
        if not self._rung:
            self._rung = True
            rope = self._rope
            with contextlib.suppress(OSError):  # it has not heard the last ring yet
                if rope is not None:
                    rope.send(b"!")
        return True

    def close(self, timeout_s: float = _GOODBYE_S) -> None:
        """Give everything back and end the thread; what is called from now on goes on alone."""
        thread = self._thread
        if thread is not None and not self._closing:
            self._closing, self._rung = True, False
            self.ring()
            thread.join(timeout_s)

    def _start(self) -> bool:
        with self._lock:
            if self._thread is not None:
                return True
            if self._closing:
                return False
            self._bell, self._rope = socket.socketpair()
            self._bell.setblocking(False)
            self._rope.setblocking(False)
            thread = threading.Thread(target=self._run, name="aegis-slots", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is about to end
                return False
            self._thread = thread
        if not self._says_goodbye:
            self._says_goodbye = True
            atexit.register(self.close)
        return True

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._lend()
        self._ended = True
        for end in (self._bell, self._rope):
            if end is not None:
                end.close()
        for share in tuple(self._shares):
            if (admission := share.living()) is not None:
                admission.part()

    def _lend(self) -> None:
        pause_s, broke = 0.0, False
        while not self._closing:
            self._rest(pause_s)
            link: SlotLink | None = None
            served, since_s = False, 0.0
            try:
                assert self._bell is not None  # noqa: S101  # made before the thread
                link = self._link = SlotLink(self._make, self._bell, _PATIENCE_S)
                self._pushes = link.subscribe(self._channel)
                for share in tuple(self._shares):
                    share.joined = False
                    self._turn(link, share)
                served, broke, pause_s, since_s = True, False, 0.0, time.monotonic()
                self._serve(link)
            except Exception as exc:  # nobody is there to catch it, whatever it is: then nothing is shared for now
                # A connection that merely ended is made anew at once; calls wait so long.
                if served and not broke and not isinstance(exc, (RedisTimeoutError, ResponseError)):
                    broke, pause_s = True, 0.0 if time.monotonic() - since_s > _LAST_PAUSE_S else _FIRST_PAUSE_S
                else:
                    self._part(exc)
                    last_s = _REFUSED_PAUSE_S if isinstance(exc, ResponseError) else _LAST_PAUSE_S
                    pause_s = min(last_s, max(_FIRST_PAUSE_S, 2 * pause_s))
            finally:
                self._link = None
                if link is not None:
                    link.close()

    def _serve(self, link: SlotLink) -> None:
        """Lend until the process ends. Raises RedisError, OSError, or what comes of a reply that is none of ours."""
        while not self._closing:
            due_s = time.monotonic() + 60.0
            for share in tuple(self._shares):
                if share.changed or time.monotonic() >= share.due_s:
                    self._turn(link, share)
                due_s = min(due_s, 0.0 if share.changed else share.due_s)
            while link.pushed:
                self._given(link.pushed.popleft().decode(errors="replace"))
                due_s = 0.0
            link.wait(due_s - time.monotonic())
            self._hear()
        for share in tuple(self._shares):
            self._say_goodbye(link, share)

    def _turn(self, link: SlotLink, share: _Share) -> None:
        """Say what a worker uses and wants, and pass on what it is lent."""
        share.changed = False  # before the look: what changes from now on is looked at again
        admission = share.living()
        if admission is None:
            with self._lock:
                self._shares.remove(share)
            self._say_goodbye(link, share)
            return
        if not share.joined:
            used = admission.rejoin()
            share.slots += [share.own() for _ in range(used - len(share.slots))]
        plan, asked_s = admission.plan(), time.monotonic()
        want = plan.want
        if share.cautious_until_s is not None:
            if not share.joined:
                share.cautious_until_s = asked_s + _CAUTIOUS_S
            if asked_s < share.cautious_until_s:
                want = min(want, max(0, admission.share - plan.lent))
            else:
                share.cautious_until_s = None
        # In this order: of those that were lent at different times, the oldest are given back last.
        kept, dropped = share.slots[: plan.lent], share.slots[plan.lent :]
        told = read_turn(
            _reply(link, turn(
                share.names, share.worker, channel=self._channel if self._pushes else "", lease_ms=self._lease_ms,
                limit=admission.max_concurrency, leave=plan.leave, want=want, kept=kept, dropped=dropped,
            ))
        )  # fmt: skip
        if told.lost and share.joined:
            warn_once(
                "slots_lost",
                "this process was silent for longer than its slots were leased: others may have used them meanwhile. "
                "It counts them again; AEGIS_SLOT_LEASE_S gives it longer",
            )
        share.joined, share.slots = True, told.slots
        new = len(told.slots) - plan.lent
        admission.lend(new, told.workers)
        wait_s = self._lease_ms / 1000 / _RENEWED
        if new < want:
            wait_s = min(wait_s, _ASK_AGAIN_S if self._pushes else _POLL_S, told.soonest_s + 0.002)
        share.due_s = min(asked_s + wait_s, share.cautious_until_s or math.inf)

    def _given(self, slot: str) -> None:
        """Pass on a slot that was pushed."""
        worker = slot.partition(":")[0]
        for share in self._shares:
            if share.worker == worker and slot not in share.slots:
                share.slots.append(slot)
                if (admission := share.living()) is not None:
                    admission.lend(1)  # which says so if it is not needed any more

    def _say_goodbye(self, link: SlotLink, share: _Share) -> None:
        """Give back all that a worker has: it goes."""
        _reply(link, turn(share.names, share.worker, channel="", lease_ms=0, limit=0, leave=0, want=0, kept=(),
                          dropped=share.slots))  # fmt: skip

    def _part(self, exc: Exception) -> None:
        """Have each admission go on alone."""
        logger.debug("slots are not shared for now", exc_info=exc)
        shares = [(share, admission) for share in tuple(self._shares) if (admission := share.living()) is not None]
        if shares:
            warn_once(
                "slots_not_shared",
                f"Redis does not lend slots ({type(exc).__name__}): this process goes on with its share of them until "
                "it does. See `aegis doctor`",
            )
        for share, admission in shares:
            share.joined, share.cautious_until_s = False, math.inf
            admission.part()

    def _rest(self, pause_s: float) -> None:
        """Wait before another connection is made."""
        until_s = time.monotonic() + pause_s
        poll = select.poll()
        if self._bell is not None:
            poll.register(self._bell, select.POLLIN)
        while not self._closing and (left_s := until_s - time.monotonic()) > 0:
            poll.poll(left_s * 1000)
            self._hear()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._bell is not None and self._bell.recv(4096):
                pass
        # Between the two: who rings before this has not been heard, but what he has changed is looked at next.
        self._rung = False


def _reply(link: SlotLink, command: tuple[Any, ...]) -> Any:
    (reply,) = link.ask(command)
    if isinstance(reply, Exception):
        raise reply if isinstance(reply, RedisError) else ResponseError(str(reply))
    return reply


class _Lenders:
    """The lenders of this process, by where slots are counted."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, str, float], SlotLender] = {}
        self.reset()
        reset_after_fork(self)

    def reset(self) -> None:
        self.lock = threading.Lock()


_lenders: Final = _Lenders()


def admission_at(server: str) -> Admission:
    """Return a new admission for a server: one whose slots are shared, if `AEGIS_SHARED_SLOTS` says so.

    Raises:
        AegisConfigError: A setting cannot be used.
    """
    settings = AegisSettings.from_env()
    if not settings.shared_slots:
        return Admission()
    told = settings.redis_url, settings.namespace, settings.slot_lease_s
    with _lenders.lock:
        if (lender := _lenders.made.get(told)) is None:
            lender = _lenders.made[told] = SlotLender(*told)
    made = lender.admission(server)
    # Until others are seen: how many workers there are is said to each by whoever starts them, as a rule.
    workers = os.environ.get("WEB_CONCURRENCY", "")
    if workers.isdecimal() and int(workers) > 0:
        made.lend(0, int(workers))
    return made
