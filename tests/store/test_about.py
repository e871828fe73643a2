"""What a stored kernel is called: variant, heads, dtypes and phase for people, and nothing of it in a key."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from click.testing import CliRunner

import flashloom as fl
from flashloom import settings, store
from flashloom.attention import cpu
from flashloom.cli import main
from flashloom.target import Target
from flashloom.variant.title import name_of

HERE = Target.here()


def variant(name, factor=2.0):
    """A variant of a class of this name; all of them are the same code."""

    def logits_transform(self, logits, at):
        return logits * factor

    return type(name, (fl.Variant,), {"logits_transform": logits_transform, "__module__": __name__})()


def attention(rules, heads=(4, 2, 16), dtype=torch.float32, **more):
    return fl.Attention(fl.HeadShape(*heads), variant=rules, dtype=dtype, device="cpu", **more)


def said(*words):
    done = CliRunner().invoke(main, ["store", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def four(monkeypatch, builder):
    """Four kernels in the store, whose compiler costs nothing."""
    monkeypatch.setattr(cpu.cpp.CppKernel, "_compile", lambda self, folder: builder()(folder))
    kernels = [
        cpu.kernel(one.spec, HERE)
        for one in (
            attention(fl.causal),
            attention(fl.causal & fl.softcap(50.0)),
            attention(variant("Mine") & fl.sliding_window(3, 3), heads=(8, 8, 24)),
            attention(fl.full, dtype=torch.bfloat16, kv_dtype=torch.int8),
        )
    ]
    for kernel in kernels:
        kernel.entry()
    return kernels


def test_names_are_those_that_people_wrote():
    def doc(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    names = {
        "full": fl.full, "causal & softcap": fl.causal & fl.softcap(3.0), "sliding_window": fl.sliding_window(3, 3),
        "Mine & causal": variant("Mine") & fl.causal, "from_flex(doc)": fl.from_flex(mask_mod=doc),
        "custom_mask": fl.custom_mask(torch.ones(3, 3, dtype=torch.bool)), "rope": fl.rope(8),
        "alibi & sink": fl.alibi(4) & fl.sink(torch.zeros(4)), "sigmoid": fl.sigmoid(),
        "prefix_lm": fl.prefix_lm(torch.tensor([3])),
    }  # fmt: skip
    assert {name: name_of(one) for name, one in names.items()} == {name: name for name in names}


def test_no_key_depends_on_a_name():
    one, other = (cpu.kernel(attention(variant(name)).spec, HERE) for name in ("First", "Second"))
    assert one.label != other.label
    assert one.fields == other.fields
    assert one == other
    specs = [attention(variant(name)).spec for name in ("First", "Second")]
    assert specs[0] == specs[1]
    assert hash(specs[0]) == hash(specs[1])
    assert cpu.kernel(attention(variant("First", 3.0)).spec, HERE).fields != one.fields


def test_ls_shows_variant_heads_dtypes_and_phase(four):
    lines = said("ls").splitlines()
    assert len(lines) == 5
    for name in (
        "causal, 2:1x16, f32, prefill and decode",
        "causal & softcap, 2:1x16, f32, prefill and decode",
        "Mine & sliding_window, 1:1x24, f32, prefill and decode",
        "full, 2:1x16, bf16, int8 KV, prefill and decode",
    ):
        [line] = [line for line in lines if line.endswith(f"  {name}")]
        assert line.count(HERE.name) == 1
    assert len(said("ls", "softcap").splitlines()) == 2


def test_ls_as_json_has_what_identifies_a_kernel(four):
    found = {one["label"]: one for one in json.loads(said("ls", "--json"))}
    assert set(found) == {kernel.label for kernel in four}
    for kernel in four:
        one = found[kernel.label]
        assert one["about"] == kernel.about
        assert one["fields"] == kernel.fields
        assert one["key"] == kernel.entry().key.key
        assert one["bytes"] > 0
    assert [one["label"] for one in json.loads(said("ls", "softcap", "--json"))] == [four[1].label]


def test_why_miss_finds_by_phase_and_says_what_differs_in_words(four):
    assert said("why-miss", "decode").count("built in") == 4
    lines = said("why-miss", "softcap").splitlines()
    assert lines[1].strip().startswith('variant: asked "causal & softcap", found "causal"; source: asked')
    assert 'dtypes: asked "bf16, int8 KV", found' in said("why-miss", "int8")


def test_what_seals_names_the_variant(four):
    store.seal()
    with pytest.raises(fl.SealedError, match=r"causal & ALIBI.*variant: asked \"causal & ALIBI\", found") as error:
        cpu.kernel(attention(fl.causal & variant("ALIBI", 4.0)).spec, HERE).entry()
    assert "decode" in str(error.value)


def test_entries_written_without_a_name_are_still_read(four, folder):
    kernel = four[0]
    entry = kernel.entry()
    path = folder.path(entry.key) / "entry.json"
    body = json.loads(path.read_bytes().split(b"\n", 1)[1])
    del body["about"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(store.digest(text).encode() + b"\n" + text + b"\n")
    assert kernel.entry().origin == str(folder.root)
    assert "causal, 2:1x16" in said("ls")


def test_a_pack_is_named_by_what_was_added_whatever_the_store_says(four, tmp_path):
    def packed(path, *names):
        pack = fl.Pack([HERE])
        for name in names:
            pack.add(attention(variant(name)), [fl.Workload("w", fl.HeadShape(4, 2, 16), (1,), (9,))])
        return pack.build(tmp_path / path)

    cpu.kernel(attention(variant("Another")).spec, HERE).entry()  # the store has it by this name
    one, other = packed("one", "First", "Second"), packed("other", "Second", "First")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert [listed["label"] for listed in one.entries] == ["First, 2:1x16, f32, prefill and decode"]
    listed = CliRunner().invoke(main, ["pack", "ls", str(tmp_path / "one")]).output
    assert "First, 2:1x16, f32, prefill and decode" in listed
    assert next(iter(other.read_all())).about["variant"] == "First"


def test_gpu_kernels_say_their_phase():
    heads = fl.HeadShape(32, 8, 128)
    one = fl.Attention(heads, variant=fl.causal, dtype=torch.bfloat16, device="cpu")
    steps = [fl.Workload("d", heads, (1,) * 8, (512,) * 8, 16), fl.Workload("p", heads, (4096,), (4096,), 16)]
    for target in ("sm80", "sm90"):
        pack = [fl.Pack([target]).add(one, [step])._kernels.values() for step in steps]
        phases = [{kernel.about.get("phase") for kernel in kernels} - {None} for kernels in pack]
        assert phases == [{"decode"}, {"prefill"}]
        labels = {kernel.label for kernels in pack for kernel in kernels}
        assert any(label.startswith("causal, 32/8x128, bf16, decode") for label in labels)
        assert any("schedule of batches" in label for label in labels)


FAILS_TO_WRITE = """
import torch, flashloom as fl
q = torch.zeros(3, 1, 16)
fl.attention(q, q, q)
"""


def test_a_store_that_fails_is_said_once_at_the_users_line(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "program.py"
    path.write_text(FAILS_TO_WRITE)
    env = {**os.environ, "FLASHLOOM_CACHE_DIR": str(tmp_path / "file" / "store")}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the kernel store failed") == 1, done.stderr
    assert f"{path}:4: RuntimeWarning" in done.stderr


def test_a_warning_points_past_flashloom(builder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings.configure(cache_dir="/proc/nothing/here")
        store.get_or_build({"kind": "test"}, builder())
    assert [one.filename for one in caught] == [__file__]
