"""Sizes that the host knows are held against the batch: what fits is right, one entry less is refused before any work.

The witness is float64 torch, request by request, with the tables indexed as torch indexes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import flashloom as fl

HEADS = fl.HeadShape(4, 2, 8)


class ByKey(fl.Variant):
    table: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.table[at.kv_pos]


class ByPosition(fl.Variant):
    table: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.table[at.q_pos] * at.kv_pos


class ByRow(fl.Variant):
    table: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.table[at.q_len - at.kv_len + at.q_pos] * at.kv_pos


class ByRequest(fl.Variant):
    table: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.table[at.batch] * at.kv_pos


class ByHead(fl.Variant):
    table: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.table[at.q_head] * at.kv_pos


class ByBlock(fl.Variant):
    table: torch.Tensor

    def logits_transform(self, logits, at):
        return logits + self.table[1 + (at.kv_pos + 3) // 4 * 2]


class InQueries(fl.Variant):
    table: torch.Tensor

    def query_transform(self, q, at):
        return q * self.table[at.q_pos]


class InKeys(fl.Variant):
    table: torch.Tensor

    def key_transform(self, k, at):
        return k * self.table[at.kv_pos]


class PerQuery(fl.Variant):
    table: fl.PerQueryToken

    def logits_transform(self, logits, at):
        return logits + self.table[at.q_pos] * at.kv_pos


class PerKey(fl.Variant):
    table: fl.PerKeyToken

    def logits_transform(self, logits, at):
        return logits + self.table[at.kv_pos]


class PerSequence(fl.Variant):
    table: fl.PerRequest

    def logits_transform(self, logits, at):
        return logits + self.table[at.batch] * at.kv_pos


def flex_by_key(table):
    return fl.from_flex(lambda score, b, h, i, j: score + table[j])


def flex_documents(table):
    return fl.from_flex(mask_mod=lambda b, h, i, j: table[i] <= table[j])


KINDS = {
    one.__name__: one
    for one in (ByKey, ByPosition, ByRow, ByRequest, ByHead, ByBlock, InQueries, InKeys, PerQuery, PerKey, PerSequence)
} | {"flex_by_key": flex_by_key, "flex_documents": flex_documents}


def scores(name, table, q, k, b, starts, keys_before):
    """float64 [heads, n, m] of a request, and what is kept."""
    n, m = len(q), len(k)
    i, j = torch.arange(n), torch.arange(m)
    pos = i + m - n
    if name == "InQueries":
        q = q * table[pos][:, None, None]
    if name == "InKeys":
        k = k * table[j][:, None, None]
    s = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(2, 1)) * 8**-0.5
    if name in ("ByKey", "flex_by_key"):
        s = s + table[j]
    elif name == "ByPosition":
        s = s + table[pos][:, None] * j
    elif name == "ByRow":
        s = s + table[i][:, None] * j
    elif name in ("ByRequest", "PerSequence"):
        s = s + table[b] * j
    elif name == "ByHead":
        s = s + table[torch.arange(4)][:, None, None] * j
    elif name == "ByBlock":
        s = s + table[1 + (j + 3) // 4 * 2]
    elif name == "PerQuery":
        s = s + table[starts + i][:, None] * j
    elif name == "PerKey":
        s = s + table[keys_before + j]
    kept = table[i][:, None] <= table[j] if name == "flex_documents" else torch.ones(n, m, dtype=torch.bool)
    return s.masked_fill(~kept, -torch.inf)


def witness(name, table, q, k, v, q_lens, kv_lens):
    out, table = torch.zeros(len(q), 4, 8, dtype=torch.float64), table.double()
    start = first = 0
    for b, (n, m) in enumerate(zip(q_lens, kv_lens, strict=True)):
        if n and m:
            mine, keys = q[start : start + n].double(), k[first : first + m].double()
            weight = scores(name, table, mine, keys, b, start, first).softmax(-1).nan_to_num(0.0)
            values = v[first : first + m].double().repeat_interleave(2, 1)
            out[start : start + n] = torch.einsum("hnm,mhd->nhd", weight, values)
        start, first = start + n, first + m
    return out


def needed(name, q_lens, kv_lens):
    """Entries that the batch reads, by arithmetic."""
    active = [m for n, m in zip(q_lens, kv_lens, strict=True) if n]
    return {
        "ByRow": max(q_lens), "ByRequest": len(q_lens), "PerSequence": len(q_lens), "ByHead": 4,
        "ByBlock": 2 + (max(active) + 2) // 4 * 2, "PerQuery": sum(q_lens), "PerKey": sum(kv_lens),
    }.get(name, max(active))  # fmt: skip


def batch_of(rng, name):
    requests = rng.randint(1, 4)
    kv_lens = [rng.randint(2, 12) for _ in range(requests)]
    if name == "flex_documents":  # the index of queries is that of the step, as in FlexAttention
        return kv_lens, kv_lens
    return [rng.randint(1, m) for m in kv_lens], kv_lens


@pytest.mark.parametrize("name", KINDS)
def test_what_fits_is_right_and_one_entry_less_is_refused(name):
    rng = random.Random(name)
    for _ in range(4):
        q_lens, kv_lens = batch_of(rng, name)
        q, k, v = torch.randn(sum(q_lens), 4, 8), *torch.randn(2, sum(kv_lens), 2, 8)
        batch = fl.Batch(q_lens, kv=fl.RaggedKV(kv_lens))
        size = needed(name, q_lens, kv_lens)
        table = torch.randn(size)
        plan = fl.Attention(HEADS, variant=KINDS[name](table=table), dtype=torch.float32, device="cpu").plan(batch)
        got = plan.run(q, (k, v))
        torch.testing.assert_close(got.double(), witness(name, table, q, k, v, q_lens, kv_lens), rtol=1e-4, atol=1e-5)
        short = KINDS[name](table=table[:-1].clone()) if size > 1 else None
        if short is not None:
            with pytest.raises(ValueError, match=rf"{size - 1}\b"):
                fl.Attention(HEADS, variant=short, dtype=torch.float32, device="cpu").plan(batch)
            with pytest.raises(ValueError, match=rf"{size - 1}\b"):
                plan.run(q, (k, v), variant=short)
            with pytest.raises(ValueError, match=rf"{size - 1}\b"):
                plan.update(batch, variant=short)
            assert torch.equal(plan.run(q, (k, v)), got), "the plan is what it was"


@pytest.mark.parametrize("name", [name for name in KINDS if name != "ByHead"])
def test_a_larger_batch_is_refused_at_update(name):
    variant = KINDS[name](table=torch.randn(needed(name, [3, 4], [4, 5])))
    plan = fl.Attention(HEADS, variant=variant, dtype=torch.float32, device="cpu").plan(
        fl.Batch([3, 4], kv=fl.RaggedKV([4, 5]))
    )
    q, k, v = torch.randn(7, 4, 8), *torch.randn(2, 9, 2, 8)
    before = plan.run(q, (k, v))
    with pytest.raises(ValueError, match=r"has (shape|[0-9]+ entries)"):
        plan.update(fl.Batch([3, 9, 2], kv=fl.RaggedKV([4, 15, 9])))
    assert torch.equal(plan.run(q, (k, v)), before)
    plan.update(fl.Batch([3, 1], kv=fl.RaggedKV([4, 2])))


def test_what_a_hook_bounds_itself_is_no_mistake():
    class Bounded(fl.Variant):
        table: torch.Tensor

        def logits_transform(self, logits, at):
            return logits + self.table[torch.clamp(at.kv_pos, max=3)] + self.table[at.kv_pos % 4]

    table, q, k = torch.randn(4), torch.randn(3, 4, 8), torch.randn(9, 2, 8)
    j = torch.arange(9)
    s = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(2, 1)) * 8**-0.5 + table[j.clamp(max=3)] + table[j % 4]
    want = torch.einsum("hnm,mhd->nhd", s.softmax(-1), k.repeat_interleave(2, 1))
    torch.testing.assert_close(fl.attention(q, k, k, variant=Bounded(table=table)), want, rtol=1e-4, atol=1e-5)


# --- masks ------------------------------------------------------------------------------------------------------------


def masked(q, k, v, q_lens, kv_lens, mask_of):
    """float64: mask_of(request) is bool [heads or 1, n, m]."""
    out = torch.zeros(len(q), 4, 8, dtype=torch.float64)
    start = first = 0
    for b, (n, m) in enumerate(zip(q_lens, kv_lens, strict=True)):
        mine, keys = q[start : start + n].double(), k[first : first + m].double().repeat_interleave(2, 1)
        s = torch.einsum("nhd,mhd->hnm", mine, keys) * 8**-0.5
        weight = s.masked_fill(~mask_of(b), -torch.inf).softmax(-1).nan_to_num(0.0)
        out[start : start + n] = torch.einsum(
            "hnm,mhd->nhd", weight, v[first : first + m].double().repeat_interleave(2, 1)
        )
        start, first = start + n, first + m
    return out


def run_masked(variant, q, k, v, q_lens, kv_lens):
    batch = fl.Batch(q_lens, kv=fl.RaggedKV(kv_lens))
    return fl.Attention(HEADS, variant=variant, dtype=torch.float32, device="cpu").plan(batch).run(q, (k, v))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_dense_masks_have_just_the_sizes_of_the_batch(rank):
    rng = random.Random(rank)
    for _ in range(6):
        requests = rng.randint(1, 3)
        kv_lens = [rng.randint(3, 9) for _ in range(requests)]
        q_lens = [rng.randint(2, m) for m in kv_lens]
        rows, columns = max(q_lens), max(kv_lens)
        leading = [rng.choice([1, requests]), rng.choice([1, 4])][: rank - 2]
        shape = [*leading, rows, columns]
        mask = torch.rand(shape) < 0.6
        q, k, v = torch.randn(sum(q_lens), 4, 8), *torch.randn(2, sum(kv_lens), 2, 8)
        whole = mask.reshape([1] * (4 - rank) + shape) if rank != 3 else mask[:, None]
        whole = whole.expand(requests, 4, rows, columns)
        got = run_masked(fl.custom_mask(mask), q, k, v, q_lens, kv_lens)
        want = masked(q, k, v, q_lens, kv_lens, lambda b: whole[b, :, : q_lens[b], : kv_lens[b]])  # noqa: B023
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        for axis in range(rank):
            for change in (-1, 1, 5):
                other = list(shape)
                other[axis] += change
                leads = (1, requests) if axis == 0 else (1, 4)
                if other[axis] < 1 or (axis < rank - 2 and other[axis] in leads):
                    continue
                wrong = torch.ones(other, dtype=torch.bool)
                named = rf"\[{', '.join(map(str, other))}\]"
                with pytest.raises(ValueError, match=named):
                    run_masked(fl.custom_mask(wrong), q, k, v, q_lens, kv_lens)
        if rows != columns:
            turned = mask.transpose(-1, -2).contiguous()
            with pytest.raises(ValueError, match=f"{columns} queries and {rows} keys.*{rows} and {columns}"):
                run_masked(fl.custom_mask(turned), q, k, v, q_lens, kv_lens)
        larger = torch.nn.functional.pad(mask, (0, 3, 0, 2))  # a cut of a larger mask is a view, and right
        cut = fl.custom_mask(larger[..., :rows, :columns])
        assert torch.equal(run_masked(cut, q, k, v, q_lens, kv_lens), got)


def test_masks_may_be_lists_or_arrays():
    q, k = torch.randn(2, 4, 8), torch.randn(3, 2, 8)
    rows = [[True, False, True], [False, True, True]]
    want = fl.attention(q, k, k, variant=fl.custom_mask(torch.tensor(rows)))
    for mask in (rows, np.array(rows)):
        assert torch.equal(fl.attention(q, k, k, variant=fl.custom_mask(mask)), want)


def test_a_mask_for_each_head_is_not_taken_for_requests():
    q, k = torch.randn(5, 4, 8), torch.randn(6, 2, 8)
    mask = torch.rand(4, 5, 6) < 0.7
    with pytest.raises(ValueError, match=r"4 requests, but there are 1.*requests, q_heads, q, kv"):
        fl.attention(q, k, k, variant=fl.custom_mask(mask))
    got = fl.attention(q, k, k, variant=fl.custom_mask(mask[None]))
    torch.testing.assert_close(got.double(), masked(q, k, k, [5], [6], lambda b: mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_flat_masks_have_a_segment_of_just_the_size_for_each_request(packed):
    rng = random.Random(int(packed))
    for _ in range(6):
        kv_lens = [rng.randint(2, 9) for _ in range(rng.randint(1, 3))]
        q_lens = [rng.randint(1, m) for m in kv_lens]
        masks = [torch.rand(n, m) < 0.6 for n, m in zip(q_lens, kv_lens, strict=True)]
        parts = [mask.flatten() for mask in masks]
        if packed:
            parts = [
                (torch.nn.functional.pad(x.int(), (0, -len(x) % 8)).view(-1, 8) << torch.arange(8))
                .sum(1)
                .to(torch.uint8)
                for x in parts
            ]
        ends = torch.tensor([0, *(len(x) for x in parts)]).cumsum(0)
        make = fl.packed_mask if packed else fl.custom_mask
        q, k, v = torch.randn(sum(q_lens), 4, 8), *torch.randn(2, sum(kv_lens), 2, 8)
        got = run_masked(make(torch.cat(parts), ends), q, k, v, q_lens, kv_lens)
        want = masked(q, k, v, q_lens, kv_lens, lambda b: masks[b])  # noqa: B023
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        at = rng.randrange(len(parts))
        for wrong in (parts[at][:-1], torch.cat([parts[at], parts[at][:1]])):
            other = [*parts[:at], wrong, *parts[at + 1 :]]
            if not sum(map(len, other)):
                continue  # a mask without an element is another mistake
            offsets = torch.tensor([0, *(len(x) for x in other)]).cumsum(0)
            with pytest.raises(ValueError, match=f"request {at} has {len(wrong)} .* need {len(parts[at])}"):
                run_masked(make(torch.cat(other), offsets), q, k, v, q_lens, kv_lens)
        if int(ends[-1]) > 1:
            with pytest.raises(ValueError, match=f"indptr ends at {int(ends[-1])}"):
                run_masked(make(torch.cat(parts)[:-1], ends), q, k, v, q_lens, kv_lens)


def test_flat_masks_begin_in_their_memory():
    q, k = torch.randn(2, 4, 8), torch.randn(3, 2, 8)
    with pytest.raises(ValueError, match="begins a request at -3: offsets are 0 or more"):
        run_masked(fl.custom_mask(torch.ones(6, dtype=torch.bool), [-3, 3]), q, k, k, [2], [3])
    with pytest.raises(ValueError, match="begins a request at -1"):
        run_masked(fl.packed_mask(torch.ones(1, dtype=torch.uint8), [-1, 0]), q, k, k, [2], [3])
    with pytest.raises(ValueError, match=r"shape \(2, 3\): with indptr it is flat"):
        fl.custom_mask(torch.ones(2, 3, dtype=torch.bool), [0, 6])


@pytest.mark.parametrize("kind", [fl.PerHead, fl.PerKVHead, torch.Tensor])
def test_a_number_outside_a_field_is_refused(kind):
    size = {fl.PerHead: 4, fl.PerKVHead: 2}.get(kind, 3)
    q, k = torch.randn(2, 4, 8), torch.randn(3, 2, 8)
    table = torch.randn(size)
    for index in range(-size - 2, size + 2):

        def add(self, logits, at):
            return logits * self.table[index]  # noqa: B023

        Add = type("Add", (fl.Variant,), {"__annotations__": {"table": kind}, "logits_transform": add})
        if -size <= index < size:
            want = fl.attention(q, k, k, sm_scale=float(table[index] / 8**0.5))
            torch.testing.assert_close(fl.attention(q, k, k, variant=Add(table=table)), want)
        else:
            with pytest.raises(fl.TraceError, match=rf"'table' of shape \({size},\) is indexed with {index}"):
                fl.attention(q, k, k, variant=Add(table=table))


def test_a_mask_among_other_parts_is_checked_too():
    mask = torch.ones(5, 6, dtype=torch.bool)
    variant = fl.causal & fl.custom_mask(mask) & fl.softcap(5.0)
    attn = fl.Attention(HEADS, variant=variant, dtype=torch.float32, device="cpu")
    plan = attn.plan(fl.Batch([5], kv=fl.RaggedKV([6])))
    with pytest.raises(ValueError, match=r"\[5, 6\].* has 6 and 7"):
        plan.update(fl.Batch([6], kv=fl.RaggedKV([7])))
    wider = fl.causal & fl.custom_mask(torch.ones(6, 7, dtype=torch.bool)) & fl.softcap(5.0)
    plan.update(fl.Batch([6], kv=fl.RaggedKV([7])), variant=wider)
    with pytest.raises(ValueError, match=r"\[5, 6\]"):
        plan.run(torch.randn(6, 4, 8), tuple(torch.randn(2, 7, 2, 8)), variant=variant)


def test_lengths_on_a_device_are_not_read():
    """What the host knows there is the number of requests."""
    batch = fl.Batch([2, 2], kv=fl.RaggedKV([4, 4]))
    batch.host = False  # the way of a device, on CPU tensors
    heads = HEADS
    fits = fl.custom_mask(torch.ones(2, 9, 9, dtype=torch.bool))
    fits._check_batch(batch, heads)
    with pytest.raises(ValueError, match="3 requests, but there are 2"):
        fl.custom_mask(torch.ones(3, 9, 9, dtype=torch.bool))._check_batch(batch, heads)


def test_a_mask_may_count_the_keys_of_a_request_without_queries():
    """The longest request may be one that only waits: a mask of its keys is as good as one without them."""
    heads, q = fl.HeadShape(2, 1, 16), torch.randn(3, 2, 16)
    k, v = torch.randn(2, 3 + 50, 1, 16)
    batch = fl.Batch(q_lens=[3, 0], kv=fl.RaggedKV([3, 50]))
    keep = torch.rand(2, 3, 50) > 0.3
    keep[..., 0] = True
    scores = (q.double().transpose(0, 1) @ k[:3, 0].double().T / 4).masked_fill(~keep[0, :, :3], -torch.inf)
    want = (scores.softmax(-1) @ v[:3, 0].double()).transpose(0, 1)
    for mask in (keep, keep[..., :3]):
        plan = fl.Attention(heads, variant=fl.custom_mask(mask), dtype=torch.float32, device="cpu").plan(batch)
        torch.testing.assert_close(plan.run(q, (k, v)).double(), want, atol=1e-5, rtol=1e-5)
