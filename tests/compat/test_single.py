"""Singles: against the reference, in both layouts, 3-D and 4-D, strided, with every encoding."""

import numpy as np
import pytest
import torch
from tests.compat.reference import attend, rotate

import flashloom as fl
from flashloom.compat import flashinfer

Q, K, D = 5, 9, 32


def data(q_heads=4, kv_heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(n, h, D, dtype=dtype) for n, h in ((Q, q_heads), (K, kv_heads), (K, kv_heads)))


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("causal", "window", "cap"), [(True, -1, 0.0), (False, 3, 0.0), (True, 2, 5.0), (False, -1, 8.0)]
)
def test_prefill(layout, causal, window, cap):
    q, k, v = data()
    keys = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    out, lse = flashinfer.single_prefill_with_kv_cache(
        q, *keys, causal=causal, kv_layout=layout, window_left=window, logits_soft_cap=cap, sm_scale=0.3,
        return_lse=True,
    )  # fmt: skip
    want = attend(q, k, v, causal=causal, window=window, cap=cap, scale=0.3)
    close(out, want[0])
    close(lse, want[1])
    assert lse.dtype == torch.float32


def test_return_lse_alias_and_scales():
    q, k, v = data()
    out, lse = flashinfer.single_prefill_with_kv_cache_return_lse(q, k, v, k_scale=0.5, v_scale=3.0)
    want = attend(q, k, v, scale=0.5 * D**-0.5)
    close(out, want[0] * 3)
    close(lse, want[1])
    one = flashinfer.single_decode_with_kv_cache(q[0], k, v, q_scale=2.0, k_scale=0.5, v_scale=3.0)
    close(one, attend(q[:1], k, v)[0][0] * 3)


def test_rope_and_alibi():
    q, k, v = data()
    rope = {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 1e3}
    want = attend(rotate(q, K - Q, 1e3, 2.0), rotate(k, 0, 1e3, 2.0), v, causal=True)[0]
    close(flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, **rope), want, 1e-4)
    one = attend(rotate(q[:1], K - 1, 1e3, 2.0), rotate(k, 0, 1e3, 2.0), v)[0][0]
    close(flashinfer.single_decode_with_kv_cache(q[0], k, v, **rope), one, 1e-4)
    q_pos = torch.arange(Q).unsqueeze(1) + K - Q
    bias = fl.alibi_slopes(4)[:, None, None] * (torch.arange(K) - q_pos)
    close(
        flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ALIBI"),
        attend(q, k, v, causal=True, bias=bias)[0],
    )


@pytest.mark.parametrize("window", [-1, 4])
def test_masks_of_one_s_own(window):
    q, k, v = data()
    mask = torch.rand(Q, K) > 0.4
    mask[2] = False
    bits = torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))
    want = attend(q, k, v, mask=mask, window=window)
    for given in ({"custom_mask": mask}, {"custom_mask": mask.reshape(-1)}, {"packed_custom_mask": bits}):
        out, lse = flashinfer.single_prefill_with_kv_cache(
            q, k, v, causal=True, window_left=window, return_lse=True, **given
        )
        close(out, want[0])
        close(lse, want[1])
        assert torch.isneginf(lse[2]).all()


def test_calls_as_articles_write_them():
    """3-D and 4-D: [batch, heads, tokens, dim], decode with one query token."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, n, D) for h, n in ((4, Q), (2, K), (2, K)))
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    out = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, allow_fp16_qk_reduction=True)
    _, lse = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, return_lse=True)
    one = flashinfer.single_decode_with_kv_cache(q[:, :, -1:], k, v)
    assert out.shape == q.shape
    assert one.shape == (2, 4, 1, D)
    for i in range(2):
        want = attend(*(x[i] for x in rows), causal=True)
        close(out[i], want[0].transpose(0, 1))
        close(lse[i], want[1].t())
        close(one[i], want[0][-1:].transpose(0, 1))
    three = flashinfer.single_prefill_with_kv_cache(*(x[0] for x in rows), causal=True, allow_fp16_qk_reduction=True)
    close(three, attend(*(x[0] for x in rows), causal=True)[0])


def test_keys_and_values_are_views_with_strides_of_their_own(monkeypatch):
    q, _, _ = data()
    both = torch.randn(K, 2, 2 * D)
    wide = torch.randn(2, K, 3, D)
    queries = torch.randn(D, 4, Q).permute(2, 1, 0)  # not even the elements of a row lie side by side
    for keys, values in (
        (both[..., :D], both[..., D:]),
        (both[..., D:], wide[0, :, :2]),
        (wide[0, :, 1:], wide[1, :, :2]),
    ):
        monkeypatch.setattr(torch.Tensor, "contiguous", refuse_keys(keys, values))
        out = flashinfer.single_prefill_with_kv_cache(queries, keys, values, causal=True)
        one = flashinfer.single_decode_with_kv_cache(q[0], keys, values)
        monkeypatch.undo()
        close(out, attend(queries, keys, values, causal=True)[0])
        close(one, attend(q[:1], keys, values)[0][0])


def refuse_keys(*refused):
    real, places = torch.Tensor.contiguous, {x.data_ptr() for x in refused}

    def contiguous(self, *args, **kwargs):
        assert self.data_ptr() not in places, "a copy of keys or values"
        return real(self, *args, **kwargs)

    return contiguous


def test_lengths_that_grow_share_plans():
    from flashloom.attention import function

    function._recent.clear()
    q, _, _ = data()
    for length in range(33, 65):
        k, v = torch.randn(2, length, 2, D)
        close(flashinfer.single_decode_with_kv_cache(q[0], k, v), attend(q[:1], k, v)[0][0])
    assert len(function._recent.plans) == function._SHARING


def test_eight_bit_keys_and_queries():
    q, k, v = data(dtype=torch.float32)
    k8, v8 = k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
    out = flashinfer.single_prefill_with_kv_cache(q.half(), k8, v8, causal=True, k_scale=0.5, v_scale=2.0)
    close(out, attend(q.half(), k8, v8, causal=True, scale=0.5 * D**-0.5)[0] * 2, 2e-2)
    q8, scale_q, scale_k = q.to(torch.float8_e4m3fn), torch.rand(4) + 0.5, torch.rand(2) + 0.5
    scale_v = torch.rand(2) + 0.5
    out = flashinfer.single_prefill_with_kv_cache(
        q8, k8, v8, scale_q, scale_k, scale_v, o_dtype=torch.float16, causal=True
    )
    want = attend(
        q8.float() * scale_q[:, None], k8.float() * scale_k[:, None], v8.float() * scale_v[:, None], causal=True
    )
    assert out.dtype == torch.float16
    close(out, want[0], 3e-2)


def test_errors():
    q, k, v = data()
    with pytest.raises(KeyError, match="kv_layout"):
        flashinfer.single_prefill_with_kv_cache(q, k, v, kv_layout="DHN")
    with pytest.raises(KeyError, match="pos_encoding_mode"):
        flashinfer.single_decode_with_kv_cache(q[0], k, v, pos_encoding_mode="ROPE")
    with pytest.raises(ValueError, match="one query token"):
        flashinfer.single_decode_with_kv_cache(torch.zeros(1, 4, 2, D), k[None], v[None])
    with pytest.raises(NotImplementedError, match="NVFP4"):
        flashinfer.single_decode_with_kv_cache(q[0], k.to(torch.uint8), v.to(torch.uint8))
    with pytest.raises(ValueError, match="stride"):
        flashinfer.single_prefill_with_kv_cache(q, k.permute(2, 1, 0).contiguous().permute(2, 1, 0), v)
