"""The demo's four parts, in order, each answering the files it wrote and whether what it claims holds."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import flashloom as fl
from flashloom import settings
from flashloom.bench.attention import Options, time_case
from flashloom.bench.cases import CASES
from flashloom.bench.machine import Load
from flashloom.bench.report import Report, Row, seconds
from flashloom.bench.workloads import Workload, decode, prefill
from flashloom.commands.errors import sentence
from flashloom.demo import minilm, pictures
from flashloom.demo.decoder import Decoder, Shape, generate_with_sdpa
from flashloom.demo.sentences import QUERIES, TOPICS
from flashloom.demo.serving import Engine, Request, Step, latencies

LLAMA = Shape()
EMBEDDING_TOLERANCE = 1e-5  # of unit vectors in float32


@dataclass
class Outcome:
    """What a part found: files written, whether its claim holds, and a line for the end."""

    holds: bool
    summary: str
    files: list[Path] = field(default_factory=list)


@dataclass
class Demo:
    """The demo, printing to `console` and writing below `output`.

    full: time every row against FlexAttention too. rounds: interleaved rounds per row of the table.
    """

    output: Path
    console: Console
    full: bool = False
    rounds: int = 15
    _since: Load | None = None

    def run(self) -> bool:
        """All parts; True when every claim holds. Kernels are compiled anew, in a store of the demo's own."""
        start, self._since, began = time.perf_counter(), Load.now(), time.time()
        self.output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.output / "store", ignore_errors=True)
        fl.configure(cache_dir=self.output / "store")
        outcomes = []
        for title, part in (
            ("Sentence embeddings with MiniLM", self.embeddings),
            ("Several requests at once through a Llama-architecture decoder", self.generation),
            ("Speed and error", self.speed),
            ("What variants mask and weigh", self.picture),
        ):
            self.console.rule(f"[bold]{title}", align="left")
            try:
                outcomes.append(part())
            except KeyboardInterrupt:
                self.console.print("Ended early.")
                self._done(start, began)
                raise
            except Exception as error:  # the other parts are worth their time
                if settings.get().debug:
                    raise
                outcomes.append(Outcome(False, sentence(error)))
            said = outcomes[-1]
            self.console.print("" if said.holds else "FAILED: ", said.summary, sep="", markup=False, highlight=False)
        self._done(start, began)
        return all(outcome.holds for outcome in outcomes)

    def _done(self, start: float, began: float) -> None:
        """Say what was written, and whether the machine let its figures be trusted."""
        self.console.rule("[bold]Done", align="left")
        self.console.print(f"{time.perf_counter() - start:.0f} s in all. Files written:")
        for path in sorted(self.output.glob("*.*")):
            if path.is_file() and path.stat().st_mtime >= began - 1:
                self.console.print(f"  {path.resolve()}", highlight=False, soft_wrap=True)
        if busy := Report([], machine={}, others=self._others()).busy:
            self.console.print(busy, style="bold")

    def _others(self) -> float | None:
        """The share of the processors' time that other programs have taken since the demo began."""
        return self._since.others(Load.now()) if self._since else None

    def embeddings(self) -> Outcome:
        """Embed real sentences with flashloom and with SDPA, compare, and search."""
        try:
            encoders = {name: minilm.load(name) for name in ("flashloom", "sdpa")}
        except minilm.Absent as absent:
            return Outcome(True, f"Left out: {absent}")
        sentences = [s for group in TOPICS.values() for s in group]
        topics = [topic for topic, group in TOPICS.items() for _ in group]
        texts = sentences + [query for query, _ in QUERIES]
        ours, theirs = (encoders[name].embed(texts) for name in ("flashloom", "sdpa"))
        difference = float((ours - theirs).abs().max())
        scores = ours[len(sentences) :] @ ours[: len(sentences)].T
        table = Table("query", "nearest of the sentences", "cosine", box=box.SIMPLE_HEAD)
        right, found = 0, []
        for (query, topic), row in zip(QUERIES, scores):
            best = [(sentences[i], topics[i], float(row[i])) for i in row.topk(3).indices.tolist()]
            right += best[0][1] == topic
            table.add_row(query, best[0][0], f"{best[0][2]:.2f}")
            found.append({"query": query, "nearest": [{"sentence": s, "topic": t, "cosine": c} for s, t, c in best]})
        self.console.print(table)
        path = self.output / "embeddings.json"
        path.write_text(json.dumps({"largest_difference_to_sdpa": difference, "search": found}, indent=1) + "\n")
        same = bool(torch.equal(scores.argmax(1), (theirs[len(sentences) :] @ theirs[: len(sentences)].T).argmax(1)))
        summary = (
            f"{len(texts)} sentences; {right} of {len(QUERIES)} queries found their topic; embeddings "
            f"{'equal' if difference <= EMBEDDING_TOLERANCE else 'DIFFER from'} SDPA's within rounding "
            f"(largest difference {difference:.1e}), search results {'the same' if same else 'DIFFERENT'}."
        )
        return Outcome(same and difference <= EMBEDDING_TOLERANCE, summary, [path])

    def generation(self, shape: Shape = LLAMA, requests: int = 12, new_tokens: int = 48) -> Outcome:
        """Serve requests that join and leave over a paged cache, then generate each alone with SDPA and compare."""
        decoder = Decoder(shape)
        sentences = [s for group in TOPICS.values() for s in group]
        served = [
            Request(list(" ".join(sentences[i : i + 1 + i % 4]).encode()), new_tokens - 3 * (i % 5), arrives=3 * i)
            for i in range(requests)
        ]
        total = sum(r.new_tokens for r in served)
        warm = Engine(decoder, max_requests=6)
        warm.serve([Request(served[0].prompt, 2)])  # compiles, so that latencies are those of a running server
        engine = Engine(decoder, max_requests=6)
        with self._progress() as progress:
            bar = progress.add_task("serving with flashloom, tokens", total=total)
            engine.serve(served, lambda step: progress.update(bar, completed=sum(len(r.tokens) for r in served)))
            bar = progress.add_task("the same one by one with SDPA, requests", total=requests)
            same = 0
            for r in served:
                same += generate_with_sdpa(decoder, r.prompt, r.new_tokens) == r.tokens
                progress.advance(bar)
        numbers = latencies(served)
        mixed = sum(step.decoding > 0 and step.prefilling > 0 for step in engine.steps)
        table = Table(
            "requests",
            "steps",
            "mixed steps",
            "tokens/s",
            "TTFT P50",
            "TTFT P99",
            "ITL P50",
            "ITL P99",
            box=box.SIMPLE_HEAD,
        )
        times = (seconds(numbers[k]) for k in ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s"))
        table.add_row(str(requests), str(len(engine.steps)), str(mixed), f"{numbers['tokens_per_s']:.0f}", *times)
        self.console.print(table)
        path = self.output / "generation.json"
        content = {
            "model": asdict(shape), "dtype": "float32", "latencies": numbers, "identical_requests": same,
            "steps": [asdict(step) for step in engine.steps],
            "requests": [{"prompt_tokens": len(r.prompt), "arrives": r.arrives, "tokens": r.tokens} for r in served],
        }  # fmt: skip
        path.write_text(json.dumps(content, indent=1) + "\n")
        summary = (
            f"{total} greedy tokens of {requests} requests, at most {_most(engine.steps)} in a step; {same} of "
            f"{requests} requests token-identical to SDPA in float32. (Seeded weights, not trained: the text is noise.)"
        )
        return Outcome(same == requests, summary, [path])

    def speed(self) -> Outcome:
        """Time operators against their peers; wrong results raise before any time is shown."""
        heads, small = fl.HeadShape(32, 8, 128), fl.HeadShape(8, 2, 128)
        plain = Options(self.rounds, against=("sdpa", "matmul"))
        mask = Options(self.rounds, against=("sdpa + mask",))
        every = Options(self.rounds, against=("sdpa", "sdpa + mask", "matmul", "flex"))
        bf16, f32 = torch.bfloat16, torch.float32
        jobs: list[tuple[str, Workload, torch.dtype, Options]] = [
            ("full", prefill(heads, 1024), bf16, plain),
            ("causal", prefill(heads, 1024), bf16, plain),
            ("causal", prefill(heads, 512), f32, plain),
            ("causal", decode(heads, 1, 4096), bf16, plain),
            ("causal", decode(heads, 8, 1024), bf16, plain),
            ("causal", decode(heads, 8, 1024), f32, plain),
            ("window 256", prefill(small, 1024), bf16, mask),
            ("ALiBi", prefill(small, 1024), bf16, mask),
            ("soft cap", prefill(small, 1024), bf16, every),
        ]
        rows: list[Row] = []
        files: list[Path] = []
        try:
            with self._progress() as progress:
                bar = progress.add_task("", total=len(jobs))
                for case, workload, dtype, options in jobs:
                    options = every if self.full else options
                    flex = ", FlexAttention compiles for half a minute" if "flex" in options.against else ""
                    progress.update(bar, description=f"{case}, {workload.name}{flex}")
                    rows.append(time_case(CASES[case], workload, dtype, options, suite="demo"))
                    progress.advance(bar)
        finally:  # rows that are done are kept, whatever ended the rest
            if rows:
                title = "attention: time, and how many times faster than each peer"
                report = Report(rows, title=title, others=self._others())
                report.table(self.console)
                files = report.save(self.output, "speed")
        return Outcome(True, f"{len(rows)} rows; every output compared with float64 before it was timed.", files)

    def picture(self) -> Outcome:
        """Draw the weights of the library's variants, as the kernels compute them."""
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return Outcome(True, "Left out: matplotlib is needed: pip install matplotlib")
        examples = pictures.examples()
        panels = {}
        with self._progress() as progress:
            bar = progress.add_task("compiling and running variants", total=len(examples))
            for title, (variant, random) in examples.items():
                panels[title] = pictures.weights(variant, random=random)
                progress.advance(bar)
        path = pictures.draw(panels, self.output / "variants.png")
        return Outcome(True, f"{len(panels)} variants drawn from the kernels' own weights.", [path])

    def _progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console)


def _most(steps: list[Step]) -> int:
    return max(step.decoding + step.prefilling for step in steps)
