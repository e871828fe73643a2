"""Results of a benchmark as a table, a JSON file and a plot."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flashloom.bench.machine import describe
from flashloom.bench.timing import Timing, geomean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OWN = "flashloom"


@dataclass(frozen=True)
class Row:
    """One line of a table: what was run, the samples of each candidate, and each one's error against float64.

    errors: largest absolute difference over the compared rows, by candidate. compile_s: seconds in the compiler, None
    where a kernel was found in the store. work: what flashloom does in a call, with its unit ("GB" or "TFLOP");
    ceilings: the machine's own samples, each with the same work done at its limit.
    """

    suite: str
    name: str
    dtype: str
    times: dict[str, Timing]
    errors: dict[str, float] = field(default_factory=dict)
    compile_s: float | None = None
    work: tuple[float, str] | None = None
    ceilings: dict[str, tuple[float, Timing]] = field(default_factory=dict)

    @property
    def own(self) -> Timing | None:
        return self.times.get(OWN)

    def ratio(self, peer: str) -> float:
        """How many times faster flashloom is than `peer`, by medians."""
        return self.times[peer].median / self.times[OWN].median

    @property
    def shares(self) -> dict[str, float]:
        """flashloom's rate as a share of each ceiling's."""
        if self.own is None or self.work is None:
            return {}
        rate = self.work[0] / self.own.median
        return {name: rate * timing.median / work for name, (work, timing) in self.ceilings.items()}

    @property
    def rate(self) -> str:
        """Such as "31.2 GB/s"; empty where nothing is counted."""
        return f"{self.work[0] / self.own.median:.3g} {self.work[1]}/s" if self.own and self.work else ""

    @property
    def share(self) -> str:
        """Such as "71% of reading"."""
        return ", ".join(f"{share:.0%} of {name}" for name, share in self.shares.items())

    def to_json(self) -> dict[str, object]:
        return {
            "suite": self.suite, "name": self.name, "dtype": self.dtype, "compile_s": self.compile_s,
            "times": {name: timing.to_json() for name, timing in self.times.items()},
            "times_faster": {peer: self.ratio(peer) for peer in self.times if peer != OWN and self.own},
            "max_abs_error_vs_float64": self.errors,
            "rate": self.rate, "shares": self.shares,
            "ceilings": {name: {"work": work, **timing.to_json()} for name, (work, timing) in self.ceilings.items()},
        }  # fmt: skip


@dataclass
class Report:
    """Rows, and the machine that they were taken on."""

    rows: list[Row]
    title: str = "attention"
    machine: dict[str, object] = field(default_factory=describe)

    @property
    def peers(self) -> list[str]:
        """Candidates other than flashloom, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.times if name != OWN))

    def geomeans(self) -> dict[str, dict[str, float]]:
        """suite and dtype -> peer -> geometric mean of flashloom's factor over it."""
        ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            for peer in row.times:
                if peer != OWN and OWN in row.times:
                    ratios[f"{row.suite} {row.dtype}"][peer].append(row.ratio(peer))
        return {key: {peer: geomean(r) for peer, r in by_peer.items()} for key, by_peer in ratios.items()}

    def table(self, console: Console | None = None) -> Table:
        """Print the table, and the geometric means below it; answers the table. Columns that the console has no room
        for
        are left out, those of least weight first."""
        from rich.console import Console

        console = console or Console()
        hidden, free = list[str](), console.options.update(max_width=1000)
        for name in ("spread", "share", "rate", "compile", None):
            table = self._table(hidden)
            if name is None or console.measure(table, options=free).maximum <= console.width:
                break
            hidden.append(name)
        console.print(table)
        for suite, means in self.geomeans().items():
            console.print(f"{suite}, geometric mean: " + ", ".join(f"{r:.2f} x {peer}" for peer, r in means.items()))
        m = self.machine
        line = f"{m['cpu']}, {m['threads']} threads, {m['date']}; medians of interleaved rounds; {m['command']}"
        console.print(line, style="dim", highlight=False)
        return table

    def _table(self, hidden: list[str]) -> Table:
        from rich import box
        from rich.table import Table

        columns = {
            "operator, shape": [row.name for row in self.rows],
            "dtype": [row.dtype for row in self.rows],
            "time": [seconds(row.own.median) if row.own else "" for row in self.rows],
            "spread": [f"{row.own.spread:.0%}" if row.own else "" for row in self.rows],
        }
        for peer in self.peers:
            columns[f"x {peer}"] = [
                f"{row.ratio(peer):.2f}" if row.own and peer in row.times else "" for row in self.rows
            ]
        columns |= {
            "error": [f"{row.errors[OWN]:.0e}" if OWN in row.errors else "" for row in self.rows],
            "compile": [seconds(row.compile_s) if row.compile_s is not None else "" for row in self.rows],
            "rate": [row.rate for row in self.rows],
            "share": [row.share for row in self.rows],
        }
        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        shown = {name: cells for name, cells in columns.items() if name not in hidden and any(cells)}
        for name in shown:
            left = name in ("operator, shape", "dtype", "share")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
        for cells in zip(*shown.values()):
            table.add_row(*cells)
        return table

    def save(self, folder: Path | str, name: str = "attention") -> list[Path]:
        """Write <name>.json and, where matplotlib is installed, <name>.png; answers the paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        content = {
            "title": self.title,
            **self.machine,
            "geomeans": self.geomeans(),
            "rows": [row.to_json() for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        picture = self._plot(folder / f"{name}.png")
        return [path, *([picture] if picture else [])]

    def _plot(self, path: Path) -> Path | None:
        """Bars of flashloom's factor over each peer."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        rows = [row for row in self.rows if OWN in row.times and len(row.times) > 1]
        if not rows:
            return None
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(self.peers)
        for i, peer in enumerate(self.peers):
            have = [(at, row.ratio(peer)) for at, row in enumerate(rows) if peer in row.times]
            axes.barh([at + i * height for at, _ in have], [r for _, r in have], height, label=f"times {peer}")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(
            [at + 0.4 - height / 2 for at in range(len(rows))], [f"{row.name}, {row.dtype}" for row in rows], fontsize=8
        )
        axes.invert_yaxis()
        axes.set_xlabel("times faster (above 1: flashloom is faster)")
        axes.set_title(f"{self.machine['cpu']}, {self.machine['threads']} threads", fontsize=9)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=80)
        return path


def seconds(value: float) -> str:
    """A time with three digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
