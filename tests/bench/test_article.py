"""The three-shape benchmark computes what it says, within its memory, and writes a report."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from flashloom.bench import article
from flashloom.cli import main


def test_the_shapes_are_the_articles():
    found = [(one.batch, one.tokens, one.dtype) for one in article.articles("cuda")]
    assert found == [(1, 1024, torch.float16), (4, 2048, torch.float16), (8, 4096, torch.float16)]
    assert {one.dtype for one in article.articles("cpu")} == {torch.bfloat16}
    assert (article.HEADS, article.DIM) == (32, 128)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scores", [1 << 30, 2 * 9 * 9 * 4])
def test_naive_is_attention_in_any_number_of_parts(monkeypatch, causal, scores):
    monkeypatch.setitem(article.SCORES, "cpu", scores)
    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(article.naive(q, k, v, causal), wanted)
    assert article.error(wanted, q, k, v, causal) < 1e-5
    assert article.error(wanted + 1e-2, q, k, v, causal) > 9e-3


@pytest.mark.parametrize("causal", [False, True])
def test_the_command_writes_a_report(tmp_path, monkeypatch, causal):
    monkeypatch.setattr(article, "SHAPES", ((1, 64), (2, 128)))
    arguments = [
        "bench",
        "article",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--rounds",
        "1",
        "--output",
        str(tmp_path),
    ]
    done = CliRunner().invoke(main, [*arguments, *(["--causal"] if causal else [])], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / f"article_cpu{'_causal' if causal else ''}.json").read_text())
    assert [row["name"].split(",")[0].split(" ", 1)[1] for row in report["rows"]] == ["1 x 64 tokens", "2 x 128 tokens"]
    assert set(report["rows"][0]["times_faster"]) == {"naive", "sdpa"}


def test_a_wrong_result_has_no_speed(monkeypatch):
    monkeypatch.setattr(article.fl, "attention", lambda q, k, v, variant: torch.zeros_like(q))
    with pytest.raises(ArithmeticError, match="error against float64"):
        article.Article(1, 64, torch.float32, "cpu").row(1)
