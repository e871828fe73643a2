"""`fl.attention`, its rows in any strides, and calls that repeat a former one."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flashloom as fl
from flashloom import dispatch
from flashloom.attention import function
from flashloom.attention.attention import Plan
from flashloom.attention.cpu import CpuExecutor

HEADS = fl.HeadShape(4, 2, 16, 24)
LAYOUTS = ["tokens first", "heads first", "padded", "shared"]


def laid_out(x, layout):
    """x [requests, tokens, heads, dim] in another place of memory."""
    if layout == "tokens first":
        return x.contiguous()
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "shared":
        return x[:1].expand(x.shape)
    more = torch.full((x.shape[0], x.shape[2], x.shape[1] + 3, x.shape[3]), float("nan"), dtype=x.dtype)
    inner = more[:, :, 2:-1].transpose(1, 2)
    inner.copy_(x)
    return inner


def tensors(tokens=5, keys=9, requests=3, dtype=torch.float32):
    return (
        torch.randn(requests, 4, tokens, 16).to(dtype),
        torch.randn(requests, 2, keys, 16).to(dtype),
        torch.randn(requests, 2, keys, 24).to(dtype),
    )


@pytest.fixture
def launches(monkeypatch):
    """How many runs were prepared in full."""
    function._recent.clear()
    seen, run = [], CpuExecutor.run
    monkeypatch.setattr(
        CpuExecutor, "run", lambda self, q, *args, **more: seen.append(q) or run(self, q, *args, **more)
    )
    return seen


@pytest.mark.parametrize("executor", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_in_any_strides(layout, executor):
    q, k, v = tensors()
    with dispatch.only(executor):
        attn = fl.Attention(HEADS, variant=fl.causal & fl.softcap(9.0), dtype=q.dtype, layout="HND", device="cpu")
        plan = attn.plan(fl.Batch([5] * 3, kv=fl.DenseKV(3, 9)))
    rows = laid_out(q.transpose(1, 2), layout)
    want, want_lse = plan.run(rows.flatten(0, 1), (k, v), return_lse=True)
    out, lse = plan.run(rows, (k, v), return_lse=True)
    assert torch.equal(out.flatten(0, 1), want)
    assert torch.equal(lse.flatten(0, 1), want_lse)
    for other in LAYOUTS[:2]:
        given, given_lse = laid_out(torch.zeros_like(out), other), torch.zeros(3, 5, 4)
        plan.run(rows, (k, v), out=given, lse=given_lse)
        assert torch.equal(given, out)
        assert torch.equal(given_lse, lse)
    one = attn.plan(fl.Batch([1] * 3, kv=fl.DenseKV(3, 9)))
    last = rows[:, -1:]
    assert torch.equal(one.run(last, (k, v)).flatten(0, 1), one.run(last.flatten(0, 1), (k, v)))


@pytest.mark.parametrize("tokens", [40, 1])
def test_rows_in_any_strides_of_bfloat16(tokens):
    """The kernels for matrix instructions, where there are any."""
    q, k, v = tensors(tokens, 70, dtype=torch.bfloat16)
    want = fl.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, variant=fl.causal)
    for layout in LAYOUTS[:3]:
        assert torch.equal(
            fl.attention(laid_out(q.transpose(1, 2), layout).transpose(1, 2), k, v, variant=fl.causal), want
        )


def test_a_plan_follows_other_lengths_in_the_same_strides():
    big, k, v = tensors(8, 9)
    rows = big.transpose(1, 2)
    attn = fl.Attention(HEADS, variant=fl.causal, dtype=big.dtype, layout="HND", device="cpu")
    plan = attn.plan(fl.Batch([8] * 3, kv=fl.DenseKV(3, 9)))
    for tokens in (8, 5, 2, 8):
        plan.update(fl.Batch([tokens] * 3, kv=fl.DenseKV(3, 9)))
        assert torch.equal(plan.run(rows[:, -tokens:], (k, v)), plan.run(rows[:, -tokens:].contiguous(), (k, v)))
    plan.update(fl.Batch([4, 5, 3], kv=fl.DenseKV(3, 9)))
    with pytest.raises(ValueError, match=r"3 requests of several lengths.*one length"):
        plan.run(rows[:, :4], (k, v))
    plan.update(fl.Batch([4, 4, 4], kv=fl.DenseKV(3, 9)))
    with pytest.raises(ValueError, match="3 requests of 4"):
        plan.run(rows[:2, :4], (k, v))
    with pytest.raises(ValueError, match=r"out has shape \(12, 4, 24\): must be \[requests, tokens"):
        plan.run(rows[:, :4], (k, v), out=torch.empty(12, 4, 24))
    with pytest.raises(ValueError, match=r"lse has shape \(12, 4\)"):
        plan.run(rows[:, :4], (k, v), lse=torch.empty(12, 4))


def test_nothing_is_copied_and_out_lies_as_q_does(launches):
    q, k, v = tensors()
    for x in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        out, lse = fl.attention(x, k, v, return_lse=True)
        assert launches[-1].data_ptr() == x.data_ptr()
        assert (out.stride(1) > out.stride(2)) == (lse.stride(1) > lse.stride(2)) == (x.stride(1) > x.stride(2))
        assert out.is_contiguous() == lse.is_contiguous() == x.is_contiguous()


def test_a_call_of_the_same_form_launches_at_once(launches):
    for _ in range(3):
        q, k, v = tensors()
        want = fl.attention(q, k, v, variant=fl.causal, return_lse=True)[0]
        fl.attention(q, k, v, variant=fl.causal)
        del launches[:]
        assert torch.equal(fl.attention(q, k, v, variant=fl.causal), want)
        again = tensors()
        got = fl.attention(*again, variant=fl.causal)
        assert not launches
        assert torch.equal(got, fl.attention(*again, variant=fl.causal, return_lse=True)[0])


@pytest.mark.parametrize("sharing", [1, 4])
def test_calls_in_between_are_noticed(sharing, monkeypatch):
    monkeypatch.setattr(function, "_SHARING", sharing)
    function._recent.clear()
    q, k, v = tensors()
    sinks = [fl.sink(torch.randn(4)) for _ in range(2)]
    calls = [{"variant": one, "sm_scale": scale} for one in sinks for scale in (None, 0.5)]
    want = [fl.attention(q, k, v, return_lse=True, **call)[0] for call in calls]
    for order in ((0, 0, 1, 2, 3), (3, 1, 1, 3), (2, 0, 2, 0)):
        for i in order:
            torch.testing.assert_close(fl.attention(q, k, v, **calls[i]), want[i])
    for tokens in (5, 6, 5, 5, 7, 5):  # of one class
        few = q[:, :, :1].expand(3, 4, tokens, 16)
        torch.testing.assert_close(
            fl.attention(few, k, v, **calls[0]), fl.attention(few, k, v, return_lse=True, **calls[0])[0]
        )


def test_what_does_not_repeat_a_call_is_checked(launches):
    q, k, v = tensors()
    want = fl.attention(q, k, v)
    for other in (q.clone().requires_grad_(), q[..., :8], q.double()):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            fl.attention(other, k, v)
    with pytest.raises(TypeError, match="v is NoneType"):
        fl.attention(q, k, None)
    with pytest.raises(TypeError, match="sm_scale=\\[1\\] is not a number"):
        fl.attention(q, k, v, sm_scale=[1])
    with pytest.raises(ValueError, match="same heads and tokens"):
        fl.attention(q, k, v[:, :, :-1])
    assert torch.equal(fl.attention(laid_out(q.transpose(1, 2), "padded").transpose(1, 2), k, v), want)
    assert torch.equal(fl.attention(q, k, v), want)


def test_a_monitor_sees_calls_that_repeat(launches):
    q, k, v = tensors()
    fl.attention(q, k, v)
    with fl.monitor() as seen:
        fl.attention(q, k, v)
    assert len(seen.runs) == 1
    assert Plan.run is function._RUN


def test_shapes_that_take_turns_have_plans_of_their_own(launches):
    """As long as a class has few of them; a further shape takes over the plan that was prepared first."""
    shapes = [tensors(n) for n in (5, 6, 7, 8)]
    want = [fl.attention(*x, variant=fl.causal) for x in shapes]
    del launches[:]
    for i in (0, 3, 1, 2, 0, 0, 1):
        assert torch.equal(fl.attention(*shapes[i], variant=fl.causal), want[i])
    assert not launches
    more = tensors(5, 16)
    fl.attention(*more, variant=fl.causal)  # of the same class: 9 to 16 keys
    assert len(function._recent.plans) == 4
    for i in range(4):
        assert torch.equal(fl.attention(*shapes[i], variant=fl.causal), want[i])


def test_a_graph_takes_a_plan_of_its_shapes_for_itself():
    """What `fl.attention` asks for while a graph is captured; a stream is a number among a plan's names."""
    function._recent.clear()
    q, k, v = tensors()
    want = fl.attention(q, k, v)
    (name,), (plan,) = function._recent.plans, function._recent.plans.values()
    on_capture, elsewhere = ((*name[:-2], stream, name[-1]) for stream in (7, 8))
    assert function._for_graph(on_capture) is plan  # warmed up on another stream
    function._recent.captured.add(plan)
    assert function._for_graph(on_capture) is plan
    assert not function._recent.calls
    assert not function._recent.classes
    with pytest.raises(
        RuntimeError, match=r"no plan yet for q \(3, 4, 5, 16\) and k .* call it once with such tensors"
    ):
        function._for_graph(elsewhere)  # it is the other graph's
    assert torch.equal(fl.attention(q, k, v), want)
    assert plan not in [plan for name, plan in function._recent.plans.items() if name[-2] is None]
    function._recent.captured.discard(plan)
    function._recent.clear()


def test_a_refused_update_leaves_the_plan_as_it_was(monkeypatch):
    monkeypatch.setattr(function, "_SHARING", 1)
    function._recent.clear()
    q, k, v = tensors(6)
    want = fl.attention(q, k, v)
    update = CpuExecutor.update

    def refuse(self, batch):
        raise ValueError("not now")

    monkeypatch.setattr(CpuExecutor, "update", refuse)
    with pytest.raises(ValueError, match="not now"):
        fl.attention(q[:, :, :-1].clone(), k, v)  # of the same class
    monkeypatch.setattr(CpuExecutor, "update", update)
    few = q[:, :, :-1].clone()
    assert torch.equal(fl.attention(few, k, v), fl.attention(q, k, v)[:, :, :-1])
    assert torch.equal(fl.attention(q, k, v), want)


def test_threads_do_not_pack_the_arguments_of_one_launch_together(monkeypatch):
    """The append kernel is shared by all threads, and a launch lets other threads run."""
    from flashloom.attention import triton_append

    inside, most = [], []

    def launch(grid, words):
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()

    monkeypatch.setattr(triton_append.launch, "launcher", lambda kernel, device: launch)
    monkeypatch.setattr(triton_append, "_launchers", {})
    cache = fl.PagedKVCache(1, 2, 4, fl.HeadShape(2, 2, 16), torch.float32, "cpu")
    x, slots = torch.randn(3, 2, 16), torch.arange(3)
    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(triton_append.append, cache[0], x, x, slots) for _ in range(8)]:
            done.result()
    assert max(most) == 1
