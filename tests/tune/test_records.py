"""Records: what is read is what was written, under its own key, or it is a counted miss."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.tune.conftest import make_question, make_record

from flashloom import records
from flashloom.records import Folder, Rejected, Scope, bucket_of, parse
from flashloom.records import folder as folder_module

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return Folder.at(tmp_path / "records")


def the_file(folder):
    (path,) = folder.files()
    return path


def reopened(folder):
    """As another process sees it."""
    own = Folder(folder.root)
    return Scope((own,), own, is_base=True)


def test_what_was_written_is_read(folder, question):
    record = make_record(question)
    assert folder.publish(record)
    scope = reopened(folder)
    assert scope.find(question, (1, 1)) == 7
    assert scope.record(question, (1, 1)) == record
    assert scope.find(question, (2, 1)) is None
    assert (scope.counters.hits, scope.counters.misses) == (1, 1)
    text = the_file(folder).read_text()
    assert json.loads(text)["config"] == {"tile": 7}
    assert text.count("\n") > 20, "for people: one value a line"


def test_two_writes_give_the_same_bytes(folder, question, tmp_path):
    record = make_record(question)
    assert record.to_bytes() == make_record(question).to_bytes()
    assert parse(record.to_bytes()) == record


def test_every_field_is_in_the_key():
    fields = {"dim": 64, "dtype": "bf16", "machine": "a", "kernels": {"x": "1"}}
    seen = {make_question(**fields).key((1, 1)).key}
    for name in fields:
        seen.add(make_question(**{**fields, name: "other"}).key((1, 1)).key)
    seen |= {
        make_question(**fields).key((1, 2)).key,
        make_question("other", **fields).key((1, 1)).key,
        make_question(toolchain={"compiler": "c 2"}, **fields).key((1, 1)).key,
        make_question(**fields, more=1).key((1, 1)).key,
    }
    assert len(seen) == 1 + len(fields) + 4


def test_a_key_needs_all_sizes(question):
    with pytest.raises(ValueError, match="rows, keys"):
        question.key((1,))


def test_a_host_without_a_compiler_takes_any_toolchains_record(folder):
    folder.publish(make_record(make_question(dim=64)))
    assert reopened(folder).find(make_question(dim=64, toolchain={"compiler": "c 2"}), (1, 1)) is None
    bare = records.Question("op", {"dim": 64}, None, ("rows", "keys"), make_question().read)
    assert reopened(folder).find(bare, (1, 1)) == 7


@pytest.mark.parametrize("bucket", [(0, 1), (1, 1), (3, 5), (16384, 16385)])
def test_buckets_round_up_without_an_end(bucket):
    assert all(a <= b < 2 * a or a == b for a, b in zip(bucket, bucket_of(bucket)))
    assert bucket_of(bucket_of(bucket)) == bucket_of(bucket)
    with pytest.raises(ValueError, match="-1"):
        bucket_of((-1,))


# --- damage ---


@hypothesis_settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_is_believed(data, question):
    text = bytearray(make_record(question).to_bytes())
    at = data.draw(st.integers(0, len(text) * 8 - 1))
    text[at // 8] ^= 1 << at % 8
    try:
        found = parse(bytes(text), question.key((1, 1)))
    except Rejected:
        return
    assert found == make_record(question), "white space may change, what it says may not"


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000))
def test_no_truncated_record_is_believed(cut, question):
    text = make_record(question).to_bytes()
    if cut < len(text) - 1:
        with pytest.raises(Rejected):
            parse(text[:cut], question.key((1, 1)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_is_refused_or_read(data, question):
    """A digest proves nothing about who wrote it: types are checked too."""
    body = json.loads(make_record(question).to_bytes())
    body.pop("sha256")
    body[data.draw(st.sampled_from(sorted(body)))] = data.draw(JSON)
    try:
        text = json.dumps(body | {"sha256": records.record.digest(body)}).encode()
    except ValueError:
        return  # NaN has no digest
    try:
        found = parse(text)
    except Rejected:
        return
    assert type(found.speedup) is float
    assert found.config


@pytest.mark.parametrize(
    "text",
    [b"", b"\0" * 100, b"[]", b"null", b'"x"', b"[" * 100_000, b"{" * 3, b"\xff\xfe", b'{"format": 1}', b"x" * 2**21],
)
def test_files_that_are_no_records_are_misses(folder, question, text):
    folder.publish(make_record(question))
    the_file(folder).write_bytes(text)
    scope = reopened(folder)
    assert scope.find(question, (1, 1)) is None
    assert scope.find(question, (1, 1)) is None
    assert scope.counters.corrupt == 1


def test_foreign_outdated_and_invalid_records_are_misses(folder, question):
    folder.publish(make_record(question))
    path = the_file(folder)
    right = path.read_bytes()
    body = json.loads(right)
    body.pop("sha256")

    def count(content):
        path.write_bytes(content)
        scope = reopened(folder)
        assert scope.find(question, (1, 1)) is None
        return {name: n for name, n in vars(scope.counters).items() if n and name != "misses"}

    def signed(**change):
        return json.dumps((new := body | change) | {"sha256": records.record.digest(new)}).encode()

    assert count(make_record(question, (2, 2)).to_bytes()) == {"foreign": 1}
    assert count(make_record(make_question("other", dim=64)).to_bytes()) == {"foreign": 1}
    assert count(signed(format=2)) == {"outdated": 1}
    assert count(signed(config={"tile": 5000})) == {"invalid": 1}
    assert count(signed(config={"tile": "7"})) == {"invalid": 1}
    assert count(signed(config={"tile": True})) == {"invalid": 1}
    assert count(signed(config={})) == {"corrupt": 1}
    path.unlink()
    path.mkdir()
    scope = reopened(folder)
    assert scope.find(question, (1, 1)) is None
    assert scope.counters.corrupt == 1
    path.rmdir()
    os.mkfifo(path)  # nobody writes to it: reading must not wait
    assert reopened(folder).find(question, (1, 1)) is None


def test_a_damaged_record_is_replaced_by_the_next(folder, question):
    folder.publish(make_record(question))
    the_file(folder).write_bytes(b"{}")
    scope = reopened(folder)
    assert scope.find(question, (1, 1)) is None
    scope.publish(make_record(question, tile=8))
    assert scope.find(question, (1, 1)) == 8


def test_an_unfinished_record_does_not_replace_a_finished_one(folder, question):
    folder.publish(make_record(question, tile=8))
    folder.publish(make_record(question, tile=9, complete=False))
    assert reopened(folder).find(question, (1, 1)) == 8


def test_a_folder_that_cannot_be_written_keeps_records_in_memory(tmp_path, question):
    (tmp_path / "file").write_text("in the way")
    scope = Scope((folder := Folder.at(tmp_path / "file" / "records"),), folder, is_base=True)
    assert not scope.publish(make_record(question))
    assert scope.find(question, (1, 1)) == 7
    assert scope.counters.unpublished == 1


def test_a_kernels_change_is_a_miss_of_its_own_records_alone(folder):
    mine, other = make_question(kernel="a"), make_question("other", kernel="b")
    for one in (mine, other):
        folder.publish(make_record(one))
    scope = reopened(folder)
    assert scope.find(make_question(kernel="a changed"), (1, 1)) is None
    assert scope.find(other, (1, 1)) == scope.find(mine, (1, 1)) == 7


# --- many processes ---

WRITER = """
import sys
from tests.tune.conftest import make_question, make_record
from flashloom.records import Folder
folder, who = Folder(sys.argv[1]), int(sys.argv[2])
question = make_question(dim=64)
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    folder.publish(make_record(question, (i, who), tile=i % 1000))
    folder.publish(make_record(question, (i, 0), tile=who))
    print(i, flush=True)
"""


def writer(root, who, count):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-c", WRITER, str(root), str(who), str(count)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_lose_nothing_of_each_other(folder, question):
    count, writers = 50, (1, 2, 3)
    running = [writer(folder.root, who, count) for who in writers]
    assert [process.wait(600) for process in running] == [0, 0, 0]
    scope = reopened(folder)
    for i in range(count):
        assert [scope.find(question, (i, who)) for who in writers] == [i] * 3
        assert scope.find(question, (i, 0)) in writers
    assert scope.counters.misses == 0


def test_killed_writers_leave_whole_records_only(folder, question):
    done = {}
    for who in (1, 2, 3, 4):
        process = writer(folder.root, who, 100_000)
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "0\n"]
        time.sleep(0.02 + 0.013 * who)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done[who] = [0, *(int(line) for line in process.stdout.read().split())]
    scope = reopened(folder)
    for who, numbers in done.items():
        assert [scope.find(question, (i, who)) for i in numbers] == [i % 1000 for i in numbers]
    assert scope.counters.misses == scope.counters.corrupt == 0
    assert all(folder.read_file(path) for path in folder.files())
    folder.remove_old(seconds=-1)
    assert not list(folder.root.glob("v*/*/.*"))


@pytest.mark.parametrize("where", ["folder", "write", "sync", "rename"])
def test_dying_at_any_step_leaves_the_former_record(folder, question, monkeypatch, where):
    folder.publish(make_record(question, tile=1))

    def die(name):
        if name == where:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder_module, "step", die)
    with pytest.raises(KeyboardInterrupt):
        folder.publish(make_record(question, tile=2))
    assert reopened(folder).find(question, (1, 1)) == 1


def test_what_others_write_is_seen_after_a_refresh(folder, question):
    scope = reopened(folder)
    assert scope.find(question, (1, 1)) is None
    folder.publish(make_record(question))
    assert scope.find(question, (1, 1)) is None, "one listing: a miss costs no file access"
    scope.refresh()
    assert scope.find(question, (1, 1)) == 7


# --- speed and memory ---


def test_a_look_up_takes_less_than_two_microseconds(folder, question):
    for i in range(64):
        folder.publish(make_record(question, (i, 1), tile=i))
    scope = Scope((folder,), folder)
    with records.entered(scope):
        assert records.find(question, (5, 1)) == 5

        def once(bucket, n=20_000):
            start = time.thread_time()  # what other processes take of the machine is not its cost
            for _ in range(n):
                records.find(question, bucket)
            return (time.thread_time() - start) / n

        assert min(once((5, 1)) for _ in range(5)) < 2e-6
        assert min(once((999, 1)) for _ in range(5)) < 2e-6, "a miss too"


def test_a_million_shapes_do_not_fill_memory(folder, question):
    scope = Scope((folder,), folder)
    for i in range(17_000):
        scope.find(question, (i, 1))
    assert len(scope._memo) <= 16384
    assert len(scope.missed) <= 16384
