"""What must hold of each answer and of memory, and the account of what came. Knows no socket and no clock.

A *promise* is broken by an answer with a foreign id, an answer that neither tier gives to that text, a private text that
left the device, a status that the caller gave no cause for, a caller without an answer, and memory that grows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: A label and its confidence: they tell the texts apart, so that an answer of another caller shows.
Verdict = tuple[str, float]
#: Confidences agree across batch sizes to about 1e-6; answers of other texts differ by more.
TOLERANCE = 1e-3
#: Examples kept of each kind of breach.
EXAMPLES = 5
#: Refusals that an overloaded, waiting or draining daemon may give to a valid request.
REFUSALS = {429: "refused: full", 503: "refused: unavailable", 504: "refused: late"}


@dataclass(frozen=True)
class Known:
    """What each tier says of one text when nothing else runs."""

    local: Verdict
    cloud: tuple[Verdict, ...] = ()  # the cloud's own answer, and the fusion of both

    def allows(self, verdict: Verdict, origin: str) -> bool:
        """Whether `verdict` may come from `origin`; a cached one may be of either tier, as an unnamed one."""
        allowed = {"local": (self.local,), "cloud": self.cloud}.get(origin, (self.local, *self.cloud))
        return any(
            verdict[0] == label and abs(verdict[1] - confidence) <= TOLERANCE for label, confidence in allowed
        )


@dataclass(frozen=True)
class Asked:
    """One valid request: its id, its texts, and whether they must stay on the device."""

    id: str
    texts: Sequence[str]
    is_private: bool = False


@dataclass
class Account:
    """Counts how requests ended, and keeps the promises that were broken, with examples."""

    endings: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind of caller, how it ended)
    origins: Counter[str] = field(default_factory=Counter)  # rows
    breaches: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    rows_asked: int = 0
    rows_answered: int = 0

    def ended(self, kind: str, how: str) -> None:
        """Count one caller."""
        self.endings[kind, how] += 1

    def breach(self, promise: str, example: str) -> None:
        """Count one broken promise."""
        self.breaches[promise] += 1
        kept = self.examples.setdefault(promise, [])
        if len(kept) < EXAMPLES and example not in kept:
            kept.append(example)

    def answered(
        self, kind: str, asked: Asked, status: int, reply: Mapping[str, Any], known: Mapping[str, Known]
    ) -> None:
        """Judge one answer to a valid request."""
        if status in REFUSALS:
            self.ended(kind, REFUSALS[status])
            if "error" not in reply:
                self.breach("a refusal says why", f"{kind} {asked.id}: {status} {reply}")
            return
        if status != 200:
            self.ended(kind, f"status {status}")
            self.breach("a valid request is answered or refused", f"{kind} {asked.id}: {status} {reply}")
            return
        self.ended(kind, "answered")
        if reply.get("id") != asked.id:
            self.breach("no answer with a foreign id", f"{kind}: {reply.get('id')} instead of {asked.id}")
        self._judge_rows(asked, reply, known)

    def _judge_rows(self, asked: Asked, reply: Mapping[str, Any], known: Mapping[str, Known]) -> None:
        outputs = {output["name"]: output["data"] for output in reply.get("outputs", ())}
        labels, confidences = outputs.get("intent", ()), outputs.get("confidence", ())
        origins = origins_of(reply, len(asked.texts))
        if not len(labels) == len(confidences) == len(origins) == len(asked.texts):
            self.breach("each row has its answer", f"{asked.id}: {len(labels)} of {len(asked.texts)} rows")
            return
        self.rows_answered += len(asked.texts)
        self.origins.update(origins)
        for text, label, confidence, origin in zip(asked.texts, labels, confidences, origins, strict=True):
            if not known[text].allows((label, confidence), origin):
                self.breach(
                    "no wrong intent",
                    f"{asked.id} {text!r}: {label} {confidence:.4f} ({origin}); {known[text]}",
                )
            if asked.is_private and origin == "cloud":
                self.breach("a private text stays on the device", f"{asked.id} {text!r}")

    def total(self, how: str) -> int:
        """How many callers ended so."""
        return sum(count for (_, ending), count in self.endings.items() if ending == how)


def origins_of(reply: Mapping[str, Any], rows: int) -> list[str]:
    """The origin of each row: one word for all, or one for each; "unnamed" where the reply gives only counts."""
    said = reply.get("parameters", {}).get("origin")
    words = said.split(",") if isinstance(said, str) else ["unnamed"]
    return words * rows if len(words) == 1 else words


def growth(series: Sequence[float], warm: int) -> float:
    """By which part of its first value after `warm` values a series of memory has grown at its end.

    Where there are six and more, both are the median of three, since one reading may fall on a moment of work.
    """
    settled = series[warm:]
    if len(settled) < 2:
        return 0.0
    width = 3 if len(settled) >= 6 else 1
    first, last = sorted(settled[:width])[width // 2], sorted(settled[-width:])[width // 2]
    return last / first - 1
