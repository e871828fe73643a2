"""transformers with flashloom against the same models with SDPA (eager where SDPA is not offered), tiny and seeded."""

import itertools
import threading
from collections import OrderedDict
from types import FunctionType, ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the transformers integration is optional")

from tests.integrations.tiny import DECODERS, PLAIN, SMALL, build, llama, llama4, mistral  # noqa: E402

from flashloom.integrations import transformers as integration  # noqa: E402
from flashloom.integrations import transformers_masks as masks  # noqa: E402
from flashloom.integrations import transformers_plans  # noqa: E402
from flashloom.integrations.transformers import flashloom_attention, register  # noqa: E402

register()

LEFT = [(maker, "left") for maker in PLAIN]


def both(model, peer, call):
    """The call's results with flashloom and with the peer."""
    model.set_attn_implementation("flashloom")
    ours = call()
    model.set_attn_implementation(peer)
    return ours, call()


def batch(padding, lengths=(13, 5, 9)):
    torch.manual_seed(1)
    ids = torch.randint(2, 128, (len(lengths), max(lengths)))
    mask = torch.zeros_like(ids)
    for row, length in zip(mask, lengths):
        row[slice(-length, None) if padding == "left" else slice(length)] = 1
    return ids * mask, mask


@torch.no_grad()
@pytest.mark.parametrize(("maker", "padding"), [*itertools.product(DECODERS, [None, "left", "right"]), *LEFT])
def test_logits(maker, padding):
    model, peer = build(maker)
    ids, mask = batch(padding) if padding else (batch("left")[0].clamp(min=2), None)
    ours, theirs = both(model, peer, lambda: model(ids, attention_mask=mask).logits)
    if mask is None:
        rows = torch.ones_like(ids, dtype=bool)
    elif peer == "sdpa":
        rows = mask.cumsum(1) > 0  # left padding sees no key
    else:
        rows = mask.bool()  # eager averages all keys where a row of padding sees none
    torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("maker", "padding"), [*itertools.product(DECODERS, ["left", "right"]), *LEFT])
def test_generate(maker, padding, cache):
    if cache == "static" and maker is llama4:
        pytest.skip("transformers 5.17 cannot make the chunked mask of a static cache")
    model, peer = build(maker)
    if padding == "right" and peer == "eager":
        pytest.skip("generation starts at a row of padding, where eager averages all keys if a window hides them")
    ids, mask = batch(padding)
    options = {"do_sample": False, "max_new_tokens": 10, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    ours, theirs = both(model, peer, lambda: model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_generate_continues_a_cache_in_chunks():
    model, peer = build(mistral)
    ids, _ = batch(None, (20, 20))

    def call():
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :7], past_key_values=cache)
        return model(ids[:, 7:], past_key_values=cache).logits

    torch.testing.assert_close(*both(model, peer, call), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right", "gaps"])
def test_bert(padding):
    model, peer = build(lambda: (transformers.BertModel(transformers.BertConfig(**SMALL)), "sdpa"))
    ids, mask = batch("right" if padding == "gaps" else padding)
    if padding == "gaps":
        mask[0, 3:5] = 0
    ours, theirs = both(model, peer, lambda: model(ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_bert_cross_attention_computes_every_query():
    config = transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    model, peer = build(lambda: (transformers.BertModel(config), "sdpa"))
    ids, mask = batch("right")
    states = torch.randn(3, 13, 64)

    def call():
        return model(ids.clamp(min=2), encoder_hidden_states=states, encoder_attention_mask=mask).last_hidden_state

    torch.testing.assert_close(*both(model, peer, call), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_own_dense_mask(dtype):
    model, peer = build(llama)
    ids, _ = batch(None, (9, 9))
    keep = torch.rand(2, 1, 9, 9) < 0.6
    keep |= torch.eye(9, dtype=bool)
    mask = keep if dtype == torch.bool else torch.where(keep, torch.randn(2, 1, 9, 9), torch.finfo(dtype).min)
    ours, theirs = both(model, peer, lambda: model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_sequences():
    model, peer = build(llama)
    ids, _ = batch(None, (12,))
    positions = torch.tensor([[*range(5), *range(7)]])
    ours, theirs = both(model, peer, lambda: model(ids, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_beam_search():
    model, peer = build(llama)
    ids, mask = batch("left")
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    ours, theirs = both(model, peer, lambda: model.generate(ids, attention_mask=mask, **options))
    assert torch.equal(ours, theirs)


def test_unsupported_features_are_refused():
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    module = torch.nn.Module()
    with pytest.raises(NotImplementedError, match="dropout"):
        flashloom_attention(module, q, k, k, None, dropout=0.1)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        flashloom_attention(module, q, k, k, None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="position_bias"):
        flashloom_attention(module, q, k, k, None, position_bias=torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 3\)"):
        flashloom_attention(module, q, k, k, torch.ones(1, 1, 2, 3, dtype=bool))


def test_training_is_refused():
    model, _ = build(llama)
    model.set_attn_implementation("flashloom")
    with pytest.raises(RuntimeError, match="no_grad"):
        model(batch(None, (4,))[0])


def test_the_mask_is_registered():
    assert "flashloom" in transformers.AttentionMaskInterface._global_mapping


def test_the_name_does_not_mean_flash_attn():
    asks = transformers.utils.generic.is_flash_attention_requested
    assert not asks(requested_attention_implementation="flashloom")
    assert not asks(requested_attention_implementation="paged|flashloom")
    assert not asks(transformers.LlamaConfig(attn_implementation="flashloom"))
    assert asks(requested_attention_implementation="flash_attention_2")
    assert asks(requested_attention_implementation="flash_attention_3", version=3)


HF = transformers.masking_utils
PATTERNS = {
    "causal": (HF.causal_mask_function, masks.Pattern(causal=True)),
    "bidirectional": (HF.bidirectional_mask_function, masks.Pattern()),
    "window": (HF.sliding_window_causal_mask_function(4), masks.Pattern(causal=True, left=3)),
    "both sides": (HF.sliding_window_bidirectional_mask_function(4), masks.Pattern(left=4, right=4)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_read(name):
    function, pattern = PATTERNS[name]
    assert masks.read_pattern(function) == pattern


def test_unknown_functions_become_dense():
    assert masks.read_pattern(lambda b, h, q, kv: kv % 2 == 0) is None
    assert masks.read_pattern(HF.or_masks(HF.causal_mask_function, HF.causal_mask_function)) is None
    two_windows = HF.and_masks(HF.sliding_window_overlay(3), HF.sliding_window_overlay(5))
    assert masks.read_pattern(two_windows) is None
    mask = masks.flashloom_mask(1, 3, 3, mask_function=lambda b, h, q, kv: kv % 2 == q % 2)
    assert type(mask) is torch.Tensor
    assert mask[0, 0].tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_mask_forms_numbers_only_when_asked():
    mask = masks.flashloom_mask(2, 4, 6, q_offset=2, attention_mask=torch.ones(2, 6, dtype=bool))
    assert isinstance(mask, masks.Mask)
    assert mask.shape == (2, 1, 4, 6)
    cut = mask[:, :, :, :3]
    assert type(cut) is torch.Tensor
    assert torch.equal(cut, HF.sdpa_mask(2, 4, 6, 2, allow_is_causal_skip=False)[..., :3])


def test_two_threads_may_register(monkeypatch):
    generic = ModuleType("generic")
    exec("def is_flash_attention_requested(config=None, asked=None, version=None): return True", generic.__dict__)
    monkeypatch.setattr(transformers.utils, "generic", generic)
    other = threading.Thread(target=integration._claim, args=("b",))

    def copy(*parts):
        if other.ident is None:
            other.start()
            other.join(0.1)
        return FunctionType(*parts)

    monkeypatch.setattr(integration, "FunctionType", copy)
    integration._claim("a")
    other.join(60)
    asks = generic.is_flash_attention_requested
    assert [asks(None, name) for name in ("a", "b", "paged|b", "flash_attention_2")] == [False, False, False, True]


def test_masks_that_keep_everything_share_a_layout():
    """An encoder's full batches are planned once; padding and rules of position have layouts of their own."""
    every, some = torch.ones(2, 5, dtype=torch.bool), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def layout(function, keep, keys=5):
        return masks.flashloom_mask(2, 5, keys, mask_function=function, attention_mask=keep).posed(keys)

    whole = layout(HF.bidirectional_mask_function, None)
    assert layout(HF.bidirectional_mask_function, every) is whole
    assert layout(HF.bidirectional_mask_function, None, keys=7) is not whole
    assert layout(HF.bidirectional_mask_function, some) is not layout(HF.bidirectional_mask_function, some)
    assert layout(HF.causal_mask_function, None) is not layout(HF.causal_mask_function, None)


def test_plans_can_come_back_while_one_is_taken(monkeypatch):
    """Garbage collection ends layouts at any point, also within `_take`."""
    monkeypatch.setattr(transformers_plans, "_spare", OrderedDict())
    plan, taken = object(), []

    class Collecting:
        def __hash__(self):
            transformers_plans._give({"another": plan})
            return 7

    thread = threading.Thread(target=lambda: taken.append(transformers_plans._take(Collecting())), daemon=True)
    thread.start()
    thread.join(60)
    assert taken == [None]
    assert transformers_plans._take("another") is plan
