"""What an answer must not be, and what the cases came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MAX_REFUSAL_BYTES = 4096
_MAX_SHOWN = 10


@dataclass
class Verdict:
    """Counts of cases by status, and every answer that is wrong."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    largest_refusal_bytes: int = 0

    @property
    def cases(self) -> int:
        """How many there were."""
        return self.statuses.total()

    @property
    def server_errors(self) -> int:
        """Answers of status 500 and above, and requests that got none."""
        return sum(n for status, n in self.statuses.items() if status >= 500 or status == 0)

    def judge(self, kind: str, what: str, status: int, content_type: str, body: bytes) -> None:
        """Count one answer; `status` is 0 where none came."""
        self.statuses[status] += 1
        self.kinds[kind] += 1
        if status >= 500 or status == 0:
            self.accuse(f"{what}: {status or 'no answer'} {body[:200]!r}")
        if 400 <= status < 500:
            self.largest_refusal_bytes = max(self.largest_refusal_bytes, len(body))
            if len(body) >= MAX_REFUSAL_BYTES:
                self.accuse(f"{what}: {status} of {len(body)} bytes")
            if body and content_type != "application/problem+json":
                self.accuse(f"{what}: {status} is {content_type!r}, not a problem")

    def accuse(self, what: str) -> None:
        """Remember what was wrong."""
        self.wrong.append(what)

    def report(self) -> str:
        """The first wrong answers, a line each."""
        rest = len(self.wrong) - _MAX_SHOWN
        shown = self.wrong[:_MAX_SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
        return "\n".join(shown)
