"""Facts about files: kept through everything, and in few files."""

import errno
import os
from pathlib import Path

import pytest

from kinema.data import facts as facts_module
from kinema.data.facts import EXAMINED, PROBED, FactStore


def test_facts_survive_and_half_a_line_is_no_fact(tmp_path: Path):
    one, two = FactStore(tmp_path), FactStore(tmp_path)
    one["a\0" + "1"] = "x"
    two["b"] = "y\nz"
    one.refresh()
    assert dict(one) == {"a\0" + "1": "x", "b": "y\nz"}
    with next(tmp_path.glob("*.facts")).open("ab") as file:
        file.write(b'["c", "to')
    assert dict(FactStore(tmp_path)) == dict(one)
    one.close(), two.close()


def files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_facts_of_many_files_become_one(tmp_path: Path):
    """Each store is a process; what was found last counts, and what another version found does not."""
    stores = [FactStore(tmp_path) for _ in range(4)]
    for number, store in enumerate(stores):
        store[f"/clips/{number}.mp4\0001\0002"] = f'hash "{number}"'
        store["/clips/same"] = f"from {number}"
        store.close()
    os.utime(tmp_path / stores[2]._names[-1], ns=(2**62, 2**62))
    before = dict(FactStore(tmp_path))
    assert before["/clips/same"] == "from 2"
    old = FactStore(tmp_path)
    old["examined 1 abc"] = old["probed 0\0/clips/0.mp4"] = "of another version"
    old[f"{EXAMINED} abc"] = old[f"{PROBED}\0/clips/0.mp4"] = "of this one"
    reading = FactStore(tmp_path)
    assert old.compact() == 4 and files(tmp_path) == [".facts"]
    expected = before | {f"{EXAMINED} abc": "of this one", f"{PROBED}\0/clips/0.mp4": "of this one"}
    assert dict(old) == dict(FactStore(tmp_path)) == expected and len(old) == 7
    old["/clips/new"] = "later"
    assert dict(FactStore(tmp_path)) == expected | {"/clips/new": "later"}
    assert old.compact() == 1 and FactStore(tmp_path)["/clips/new"] == "later"
    assert FactStore(tmp_path).compact() == 0
    assert reading.get("/clips/0.mp4\0001\0002") is None, "its file is gone: the fact is found anew"
    reading.refresh()
    assert reading["/clips/same"] == expected["/clips/same"]


def test_a_full_disk_leaves_facts_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in "ab":
        store = FactStore(tmp_path)
        store[name] = name
        store.close()

    def full(_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = FactStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(facts_module.json, "dumps", full)
        assert store.compact() == 0
    assert files(tmp_path) == [".facts", ".facts"]
    assert dict(store) == dict(FactStore(tmp_path)) == {"a": "a", "b": "b"}


@pytest.mark.parametrize("when", ["indexed", "read"])
def test_a_file_that_cannot_be_read_now_keeps_its_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Storage that does not answer for a moment must not cost the hashes of a million clips."""
    for name in "abc":
        store = FactStore(tmp_path)
        store[name] = name
        store.close()
    away = tmp_path / store._names[-1]
    original_open, original_path_open = os.open, Path.open

    def fail(path: Path | str) -> None:
        if Path(path) == away:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        reading = FactStore(tmp_path) if when == "read" else None
        patch.setattr(os, "open", lambda path, *rest: fail(path) or original_open(path, *rest))
        if reading is None:
            patch.setattr(Path, "open", lambda path, *rest: fail(path) or original_path_open(path, *rest))
            reading = FactStore(tmp_path)
            assert dict(reading) == {"a": "a", "b": "b"}
        assert reading.compact() == 1 and away.exists()
    assert len(files(tmp_path)) == 2 and dict(FactStore(tmp_path)) == {"a": "a", "b": "b", "c": "c"}
