"""What one step of transformers costs the host: the first layer works the step out, the others repeat its call."""

import threading

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the transformers integration is optional")

from tests.integrations.tiny import build, llama  # noqa: E402

import flashloom as fl  # noqa: E402
from flashloom.attention.cpu import CpuExecutor  # noqa: E402
from flashloom.integrations import transformers_masks as masks  # noqa: E402
from flashloom.integrations.transformers import flashloom_attention, register  # noqa: E402

register()
MODULE = torch.nn.Module()


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by every run that is prepared in full."""
    seen, run = [], CpuExecutor.run
    monkeypatch.setattr(CpuExecutor, "run", lambda self, *a, **k: (seen.append(1), run(self, *a, **k))[1])
    return seen


def tensors(keys=9, heads=4, tokens=1):
    return torch.randn(2, tokens, heads, 16).transpose(1, 2), *(torch.randn(2, 2, keys, 16) for _ in range(2))


def expected(q, k, v, scale=0.25, softcap=None, sinks=None):
    variant = fl.causal if softcap is None else fl.softcap(softcap) & fl.causal
    variant = variant if sinks is None else variant & fl.sink(sinks)
    return fl.attention(q, k, v, variant=variant, sm_scale=scale).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_one_run_in_full_for_each_step(runs, padded):
    model, _ = build(llama)
    model.set_attn_implementation("flashloom")
    ids, mask = torch.randint(2, 128, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5)
    assert model.config.num_hidden_layers == 2
    assert len(runs) == 5


@torch.no_grad()
def test_a_repeated_call_sees_its_own_tensors(runs):
    mask = masks.flashloom_mask(2, 1, 9, 8)
    given = [tensors() for _ in range(4)]
    found = [flashloom_attention(MODULE, *qkv, mask, scaling=0.25) for qkv in given]
    assert len(runs) == 1
    for qkv, (out, weights) in zip(given, found):
        assert weights is None
        assert out.shape == (2, 1, 4, 16)
        torch.testing.assert_close(out, expected(*qkv))


@torch.no_grad()
def test_whatever_else_differs_is_no_repetition():
    mask, sinks = masks.flashloom_mask(2, 1, 9, 8), torch.randn(4)
    q, k, v = tensors()
    wide = torch.randn(2, 2, 9, 32)[..., :16]
    cases = [
        ((q, k, v), {"scaling": 0.25}, {}),
        ((q, k, v), {"scaling": 0.5}, {"scale": 0.5}),
        ((q, k, v), {"scaling": 0.25, "softcap": 2.0}, {"softcap": 2.0}),
        ((q, k, v), {"scaling": 0.25, "s_aux": sinks}, {"sinks": sinks}),
        ((q, wide, v), {"scaling": 0.25}, {}),
        ((q, k, wide), {"scaling": 0.25}, {}),
        ((q.contiguous().transpose(1, 2).contiguous().transpose(1, 2), k, v), {"scaling": 0.25}, {}),
        ((tensors(heads=6)[0], k, v), {"scaling": 0.25}, {}),
    ]
    for given, options, meaning in (*cases, *cases[::-1]):
        out, _ = flashloom_attention(MODULE, *given, mask, **options)
        torch.testing.assert_close(out, expected(*given, **meaning))
    with pytest.raises(ValueError, match="9 keys, the layer has 8"):
        flashloom_attention(MODULE, q, k[:, :, 1:], v[:, :, 1:], mask, scaling=0.25)
    with pytest.raises(RuntimeError, match="requires grad"), torch.enable_grad():
        flashloom_attention(MODULE, q.clone().requires_grad_(), k, v, mask, scaling=0.25)


@torch.no_grad()
def test_queries_that_must_be_copied_are_copied_every_time():
    mask = masks.flashloom_mask(2, 3, 9, 6)
    for _ in range(3):
        q, k, v = tensors(tokens=3)
        q = q.contiguous()
        out, _ = flashloom_attention(MODULE, q, k, v, mask, scaling=0.25)
        torch.testing.assert_close(out, expected(q, k, v))


@torch.no_grad()
def test_a_monitor_sees_repeated_calls():
    mask, given = masks.flashloom_mask(2, 1, 9, 8), tensors()
    flashloom_attention(MODULE, *given, mask, scaling=0.25)
    with fl.monitor() as seen:
        for _ in range(3):
            flashloom_attention(MODULE, *given, mask, scaling=0.25)
    assert len(seen.runs) == 3


@torch.no_grad()
def test_a_compiled_caller_breaks_its_graph():
    mask, graphs = masks.flashloom_mask(2, 1, 9, 8), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def twice(q, k, v):
        return flashloom_attention(MODULE, q * 2, k, v, mask, scaling=0.25)[0] * 2

    q, k, v = tensors()
    torch.testing.assert_close(twice(q, k, v), expected(q * 2, k, v) * 2)
    assert len(graphs) == 2


@torch.no_grad()
def test_threads_that_share_a_mask_share_no_plan():
    mask, found = masks.flashloom_mask(2, 1, 9, 8), {}

    def call(name):
        flashloom_attention(MODULE, *tensors(), mask, scaling=0.25)
        found[name] = mask.posed(9)

    call("here")
    thread = threading.Thread(target=call, args=("there",))
    thread.start()
    thread.join(60)
    assert found["here"] is mask.posed(9)
    assert found["there"] is not found["here"]


def pieces(keep, **rules):
    """Pieces of rows as a plain loop would find them: (sequence, rows, keys, first, stop)."""
    found, (n, end) = [], keep.shape
    for b in range(n):
        real = np.flatnonzero(keep[b])
        first, stop, length = (*((real[0], real[-1] + 1) if real.size else (0, 0)), rules["q_length"])
        if not real.size:
            found.append((b, length, 0, 0, 0))
        elif rules["skip_padding"]:
            found += [(b, first, 0, 0, 0), (b, stop - first, stop, first, stop), (b, length - stop, 0, 0, 0)]
        elif not rules["pattern"].positional:
            found.append((b, length, stop, first, stop))
        else:
            blind = min(max(0, first - rules["first_row"]), length) if rules["pattern"].causal else 0
            found += [(b, blind, 0, 0, 0), (b, length - blind, end, first, stop)]
    return [piece for piece in found if piece[1]]


@pytest.mark.parametrize(("pattern", "q_length", "skip"), [
    (masks.Pattern(causal=True), 1, False), (masks.Pattern(causal=True), 3, False),
    (masks.Pattern(causal=True), 9, False), (masks.Pattern(left=2, right=2), 9, False),
    (masks.Pattern(), 4, False), (masks.Pattern(), 9, True),
])  # fmt: skip
def test_pieces(pattern, q_length, skip):
    keep = np.zeros((7, 9), dtype=bool)
    for row, (first, stop) in zip(keep, [(0, 9), (2, 9), (0, 5), (8, 9), (3, 4), (0, 0), (7, 9)]):
        row[first:stop] = True
    rules = masks.Rules(pattern, 7, q_length, 9, 9 - q_length, 0, keep, skip, torch.device("cpu"))
    found = rules._pieces(*masks._intervals(keep), 9)
    wanted = pieces(keep, pattern=pattern, q_length=q_length, skip_padding=skip, first_row=9 - q_length)
    assert list(zip(*(x.tolist() for x in found))) == wanted
    assert {x.dtype for x in found} == {np.dtype(np.int32)}
