"""What a tuning did, for people and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from flashloom.records import Record
from flashloom.store import digest

__all__ = ["Outcome", "Report", "short"]


@dataclass(frozen=True)
class Outcome:
    """Of one key. status: "tuned" now, "known" before, "taken" from another rank, or "left" (then `note` says why).
    record: the answer, None where there is none."""

    label: str
    shapes: tuple[str, ...]
    status: str
    record: Record | None = None
    note: str = ""

    @property
    def regret(self) -> float:
        """By how much the default is slower than what won: 0 where it stayed."""
        return 0.0 if self.record is None else max(self.record.speedup - 1.0, 0.0)


@dataclass
class Report:
    """All keys of one `tune`. seconds: how long it took; errors: what went wrong between ranks."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Keys of this status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def complete(self) -> bool:
        """Whether every key has a record for which all candidates were tried."""
        return all(outcome.record is not None and outcome.record.complete for outcome in self.outcomes)

    @property
    def digest(self) -> str:
        """Of all keys and configs: equal where the same configs serve."""
        return digest(sorted((o.record.key.request, dict(o.record.config)) for o in self.outcomes if o.record))

    @property
    def regret(self) -> float:
        """By how much the defaults are slower than what won, geometric mean over keys."""
        ratios = [1 + outcome.regret for outcome in self.outcomes if outcome.record is not None]
        return statistics.geometric_mean(ratios) - 1 if ratios else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "seconds": round(self.seconds, 3),
            "regret": round(self.regret, 4),
            "digest": self.digest,
            "errors": self.errors,
            "keys": [
                {"label": o.label, "shapes": list(o.shapes), "status": o.status, "note": o.note}
                | ({} if o.record is None else {"record": o.record.to_json()})
                for o in self.outcomes
            ],
        }

    def table(self) -> str:
        """A line per key: shape, default and winner in microseconds, regret of the default, what won."""
        lines = [f"{'shape':<44} {'default us':>10} {'tuned us':>10} {'regret':>7}  config"]
        for o in self.outcomes:
            name = f"{o.label}  {o.shapes[0] if o.shapes else ''}"[:44]
            if o.record is None:
                lines.append(f"{name:<44} {'':>10} {'':>10} {'':>7}  {o.status}: {o.note}")
                continue
            times = {str(dict(t.config)): t.median_us for t in o.record.tried if t.median_us is not None}
            base = times.get(str(dict(o.record.default)))
            won = times.get(str(dict(o.record.config)))
            config = short(o.record) if o.record.tuned else "default"
            ends = [f"{x:10.1f}" if x is not None else f"{'':>10}" for x in (base, won)]
            status = "" if o.status == "tuned" and not o.note else f" ({o.note or o.status})"
            lines.append(f"{name:<44} {ends[0]} {ends[1]} {o.regret:6.1%}  {config}{status}")
        done = ", ".join(f"{self.count(s)} {s}" for s in ("tuned", "known", "taken", "left") if self.count(s))
        lines.append(f"{done or 'nothing asked'} in {self.seconds:.1f} s; the default's regret is {self.regret:.1%}")
        return "\n".join([*lines, *self.errors])

    def __str__(self) -> str:
        return self.table()


def short(record: Record) -> str:
    """What differs from the default."""
    default = dict(record.default)
    if record.config.get("backend") != default.get("backend"):
        default = {}
    return ", ".join(f"{name}={value}" for name, value in record.config.items() if default.get(name) != value)
