"""Verifying, measuring and pruning a cache: what is said is there, and what is wanted stays whatever happens."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kinema.cli import app
from kinema.data import cache_tools
from kinema.data.cache import Cache, CacheFull, entry_key
from kinema.data.cache_tools import REST, forget, prune, size_report, verify
from kinema.data.writer import STALE_SECONDS
from kinema.errors import UserError

FORK = multiprocessing.get_context("fork")


def key_of(number: int) -> bytes:
    return entry_key("tools", number)


def tensors_of(number: int, floats: int = 50) -> dict[str, torch.Tensor]:
    drawn = torch.randn(floats + number % 7, generator=torch.Generator().manual_seed(number))
    return {"latents": drawn, "text": drawn[: number % 5].to(torch.bfloat16)}


def bytes_of(number: int) -> int:
    return 4 * (50 + number % 7) + 2 * (number % 5)


def fill(folder: Path, numbers, segment_entries: int = 10, floats: int = 50) -> None:
    with Cache(folder, segment_entries=segment_entries) as cache:
        for number in numbers:
            cache.put(key_of(number), tensors_of(number, floats))


def holds(cache: Cache, numbers, floats: int = 50) -> None:
    """The cache has exactly these entries, as they were written."""
    assert set(cache.keys()) == {key_of(number) for number in numbers}
    for number in numbers:
        found, expected = cache.get(key_of(number)), tensors_of(number, floats)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def in_child(work, *arguments) -> int:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _write_and_wait(folder: Path, numbers, ready, done) -> None:
    torch.set_num_threads(1)
    cache = Cache(folder)
    for number in numbers:
        cache.put(key_of(number), tensors_of(number))
    ready.send(True)
    done.recv()
    cache.close()


class Living:
    """A process with an open segment."""

    def __init__(self, folder: Path, numbers) -> None:
        ready, tell_ready = FORK.Pipe(duplex=False)
        wait, self.finish = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=_write_and_wait, args=(folder, numbers, tell_ready, wait))
        self.process.start()
        assert ready.poll(60) and ready.recv()

    def end(self) -> None:
        self.finish.send(True)
        self.process.join(60)
        assert self.process.exitcode == 0


# -- verify


def test_an_intact_cache_is_found_intact(tmp_path: Path):
    fill(tmp_path, range(25))
    living = Living(tmp_path, range(30, 33))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report = verify(tmp_path)
    assert (report.entries, report.files, report.damaged, report.leftovers) == (28, 4, [], {})
    assert list(report.unfinished.values()) == ["a process writes to it"]
    assert report.bytes == sum(len(data) for path, data in before.items() if path.suffix in (".open", ".safetensors"))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    living.end()


def test_every_damage_is_listed_by_file(tmp_path: Path):
    fill(tmp_path, range(50))
    flipped, cut, header, index, _ = sorted(tmp_path.glob("*.safetensors"))
    flip(flipped, -1)
    flip(flipped, flipped.stat().st_size - 700)
    cut.write_bytes(cut.read_bytes()[:-1])
    flip(header, 9)
    flip(index.with_suffix(".index"), 60)
    gone, old, new, words = (
        tmp_path / f"0123456789ab-{name}"
        for name in ("0000.index", "0001.safetensors.0.tmp", "0002.safetensors.0.tmp", "0003.open")
    )
    for path in (gone, old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - STALE_SECONDS - 10,) * 2)
    words.write_bytes(b"no json\n")
    (tmp_path / "model.safetensors").write_bytes(b"somebody's weights")
    report = verify(tmp_path)
    found = {one.file: one for one in report.damaged}
    assert found.keys() == {flipped.name, cut.name, header.name, words.name}
    assert found[flipped.name].reason == "2 of 10 entries do not match their checksums"
    assert found[flipped.name].intact == 8
    assert found[cut.name].reason == "it is cut short"
    assert report.entries == 28 and report.files == 3
    assert report.leftovers.keys() == {index.with_suffix(".index").name, gone.name, old.name}
    assert report.foreign == ["model.safetensors"]
    text = "\n".join(report.lines())
    assert f"damaged: {flipped}: 2 of 10 entries do not match their checksums; 8 entries in it are intact" in text
    for name in (*found, *report.leftovers):  # as the report says: deleting them loses nothing else
        (tmp_path / name).unlink()
    Cache(tmp_path).adopt()  # clears the index files of the shards that are gone
    again = verify(tmp_path)
    assert (again.entries, again.damaged, again.leftovers) == (20, [], {})


def test_every_flipped_bit_is_found(tmp_path: Path):
    fill(tmp_path, range(6))
    (shard,) = tmp_path.glob("*.safetensors")
    good = shard.read_bytes()
    for place in random.Random(0).sample(range(len(good)), 150):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        report = verify(tmp_path)
        harmless = report.entries == 6 and not report.damaged and not report.leftovers
        assert not harmless or good[place : place + 1] == b" ", place  # padding of the header
    shard.write_bytes(good)
    assert verify(tmp_path).entries == 6


def _tear(folder: Path) -> None:
    cache = Cache(folder)
    for number in range(3):
        cache.put(key_of(number), tensors_of(number))
    os.ftruncate(cache._writer._descriptor, cache._writer.segment.end - 5)
    os._exit(0)


def test_the_torn_end_of_a_killed_writer_is_no_damage(tmp_path: Path):
    assert in_child(_tear, tmp_path) == 0
    report = verify(tmp_path)
    assert (report.entries, report.damaged) == (2, [])
    (why,) = report.unfinished.values()
    assert why.endswith("bytes are no whole entry; what is before them is used")


# -- prune and forget


def test_prune_leaves_exactly_what_is_wanted(tmp_path: Path):
    fill(tmp_path, range(60))
    fill(tmp_path / "copy", range(15, 25))
    for path in (tmp_path / "copy").glob("*.safetensors"):
        path.rename(tmp_path / f"z{path.name}")  # two writers met: ten entries are there twice
    cache, reader = Cache(tmp_path), Cache(tmp_path)
    wanted = [*range(30), 35, 41, 42]
    keys = [key_of(number) for number in [*wanted, 999]]
    before = {path.name for path in tmp_path.glob("*.safetensors")}
    would = prune(cache, iter(keys), dry_run=True)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == before
    freed = prune(cache, iter(keys))
    assert freed == would
    assert (freed.kept, freed.entries, freed.damaged) == (33, 70 - 33, 0)
    assert freed.bytes == sum(map(bytes_of, {*range(60)} - {*wanted})) + sum(map(bytes_of, range(15, 25)))
    assert freed.rewritten == 2 and freed.deleted == 2  # 35 and 41, 42 are of two; two have nothing; the copy is gone
    for one in (cache, Cache(tmp_path), reader):
        one.refresh()
        holds(one, wanted)
    assert not verify(tmp_path).damaged and verify(tmp_path).entries == 33
    assert len(list(tmp_path.glob("*.index"))) == len(list(tmp_path.glob("*.safetensors")))
    assert prune(cache, iter(keys)).entries == 0


def test_a_reader_meets_a_pruned_shard(tmp_path: Path):
    fill(tmp_path, range(20))
    reader = Cache(tmp_path)
    prune(Cache(tmp_path), [key_of(number) for number in range(3, 20)])
    assert torch.equal(reader.get(key_of(5))["latents"], tensors_of(5)["latents"])
    with pytest.raises(KeyError):
        reader.get(key_of(1))
    holds(reader, range(3, 20))


def test_forget_takes_exactly_these_also_their_copies(tmp_path: Path):
    fill(tmp_path, range(30))
    fill(tmp_path / "copy", range(5, 12))
    for path in (tmp_path / "copy").glob("*.safetensors"):
        path.rename(tmp_path / path.name)
    cache = Cache(tmp_path)
    cache.put(key_of(40), tensors_of(40))  # open still
    cache.put(key_of(41), tensors_of(41))
    gone = [*range(8, 20), 40]
    freed = forget(cache, (key_of(number) for number in [*gone, 77]))
    assert freed.entries == len(gone) + 4
    left = [number for number in [*range(30), 41] if number not in gone]
    holds(cache, left)
    holds(Cache(tmp_path), left)
    for number in gone:
        assert cache.put(key_of(number), tensors_of(number)) > 0  # made anew
    cache.close()
    holds(Cache(tmp_path), [*range(30), 40, 41])


def test_the_damaged_are_not_blessed_by_being_copied(tmp_path: Path):
    fill(tmp_path, range(10))
    (shard,) = tmp_path.glob("*.safetensors")
    flip(shard, -1)
    cache = Cache(tmp_path)
    freed = prune(cache, [key_of(number) for number in range(9)])
    left = set(cache.keys())
    assert freed.kept - freed.damaged == len(left) >= 8
    assert not verify(tmp_path).damaged
    holds(cache, [number for number in range(9) if key_of(number) in left])


def test_an_empty_answer_does_not_empty_the_cache(tmp_path: Path):
    fill(tmp_path, range(5))
    with pytest.raises(UserError, match=r"needs nothing of what the cache .* would empty it"):
        prune(Cache(tmp_path), [])
    holds(Cache(tmp_path), range(5))


def test_a_living_writer_stops_it_and_is_never_touched(tmp_path: Path):
    fill(tmp_path, range(20))
    living = Living(tmp_path, range(30, 35))
    (segment,) = tmp_path.glob("*.open")
    written = segment.read_bytes()
    cache = Cache(tmp_path)
    for refused in (lambda: prune(cache, [key_of(1)]), lambda: forget(cache, [key_of(1)])):
        with pytest.raises(UserError, match=rf"another process writes to the cache .*{segment.name}.* Wait until"):
            refused()
    assert prune(cache, [key_of(1)], dry_run=True).entries == 19
    holds(cache, [*range(20), *range(30, 35)])
    assert prune(cache, [key_of(1)], force=True).entries == 19
    assert segment.read_bytes() == written
    living.end()
    cache.refresh()
    holds(cache, [1, *range(30, 35)])


def _prune(folder: Path, keys: list[bytes]) -> None:
    torch.set_num_threads(1)
    prune(Cache(folder), keys)


def test_killed_at_any_moment_it_loses_nothing_that_is_wanted(tmp_path: Path):
    rng, wanted = random.Random(1), [number for number in range(300) if number % 3]
    keys = [key_of(number) for number in wanted]
    fill(tmp_path, range(300), floats=2000)
    killed = 0
    for _ in range(10):
        before, changes = set(os.listdir(tmp_path)), rng.randint(1, 8)
        process = FORK.Process(target=_prune, args=(tmp_path, keys))
        process.start()
        while process.is_alive() and len(before ^ set(os.listdir(tmp_path))) < changes:
            pass
        time.sleep(rng.uniform(0, 0.002))  # anywhere between two renames
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        cache = Cache(tmp_path)
        assert not cache.damaged and cache.missing(keys) == []
        for number in wanted:
            assert torch.equal(cache.get(key_of(number))["latents"], tensors_of(number, 2000)["latents"])
    assert killed >= 3
    prune(Cache(tmp_path), keys)
    holds(Cache(tmp_path), wanted, 2000)
    assert verify(tmp_path).entries == len(wanted)


def _prune_without_space(folder: Path, keys: list[bytes]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    try:
        prune(Cache(folder), keys)
    except CacheFull as error:
        assert "cannot be written anew" in str(error)
        os._exit(7)


def test_a_full_disk_stops_it_and_nothing_is_lost(tmp_path: Path):
    fill(tmp_path, range(20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    assert in_child(_prune_without_space, tmp_path, [key_of(3), key_of(13)]) == 7
    holds(Cache(tmp_path), range(20))
    assert not list(tmp_path.glob("*.tmp"))


# -- sizes


def test_sizes_by_group_are_those_of_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_tools, "CHUNK", 7)
    fill(tmp_path, range(40))
    fill(tmp_path / "copy", [3])
    for path in (tmp_path / "copy").glob("*.safetensors"):
        path.rename(tmp_path / path.name)
    living = Living(tmp_path, [50, 51])
    groups = {"text": [*range(20), 2, 900, 900, 901], "latents": [5, 25, 26, 50]}
    planned = [(name, key_of(number)) for name, numbers in groups.items() for number in numbers]
    random.Random(3).shuffle(planned)
    planned.sort(key=lambda pair: pair[1] == key_of(5) and pair[0] == "latents")  # counted as text, which came first
    rows = size_report(Cache(tmp_path), iter(planned))
    assert rows["text"] == (22, 20, sum(map(bytes_of, range(20))) + bytes_of(3))
    wanted, there, size = rows["latents"]
    assert (wanted, there) == (3, 3)
    header = size - bytes_of(25) - bytes_of(26) - bytes_of(50)
    assert 0 < header < 300  # of what is not sealed, the size of its own file is counted
    unused = [*range(20, 25), *range(27, 40)]
    assert rows[REST][:2] == (len(unused) + 1,) * 2
    assert sum(map(bytes_of, [*unused, 51])) < rows[REST][2] < sum(map(bytes_of, [*unused, 51])) + 300
    living.end()


# -- the command


def run(*arguments: object):
    return CliRunner().invoke(app, ["cache", *map(str, arguments)])


def test_the_command_verifies_and_says_so_with_its_exit_code(tmp_path: Path):
    fill(tmp_path, range(20))
    good = run("--verify", "--dir", tmp_path)
    assert good.exit_code == 0 and good.output.startswith("20 entries in 2 files (")
    flip(next(tmp_path.glob("*.safetensors")), -1)
    bad = run("--verify", "--dir", tmp_path)
    assert bad.exit_code == 1 and "1 of 10 entries do not match their checksums" in bad.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give CONFIG"),
        (["--prune", "--report", "c.toml"], "--report and --prune: give one at a time"),
        (["--dry-run", "c.toml"], "--dry-run is read with --prune alone"),
        (["--report", "--force", "c.toml"], "--force is read with --prune alone"),
        (["--prune", "--dir", "x"], "--dir is read with --verify alone"),
        (["--verify", "--dir", "x", "c.toml"], "give one of them"),
        (["--verify", "--dir", "nonesuch"], "there is no cache directory nonesuch"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments: list[str], message: str):
    failed = run(*arguments)
    assert isinstance(failed.exception, UserError) and message in str(failed.exception)
