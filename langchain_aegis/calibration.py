"""Which cosine similarity an embedder must reach before the guards are asked at all.

Cosines of two embedders do not compare: unrelated questions have 0.0 with one and 0.8 with another. So an embedder is
measured with labelled pairs, and the thresholds that were found are kept for it.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import math
import os
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from langchain_core.embeddings import Embeddings

from langchain_aegis import lexicon
from langchain_aegis import pairs as packaged
from langchain_aegis.embedder import embedder_name
from langchain_aegis.errors import AegisConfigError
from langchain_aegis.home import aegis_home
from langchain_aegis.notices import warn_once
from langchain_aegis.pairs import Pair
from langchain_aegis.questions import exact_only_reason
from langchain_aegis.settings import MODES, AegisSettings
from langchain_aegis.vectors import pack, similarities
from langchain_aegis.verification import CLOSE, FAR, NEAR, compare, nearness, profile

TARGETS: Mapping[str, float] = {"strict": 0.015, "balanced": 0.03, "lenient": 0.05}
LOWEST = 0.5  # as for `min_similarity=`: below, two questions hardly share a topic

_BATCH = 64
_PROBES = ("How many days of notice does the contract ask for?", "Wie lange läuft der Vertrag?")
_SAME = 0.999  # cosine of vectors of one text: floats differ between hosts, models differ more
_TELLS_APART = 0.9
_UNRELATED = 0.999  # quantile
_MARGIN = 0.05
_UNRELATED_TEXTS = 200

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Share:
    """How many of how many."""

    count: int
    of: int

    @property
    def rate(self) -> float:
        """The share, in [0, 1]; 0 of nothing."""
        return self.count / self.of if self.of else 0.0

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Return Wilson's interval of the rate that the share is a sample of; 95 % for z = 1.96."""
        if not self.of:
            return 0.0, 1.0
        n, p = self.of, self.rate
        middle = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass(frozen=True, slots=True)
class Measured:
    """One pair as an embedder and the guards see it.

    Attributes:
        pair: The questions.
        similarity: Their cosine.
        reasons_by_nearness: Why it is not served at a threshold, by its `verification.nearness` there.
    """

    pair: Pair
    similarity: float
    reasons_by_nearness: tuple[tuple[str, ...], ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not served at any threshold: codes of question rules, "guard:..."; mostly empty."""
        return self.reasons_by_nearness[CLOSE]

    def reasons_at(self, threshold: float) -> tuple[str, ...]:
        """Return why it is not served at a threshold that it reaches."""
        return self.reasons_by_nearness[nearness(self.similarity, threshold)]


@dataclass(frozen=True, slots=True)
class Served:
    """What a threshold lets through.

    Attributes:
        traps: Served although the answer is another.
        paraphrases: Served rightly.
        plain_traps: Served by the cosine alone, without guards and question rules.
        plain_paraphrases: The same for paraphrases.
    """

    traps: Share
    paraphrases: Share
    plain_traps: Share
    plain_paraphrases: Share


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """What one mode does with an embedder.

    Attributes:
        threshold: Lowest cosine that is served.
        bound_by: The rule that set it: "traps", "exposure", "unrelated" or "lowest", see `calibrate`.
        served: Of all pairs.
        by_language: The same by language.
    """

    threshold: float
    bound_by: str
    served: Served
    by_language: Mapping[str, Served]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The thresholds of one embedder, and how they were found.

    Attributes:
        name: Of the embedder.
        dimensions: Of its vectors.
        probe: Its float16 vector of a fixed sentence; another model under the same name has another.
        date: When it was measured: UTC, ISO 8601.
        guards: Fingerprint of the guards' vocabulary at that time, in hex.
        unrelated: Cosine that 999 of 1,000 pairs of unrelated questions stay below.
        separation: Probability that a paraphrase has a higher cosine than an unrelated pair.
        modes: Figures by mode.
    """

    name: str
    dimensions: int
    probe: bytes
    date: str
    guards: str
    unrelated: float
    separation: float
    modes: Mapping[str, ModeFigures]

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"probe": base64.b64encode(self.probe).decode()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `as_dict` made. Raises LookupError, TypeError or ValueError for anything else."""
        modes: dict[str, ModeFigures] = {mode: _read_figures(data["modes"][mode]) for mode in MODES}
        return cls(
            str(data["name"]), int(data["dimensions"]), base64.b64decode(data["probe"], validate=True),
            str(data["date"]), str(data["guards"]), float(data["unrelated"]), float(data["separation"]), modes,
        )  # fmt: skip


def calibrate(
    embeddings: Embeddings,
    *,
    name: str | None = None,
    pairs: Sequence[Pair] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure an embedder and find its threshold for each mode. Blocks: every text is embedded once.

    A threshold is the lowest cosine (four decimals) that meets all of these:

    1. traps: of the traps, guards and question rules on, at most 1.5 % (strict), 3 % (balanced) or 5 % (lenient) are
       served: not only as counted, but by the upper end of the 95 % interval.
    2. exposure: the guards were developed on these very pairs, so the first rule is easier here than in use; it alone
       would drive thresholds to the floor. How many traps that nobody has seen get past the guards grows with how many
       reach them. So no more may reach them than with all-MiniLM-L6-v2 at the thresholds that were chosen for it
       (`exposure` in thresholds.toml). This counts ranks and works for every scale of cosines; an embedder that keeps
       traps farther away may find more.
    3. unrelated: it lies above the cosine of 999 of 1,000 pairs of unrelated questions, by a twentieth of the way from
       there to 1.
    4. lowest: never below 0.5, as `min_similarity=`.

    All but the last move along when cosines are stretched or shifted, so that the same pairs are served.

    Args:
        embeddings: Asked as the cache asks it: for vectors of queries.
        name: What the embedder is called; default as the cache calls it.
        pairs: Own pairs instead of the packaged ones.
        progress: Called with how many texts are done, and how many there are.

    Raises:
        AegisConfigError: The embedder does not tell questions apart, its vectors cannot be used, or the pairs are too
            few.
    """
    judged = packaged.load() if pairs is None else tuple(pairs)
    allowed = {mode: _allowed(TARGETS[mode], sum(not pair.duplicate for pair in judged)) for mode in MODES}
    vectors = embed_texts(embeddings, [text for pair in judged for text in (pair.cached, pair.new)], progress)
    measured = measure(judged, vectors)
    apart = _unrelated(judged, vectors)
    traps = sorted((m.similarity for m in measured if not m.pair.duplicate), reverse=True)
    passing = sorted((m.similarity for m in measured if not m.pair.duplicate and not m.reasons), reverse=True)
    alike = [m.similarity for m in measured if m.pair.duplicate]
    if not alike or not apart:
        raise AegisConfigError("calibration needs traps and paraphrases, of several components")
    if (separation := _separation(alike, apart)) < _TELLS_APART:
        raise AegisConfigError(
            f"this embedder does not tell questions apart: a paraphrase is nearer than an unrelated question in only "
            f"{separation:.0%} of the cases (all-minilm-l6-v2: 99 %). Use another model"
        )
    beyond = apart[int(len(apart) * _UNRELATED)]
    exposure = lexicon.read("thresholds.toml")["exposure"]
    modes: dict[str, ModeFigures] = {}
    for mode in MODES:
        rules = {
            "traps": _above(passing, allowed[mode]),
            "exposure": _above(traps, int(exposure[mode] * len(traps))),
            "unrelated": beyond + _MARGIN * (1 - beyond),
            "lowest": LOWEST,
        }
        bound_by = max(rules, key=lambda rule: rules[rule])
        threshold = math.ceil(rules[bound_by] * 10_000) / 10_000
        if threshold > 1:
            raise AegisConfigError("this embedder does not tell questions apart: traps have the vector of their twin")
        by_language = {
            lang: served((m for m in measured if m.pair.lang == lang), threshold)
            for lang in sorted({pair.lang for pair in judged}, reverse=True)
        }
        modes[mode] = ModeFigures(threshold, bound_by, served(measured, threshold), by_language)
    probe = vectors[_PROBES[0]]
    return Calibration(
        name or embedder_name(embeddings), len(probe) // 2, probe, datetime.now(UTC).isoformat(timespec="seconds"),
        lexicon.lexicon().fingerprint.hex(), beyond, separation, modes,
    )  # fmt: skip


def embed_texts(embeddings: Embeddings, texts: Iterable[str], progress: Progress | None = None) -> dict[str, bytes]:
    """Return each text's vector, as float16 of length 1.

    In batches, unless the embedder makes other vectors of documents than of queries.

    Raises:
        AegisConfigError: A vector has no direction, or another length than the others.
    """
    todo = list(dict.fromkeys([*_PROBES, *texts]))
    vectors = {probe: _packed(embeddings.embed_query(probe)) for probe in _PROBES}
    as_documents = [_packed(vector) for vector in embeddings.embed_documents(list(_PROBES))]
    symmetric = all(
        similarities(vectors[probe], [other])[0] >= _SAME for probe, other in zip(_PROBES, as_documents, strict=True)
    )
    for start in range(0, len(todo), _BATCH):
        batch = todo[start : start + _BATCH]
        made = embeddings.embed_documents(batch) if symmetric else map(embeddings.embed_query, batch)
        vectors.update(zip(batch, map(_packed, made), strict=True))
        if progress is not None:
            progress(start + len(batch), len(todo))
    if len({len(vector) for vector in vectors.values()}) > 1:
        raise AegisConfigError("the embedder returned vectors of several lengths")
    return vectors


def measure(
    judged: Iterable[Pair], vectors: Mapping[str, bytes], *, off: frozenset[str] = frozenset()
) -> list[Measured]:
    """Return what the embedder and the guards make of each pair.

    Args:
        judged: The pairs.
        vectors: Packed vectors by text.
        off: Guards that are not to block.
    """
    found = []
    for pair in judged:
        rules = [reason for text in (pair.cached, pair.new) if (reason := exact_only_reason(text)) is not None]
        cached, new, told = profile(pair.cached), profile(pair.new), tuple(dict.fromkeys(rules))
        reasons = tuple(
            (*told, *(f"guard:{guard}" for guard in compare(cached, new, off=off, near=room)))
            for room in (FAR, NEAR, CLOSE)
        )
        found.append(Measured(pair, similarities(vectors[pair.new], [vectors[pair.cached]])[0], reasons))
    return found


def served(measured: Iterable[Measured], threshold: float) -> Served:
    """Return what is served of the pairs at a threshold."""
    counts = {(side, what): 0 for side in (False, True) for what in ("all", "plain", "served")}
    for one in measured:
        side = one.pair.duplicate
        counts[side, "all"] += 1
        if one.similarity >= threshold:
            counts[side, "plain"] += 1
            counts[side, "served"] += not one.reasons_at(threshold)
    return Served(
        *(Share(counts[side, what], counts[side, "all"]) for what in ("served", "plain") for side in (False, True))
    )


def calibrated(embeddings: Embeddings, settings: AegisSettings | None = None) -> Calibration | None:
    """Return what was measured for this embedder, or None.

    Looks into the file that `AEGIS_CALIBRATION` names, else into `calibration.json` in the home directory. Blocks: it
    asks the embedder for one vector, if a file knows its name. A file that cannot be used is a warning.
    """
    name = embedder_name(embeddings)
    for path in _files(settings):
        try:
            known = read(path).get(name)
        except (AegisConfigError, OSError) as exc:
            warn_once("calibration_file", f"{path} is not used ({exc}); run `aegis cache calibrate` again")
            continue
        if known is None:
            continue
        probe = pack(embeddings.embed_query(_PROBES[0]))
        if probe is None or not similarities(known.probe, [probe])[0] >= _SAME:
            warn_once(
                f"calibration_model:{name}",
                f"{path} was measured with another model under the name {name!r}, so it is not used; "
                "run `aegis cache calibrate` again",
            )
            continue
        if known.guards != lexicon.lexicon().fingerprint.hex():
            warn_once(
                f"calibration_stale:{name}",
                f"the guards have changed since {name!r} was calibrated ({known.date[:10]}); "
                "run `aegis cache calibrate` again",
            )
        return known
    return None


def thresholds(embedder: str, mode: str, known: Calibration | None = None) -> tuple[float, bool]:
    """Return the similarity from which on a candidate is worth verifying.

    Args:
        embedder: Name of the embedding model.
        mode: "strict", "balanced" or "lenient".
        known: What `calibrated` returned for it; wins over the thresholds that come with the package.

    Returns:
        The cosine similarity, and whether it was measured for this embedder.

    Raises:
        ValueError: There is no such mode.
    """
    if known is not None and mode in known.modes:
        return known.modes[mode].threshold, True
    return lexicon.thresholds(embedder, mode)


def save(found: Calibration, path: Path | None = None, settings: AegisSettings | None = None) -> Path:
    """Keep a calibration beside those of other embedders; one of the same name is replaced.

    Args:
        found: What is kept.
        path: Where; default `calibration.json` in the home directory. Such a file may be copied to other hosts, and
            named there by `AEGIS_CALIBRATION`.
        settings: May name the home directory.

    Returns:
        The file, mode 0600. Readers see the old one or all of the new one.

    Raises:
        AegisConfigError: It cannot be written, or is there already and is none of ours.
    """
    path = aegis_home(settings) / "calibration.json" if path is None else path
    try:
        with _alone(path.parent):
            known = read(path) if path.exists() else {}
            known[found.name] = found
            data = {"v": 1, "embedders": {name: one.as_dict() for name, one in sorted(known.items())}}
            fresh = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(data, file, ensure_ascii=False, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as exc:
        raise AegisConfigError(f"the calibration {path} cannot be kept ({exc})") from exc
    return path


def read(path: Path) -> dict[str, Calibration]:
    """Return the calibrations in a file, by the embedder's name.

    Raises:
        AegisConfigError: It is no such file.
        OSError: It cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["v"] != 1:
            raise ValueError(f"version {data['v']}")
        return {str(name): Calibration.from_dict(one) for name, one in data["embedders"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise AegisConfigError(f"{path} holds no calibration of this version") from exc


def _read_figures(data: Mapping[str, Any]) -> ModeFigures:
    threshold = float(data["threshold"])
    if not LOWEST <= threshold <= 1:
        raise ValueError(f"a threshold of {threshold}")
    by_language = {str(lang): _read_served(one) for lang, one in data["by_language"].items()}
    return ModeFigures(threshold, str(data["bound_by"]), _read_served(data["served"]), by_language)


def _read_served(data: Mapping[str, Any]) -> Served:
    return Served(**{name: Share(int(one["count"]), int(one["of"])) for name, one in data.items()})


def _files(settings: AegisSettings | None) -> Iterator[Path]:
    if told := os.environ.get("AEGIS_CALIBRATION", "").strip():
        yield Path(told).expanduser()
    own = aegis_home(settings) / "calibration.json"
    if own.exists():
        yield own


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep two processes from writing at once: the later would drop what the earlier found."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _packed(vector: Sequence[float]) -> bytes:
    if (packed := pack(vector)) is None:
        raise AegisConfigError("the embedder returned a vector without a direction (zeros, NaN or infinity)")
    return packed


def _unrelated(judged: Sequence[Pair], vectors: Mapping[str, bytes]) -> list[float]:
    """Return cosines of questions of different components, in rising order."""
    one_each = list({pair.component: pair.cached for pair in judged}.values())
    step = max(1, len(one_each) // _UNRELATED_TEXTS)  # from all over the data, always the same
    chosen = [vectors[text] for text in one_each[::step]]
    return sorted(value for at, vector in enumerate(chosen) for value in similarities(vector, chosen[at + 1 :]))


def _separation(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Return how probably one of `higher` exceeds one of `lower` (in rising order); equals count half."""
    return sum(bisect_left(lower, x) + bisect_right(lower, x) for x in higher) / (2 * len(higher) * len(lower))


def _allowed(target: float, traps: int) -> int:
    """Return how many traps may be served so that the interval of their rate ends at `target`."""
    count = -1
    while count < traps and Share(count + 1, traps).interval()[1] <= target:
        count += 1
    if count < 0:
        raise AegisConfigError(f"{traps} traps are too few to show that {target:.1%} are served")
    return count


def _above(falling: Sequence[float], count: int) -> float:
    """Return the lowest threshold that at most `count` of the cosines reach."""
    return math.nextafter(falling[count], math.inf) if count < len(falling) else 0.0
