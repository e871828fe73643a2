"""Results of a benchmark as a table, a JSON file and a plot."""

from __future__ import annotations

import json
import statistics
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
#: What peers are, for those who read a table or a plot.
TITLES = {
    "sdpa": "torch's scaled_dot_product_attention",
    "matmul": "softmax(q @ k^T) @ v by two calls of torch.matmul, the query heads of a group as rows",
    "flex": "torch's FlexAttention, compiled",
    "sdpa + mask": "torch's scaled_dot_product_attention with the variant as a tensor of [heads, queries, keys]",
    "naive": "softmax(q @ k^T) @ v in torch, with the whole matrix of scores in memory",
}
OTHERS, SPREAD = 0.15, 0.3  # of the processors' time, and of a median, above which figures say little


@dataclass(frozen=True)
class Row:
    """One line of a table: what was run, the samples of each candidate, and each one's error against float64.

    errors: largest absolute difference over the compared rows, by candidate. compile_s: seconds in the compiler, None
    where a kernel was found in the store. work: what flashloom does in a call, with its unit ("GB" or "TFLOP");
    ceilings: the machine's own samples, each with the same work done at its limit. left_out: peers that failed, and
    why.
    """

    suite: str
    name: str
    dtype: str
    times: dict[str, Timing]
    errors: dict[str, float] = field(default_factory=dict)
    compile_s: float | None = None
    work: tuple[float, str] | None = None
    ceilings: dict[str, tuple[float, Timing]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

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
            "left_out": self.left_out,
        }  # fmt: skip


@dataclass
class Report:
    """Rows, and the machine that they were taken on. others: the share of the processors' time that other programs
    took meanwhile, None where it is not known."""

    rows: list[Row]
    title: str = "attention"
    machine: dict[str, object] = field(default_factory=describe)
    others: float | None = None

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

    @property
    def busy(self) -> str:
        """A sentence where the machine was too busy for its figures to be trusted, else ""."""
        spreads = [row.own.spread for row in self.rows if row.own and len(row.own.samples) >= 5]
        spread = statistics.median(spreads) if spreads else 0.0
        said = []
        if self.others is not None and self.others > OTHERS:
            said.append(f"other programs took {self.others:.0%} of its processors' time")
        if spread > SPREAD:
            said.append(f"times differ by {spread:.0%} of the median from round to round")
        return f"The machine is busy: {', '.join(said)}. These figures are not to be trusted." if said else ""

    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        left_out = dict.fromkeys(why for row in self.rows for why in row.left_out.values())
        found = [f"x {peer}: how many times faster than {TITLES[peer]}" for peer in self.peers if peer in TITLES]
        found += [f"Left out: {why}" for why in left_out]
        if self.machine.get("compiler") is None and "gpu" not in self.machine:
            found.append("No C++ compiler: flashloom's times are those of its slow reference in torch.")
        return found + ([self.busy] if self.busy else [])

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
        for note in (line, *self.notes()):
            console.print(note, style="bold" if note == self.busy else "dim", highlight=False, markup=False)
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

    def to_json(self) -> str:
        """The rows, every sample's quartiles and the machine, as JSON."""
        content = {
            "title": self.title,
            **self.machine,
            "others_share": self.others,
            "notes": self.notes(),
            "geomeans": self.geomeans(),
            "rows": [row.to_json() for row in self.rows],
        }
        return json.dumps(content, indent=1) + "\n"

    def save(self, folder: Path | str, name: str = "attention") -> list[Path]:
        """Write <name>.json and, where matplotlib is installed, <name>.png; answers the paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(self.to_json())
        picture = self._plot(folder / f"{name}.png")
        return [path, *([picture] if picture else [])]

    def _plot(self, path: Path) -> Path | None:
        """Bars of flashloom's factor over each peer, with the quartiles of the peer's time; a row without a peer has
        flashloom's time alone."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return None
        rows = [row for row in self.rows if row.own]
        if not rows or not self.peers:
            return None
        figure = Figure(figsize=(11, 2.4 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / max(len(row.times) - 1 for row in rows)
        for color, peer in enumerate(self.peers):
            for at, row in enumerate(rows):
                if peer not in row.times or row.own is None:
                    continue
                place = at + height * [name for name in row.times if name != OWN].index(peer)
                ratio, timing = row.ratio(peer), row.times[peer]
                low, high = timing.low / row.own.median, timing.high / row.own.median
                reach = [[ratio - low], [high - ratio]]
                axes.barh(place, ratio, height, xerr=reach, color=f"C{color}", ecolor="0.35", capsize=2)
                axes.text(high, place, f"  {ratio:.2f}x", va="center", fontsize=8)
            axes.barh(0, 0, color=f"C{color}", label=TITLES.get(peer, peer))
        axes.axvline(1.0, color="black", linewidth=0.8)
        names = [f"{row.name}, {row.dtype}\n{seconds(row.own.median)}" for row in rows if row.own]
        axes.set_yticks([at + 0.4 - height / 2 for at in range(len(rows))], names, fontsize=8)
        axes.margins(x=0.1)
        axes.invert_yaxis()
        axes.set_xlabel("times as fast as the peer (right of the line: flashloom is faster); whiskers: quartiles")
        axes.set_title(
            "flashloom's attention against other ways to compute the same on this machine\n"
            f"{self.machine['cpu']}, {self.machine['threads']} threads, {str(self.machine['date'])[:10]}; "
            "below each name flashloom's time; 32/8x128: query heads/key heads x width"
            + ("\nTHE MACHINE WAS BUSY: these figures are not to be trusted" if self.busy else ""),
            fontsize=10,
        )
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
        figure.savefig(path, dpi=100)
        return path


def seconds(value: float) -> str:
    """A time with three digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
