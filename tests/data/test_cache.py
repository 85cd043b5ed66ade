"""The cache: exact round trips, no entry lost or torn whenever and however its writers end."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kinema.data import writer
from kinema.data.cache import Cache, CacheFull, entry_key
from kinema.data.segments import COPY_BYTES, FORMAT, OpenSegment, frame, pack
from kinema.errors import UserError

FORK = multiprocessing.get_context("fork")


def tensors_of(index: int, floats: int = 300) -> dict[str, torch.Tensor]:
    """What entry ``index`` holds: known from its number alone. Sizes are odd, so that alignment is at stake."""
    generator = torch.Generator().manual_seed(index)
    mean = torch.randn(floats + index % 7, generator=generator)
    return {"latents": mean, "text": mean[: 3 + index % 5].to(torch.bfloat16), "ids": torch.arange(index % 4)}


def check_entry(cache: Cache, index: int, floats: int = 300) -> None:
    found, expected = cache.get(entry_key("test", index)), tensors_of(index, floats)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), (index, name)


def write_range(cache: Cache, numbers, floats: int = 300) -> None:
    for index in numbers:
        cache.put(entry_key("test", index), tensors_of(index, floats))


def test_entries_of_every_type_come_back_exactly_open_and_sealed(tmp_path: Path):
    base = torch.arange(24).reshape(2, 3, 4)
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    types += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.uint16]
    entry = {str(dtype): base.to(dtype) for dtype in types}
    entry |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": base.float().permute(2, 0, 1)}
    key, other = entry_key("types"), entry_key("other")
    cache = Cache(tmp_path)
    cache.put(other, {"odd": torch.ones(3, dtype=torch.uint8)})
    cache.put(key, entry)
    reader = Cache(tmp_path)  # sees the open segment of a living writer
    cache.close()
    for one in (reader, cache, Cache(tmp_path)):
        found = one.get(key)
        assert found.keys() == entry.keys()
        for name, tensor in entry.items():
            assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
            assert pack({"x": found[name]}) == pack({"x": tensor})
            assert found[name].data_ptr() % found[name].element_size() == 0
        assert len(one) == 2 and set(one.keys()) == {key, other}


def test_sealed_shards_are_plain_safetensors_files(tmp_path: Path):
    with Cache(tmp_path) as cache:
        write_range(cache, range(20))
    (shard,) = tmp_path.glob("*.safetensors")
    assert not list(tmp_path.glob("*.open")) and not list(tmp_path.glob("*.tmp"))
    with safe_open(shard, "pt") as file:  # an independent reader
        assert file.metadata()["format"] == FORMAT
        assert len(file.keys()) == 60
        for index in range(20):
            for name, tensor in tensors_of(index).items():
                assert torch.equal(file.get_tensor(f"{entry_key('test', index).hex()}/{name}"), tensor)


def test_an_entry_longer_than_a_piece_is_whole(tmp_path: Path):
    """Its checksum is taken piece by piece, alike by what writes and by what reads."""
    tensor = torch.arange(2 * COPY_BYTES // 4 + 1001, dtype=torch.int32)
    with Cache(tmp_path) as cache:
        cache.put(entry_key("odd"), {"x": torch.ones(3, dtype=torch.uint8)})
        cache.put(entry_key("long"), {"latents": tensor, "text": tensor[:5].to(torch.int16)})
    assert torch.equal(Cache(tmp_path).get(entry_key("long"))["latents"], tensor)


def test_sealed_entries_are_read_without_a_copy_and_the_file_cannot_be_changed(tmp_path: Path):
    with Cache(tmp_path) as cache:
        write_range(cache, range(3))
    key = entry_key("test", 1)
    first, second = cache.get(key)["latents"], cache.get(key)["latents"]
    assert first.data_ptr() == second.data_ptr()
    first.zero_()
    check_entry(Cache(tmp_path), 1)


def test_keys_depend_on_every_part_and_not_on_the_process():
    parts = ("latents", 1, 2.5, None, ("a", 1))
    keys = {entry_key(*parts)} | {entry_key(*parts[:i], "x", *parts[i + 1 :]) for i in range(len(parts))}
    keys |= {entry_key("ab", "c"), entry_key("a", "bc"), entry_key("abc"), entry_key("a\x00bc")}
    assert len(keys) == 10
    assert (
        entry_key(*parts).hex() == "a6848273769bade3b535c9f149f7836bc9485df6"
    )  # caches outlive versions: this may not change unnoticed


def test_segments_are_sealed_as_they_fill(tmp_path: Path):
    with Cache(tmp_path, segment_entries=8) as cache:
        write_range(cache, range(20))
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        for index in range(20):
            check_entry(cache, index)
    by_size = tmp_path / "by-size"
    with Cache(by_size, segment_bytes=5000) as cache:
        write_range(cache, range(20))
    sizes = [path.stat().st_size for path in by_size.glob("*.safetensors")]
    assert len(sizes) == 5 and max(sizes) < 5000 + 4000


def test_a_key_is_written_once(tmp_path: Path):
    with Cache(tmp_path) as cache:
        assert cache.put(entry_key(1), {"x": torch.ones(2)}) > 8
        assert cache.put(entry_key(1), {"x": torch.zeros(2)}) == 0
    assert cache.get(entry_key(1))["x"].tolist() == [1, 1]
    with pytest.raises(KeyError):
        cache.get(entry_key(2))


def test_a_torn_tail_costs_the_last_entry_alone_wherever_it_is_cut(tmp_path: Path):
    source = Cache(tmp_path / "source")
    write_range(source, range(4))
    (segment,) = (tmp_path / "source").glob("*.open")
    data = segment.read_bytes()
    last = len(b"".join(frame(entry_key("test", 3), pack(tensors_of(3)))))
    cuts = [*range(0, last, last // 40), last - 1]
    for cut in cuts:
        for garbage in {b"", b"\0" * cut}:  # cut short, or the length is there and the bytes are not
            folder = tmp_path / f"{cut}-{len(garbage)}"
            folder.mkdir()
            torn = folder / segment.name
            torn.write_bytes(data[: len(data) - last + cut - len(garbage)] + garbage)
            reader = Cache(folder)
            assert len(reader) == 3
            for index in range(3):
                check_entry(reader, index)
            assert torn.stat().st_size == len(data) - last + cut  # readers change nothing
    source.close()


def test_readers_follow_a_segment_that_grows_and_is_sealed(tmp_path: Path):
    one = Cache(tmp_path)
    write_range(one, range(3))
    reader = Cache(tmp_path)
    write_range(one, range(3, 6))
    assert len(reader) == 3
    reader.refresh()
    assert len(reader) == 6
    one.close()  # the reader still believes in the open segment
    for index in range(6):
        check_entry(reader, index)


def test_damage_is_noticed_and_named(tmp_path: Path):
    with Cache(tmp_path) as cache:
        write_range(cache, range(5))
    (shard,) = tmp_path.glob("*.safetensors")
    good = shard.read_bytes()
    shard.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])  # one bit of the last entry's data
    damaged, errors = Cache(tmp_path), []
    for index in range(5):
        try:
            check_entry(damaged, index)
        except UserError as error:
            errors.append(str(error))
    assert len(errors) == 1 and str(shard) in errors[0] and "Delete this file" in errors[0]
    for broken in (good[:-1], good[:100], good[:5], b"", b"\0" * 400):
        shard.write_bytes(broken)
        cache = Cache(tmp_path)
        assert len(cache) == 0 and list(cache.damaged) == [shard.name]


def _write_and_tell(folder: Path, first: int, told, segment_entries: int) -> None:
    torch.set_num_threads(1)
    cache = Cache(folder, segment_entries=segment_entries)
    for index in range(first, first + 100_000):
        cache.put(entry_key("test", index), tensors_of(index, 5000))
        told.send(index)


def test_a_writer_killed_at_any_moment_loses_nothing_that_was_finished(tmp_path: Path):
    rng = random.Random(4)
    told: list[int] = []
    for attempt in range(8):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_write_and_tell, args=(tmp_path, attempt * 100_000, sender, 6))
        process.start()
        sender.close()
        told += [receiver.recv() for _ in range(rng.randint(1, 20))]
        time.sleep(rng.uniform(0, 0.003))  # anywhere in an entry, or in a sealing
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                told.append(receiver.recv())
        except EOFError:
            pass
    assert len(told) >= 8
    cache = Cache(tmp_path)
    for index in told:
        check_entry(cache, index, 5000)
    assert 0 <= len(cache) - len(told) <= 8  # finished, but not told any more
    left = len(list(tmp_path.glob("*.open")))
    assert left >= 1
    assert cache.adopt() == left
    assert not list(tmp_path.glob("*.open"))
    again = Cache(tmp_path)
    assert len(again) == len(cache) and not again.damaged
    for index in told:
        check_entry(again, index, 5000)


def _write_numbers(folder: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    with Cache(folder, segment_entries=7) as cache:
        write_range(cache, numbers)


def test_two_processes_write_one_cache_while_a_third_reads(tmp_path: Path):
    shares = [list(range(0, 120)), list(range(80, 200))]  # they overlap
    processes = [FORK.Process(target=_write_numbers, args=(tmp_path, share)) for share in shares]
    reader = Cache(tmp_path)
    for process in processes:
        process.start()
    seen: set[int] = set()
    while any(process.is_alive() for process in processes):
        reader.refresh()
        fresh = [i for i in range(200) if entry_key("test", i) in reader and i not in seen]
        for index in fresh:
            check_entry(reader, index)
        seen.update(fresh)
    assert [process.exitcode for process in processes] == [0, 0]
    for cache in (reader, Cache(tmp_path)):
        cache.refresh()
        assert len(cache) == 200 and not cache.damaged
        for index in range(200):
            check_entry(cache, index)


def test_only_the_segments_of_dead_writers_are_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    living = Cache(tmp_path)
    write_range(living, range(2))
    assert Cache(tmp_path).adopt() == 0
    process = FORK.Process(target=_abandon, args=(tmp_path, [5, 6]))
    process.start()
    process.join()
    foreign = {"format": FORMAT, "machine": "another", "namespace": "", "pid": os.getpid(), "started": 1}
    fresh, stale = tmp_path / "fresh-0000.open", tmp_path / "stale-0000.open"
    for path, index in ((fresh, 7), (stale, 8)):
        path.write_bytes(
            json.dumps(foreign).encode() + b"\n" + b"".join(frame(entry_key("test", index), pack(tensors_of(index))))
        )
    os.utime(stale, (time.time() - writer.STALE_SECONDS - 10,) * 2)
    other = Cache(tmp_path)
    assert other.adopt() == 2
    assert {path.name for path in tmp_path.glob("*.open")} == {fresh.name, living._writer.segment.path.name}
    write_range(living, range(2, 4))  # goes on undisturbed
    other.refresh()
    for index in (0, 1, 2, 3, 5, 6, 7, 8):
        check_entry(other, index)
    living.close()


def _abandon(folder: Path, numbers: list[int]) -> None:
    write_range(Cache(folder), numbers)
    os._exit(0)


def test_a_writer_whose_segment_was_taken_goes_on_in_a_new_one(tmp_path: Path):
    cache = Cache(tmp_path)
    write_range(cache, range(3))
    writer.seal(OpenSegment(cache._writer.segment.path), "another")
    write_range(cache, range(3, 5))
    cache.close()
    for one in (cache, Cache(tmp_path)):
        for index in range(5):
            check_entry(one, index)


def test_a_crash_between_sealing_and_removing_leaves_both_and_no_harm(tmp_path: Path):
    cache = Cache(tmp_path)
    write_range(cache, range(3))
    path = cache._writer.segment.path
    data = path.read_bytes()
    cache.close()
    path.write_bytes(data)
    both = Cache(tmp_path)
    assert len(both) == 3
    assert both.adopt() == 1 and not path.exists()
    for index in range(3):
        check_entry(both, index)


def _fill_until_refused(folder: Path, limit: int | None, said) -> None:
    torch.set_num_threads(1)
    cache = Cache(folder)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    written = 0
    try:
        for index in range(10_000):
            cache.put(entry_key("test", index), tensors_of(index, 5000))
            written += 1
    except CacheFull as error:
        message = str(error)
    cache.close()  # sealing needs space too: it must not fail, nor lose anything
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        write_range(cache, [20_000], 5000)  # once there is space, the same writer goes on
        cache.close()
    said.send((written, message))


def check_full(folder: Path, limit: int | None) -> int:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_fill_until_refused, args=(folder, limit, sender))
    process.start()
    assert receiver.poll(60)
    written, message = receiver.recv()
    process.join()
    assert process.exitcode == 0
    assert written > 10
    assert str(folder) in message and "data.cache" in message and " free on its disk" in message
    entry_bytes = len(pack(tensors_of(written, 5000)))
    said = int(message.split(" bytes")[0].rpartition(" ")[2])
    assert entry_bytes < said < entry_bytes + 100
    cache = Cache(folder)
    for index in range(written):
        check_entry(cache, index, 5000)
    assert not cache.damaged and not list(folder.glob("*.tmp"))
    return written


def test_a_limit_on_file_sizes_is_reported_and_keeps_what_is_done(tmp_path: Path):
    folder = tmp_path / "cache"
    written = check_full(folder, 500_000)
    cache = Cache(folder)
    check_entry(cache, 20_000, 5000)
    assert len(cache) == written + 1


def test_a_full_disk_is_reported_and_keeps_what_is_done(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        written = check_full(disk / "cache", None)
        cache = Cache(disk / "cache")
        with pytest.raises(CacheFull, match=r"9999999 bytes \(9.5 MiB\) are still to be written"):
            cache.require_space(9_999_999)
        cache.require_space(0)
        assert len(cache) == written
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_unusable_directory_is_refused_by_name(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=r"cache directory .*file cannot be used .*data\.cache"):
        Cache(file)
