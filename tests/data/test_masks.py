"""Masks: which weights a clip gets, against float references and brute force."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_files import numbered_frame, write_video
from PIL import Image, ImageCms

from kinema.data.buckets import Clip
from kinema.data.masks import check_mask, decode_mask, is_black
from kinema.data.media import Transform, decode_clip, probe
from kinema.data.records import MediaError, MediaInfo

PHOTO = MediaInfo("image", 96, 64)


def weights(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width), dtype=np.uint8)


def save(path: Path, pixels: Any, mode: str | None = None, **options: Any) -> str:
    Image.fromarray(pixels, mode).save(path, **options) if mode else Image.fromarray(pixels).save(path, **options)
    return str(path)


def area_average(pixels: np.ndarray, box: tuple[float, float, float, float], height: int, width: int) -> np.ndarray:
    """Exact averages over the cells that a box is divided into: float64 [height, width]."""

    def spread(start: float, end: float, cells: int, size: int) -> np.ndarray:
        edges = np.linspace(start, end, cells + 1)
        pixel = np.arange(size)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        return np.clip(overlap, 0, None) * cells / (end - start)

    left, top, right, bottom = box
    rows = spread(top, bottom, height, pixels.shape[0])
    columns = spread(left, right, width, pixels.shape[1])
    return rows @ pixels.astype(np.float64) @ columns.T


@pytest.mark.parametrize("size", [(32, 48), (16, 24), (8, 32), (32, 16)])
def test_weights_are_area_averages_of_what_the_clip_shows(tmp_path: Path, size: tuple[int, int]) -> None:
    path = save(tmp_path / "m.png", weights())
    height, width = size
    ratio = max(height / 64, width / 96)
    box = ((96 - width / ratio) / 2, (64 - height / ratio) / 2, (96 + width / ratio) / 2, (64 + height / ratio) / 2)
    ours = decode_mask(path, Clip(), Transform(*size), PHOTO)
    assert ours.shape == (1, 1, *size) and ours.dtype == np.uint8
    assert np.abs(ours[0, 0] - area_average(weights(), box, *size)).max() <= 1.01


def test_black_stays_black_and_white_white_however_it_is_scaled(tmp_path: Path) -> None:
    """The filter of pictures rings beside an edge; weights must not."""
    pixels = np.zeros((64, 96), np.uint8)
    pixels[:, 48:] = 255
    path = save(tmp_path / "m.png", pixels)
    for size in ((32, 48), (64, 96), (128, 192), (40, 60)):
        mask = decode_mask(path, Clip(), Transform(*size), PHOTO)[0, 0]
        edge = size[1] // 2
        assert not mask[:, : edge - 1].any() and (mask[:, edge + 1 :] == 255).all()


CHANNELS: dict[str, tuple[Any, int]] = {
    "grey": (Image.new("L", (96, 64), 90), 90),
    "red channel": (Image.new("RGB", (96, 64), (90, 200, 10)), 90),
    "bits": (Image.new("1", (96, 64), 1), 255),
    "16 bits": (Image.fromarray(np.full((64, 96), 90 * 257, np.uint16)), 90),
    "palette": (Image.new("RGB", (96, 64), (90, 0, 0)).quantize(2), 90),
    "transparent white": (Image.new("RGBA", (96, 64), (255, 255, 255, 0)), 0),
    "transparent black": (Image.new("RGBA", (96, 64), (0, 0, 0, 0)), 0),
    "half white": (Image.new("LA", (96, 64), (255, 128)), 128),
    "opaque": (Image.new("RGBA", (96, 64), (90, 0, 0, 255)), 90),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_what_counts_in_a_mask(tmp_path: Path, name: str) -> None:
    image, expected = CHANNELS[name]
    image.save(tmp_path / "m.png")
    mask = decode_mask(str(tmp_path / "m.png"), Clip(), Transform(32, 48), PHOTO)
    assert np.abs(mask.astype(int) - expected).max() <= 1
    assert is_black(str(tmp_path / "m.png"), Clip(), Transform(32, 48), PHOTO) == (expected == 0)


def test_a_colour_profile_does_not_change_weights(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ"))
    path = save(tmp_path / "m.png", np.full((64, 96, 3), 90, np.uint8), icc_profile=profile.tobytes())
    assert (decode_mask(path, Clip(), Transform(32, 48), PHOTO) == 90).all()


@settings(max_examples=25, deadline=None)
@given(
    left=st.integers(0, 90), top=st.integers(0, 58), wide=st.integers(1, 96), high=st.integers(1, 64),
    scale=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_the_mask_is_cropped_as_its_media(
    tmp_path_factory: pytest.TempPathFactory, left: int, top: int, wide: int, high: int, scale: int
) -> None:
    """A mask of a multiple of the media's size, cropped: the weights of the media's pixels in the same crop."""
    folder = tmp_path_factory.mktemp("crop")
    crop = (left, top, min(left + wide, 96), min(top + high, 64))
    ramp = np.add.outer(np.arange(64), 2 * np.arange(96)).astype(np.uint8)
    path = save(folder / "m.png", ramp.repeat(scale, 0).repeat(scale, 1))
    part = save(folder / "part.png", ramp[crop[1] : crop[3], crop[0] : crop[2]])
    part_info = MediaInfo("image", crop[2] - crop[0], crop[3] - crop[1])
    ours = decode_mask(path, Clip(), Transform(16, 16, crop=crop), PHOTO).astype(int)
    expected = decode_mask(part, Clip(), Transform(16, 16), part_info).astype(int)
    # the filter counts whole pixels, by their centres: with finer ones it may take its edge half a coarse one further
    assert np.abs(ours - expected).max() <= (0 if scale == 1 else 3)


def test_a_mask_of_the_same_shape_is_stretched(tmp_path: Path) -> None:
    info = MediaInfo("image", 1920, 1080)
    pixels = np.zeros((270, 483), np.uint8)  # 0.6% too wide
    pixels[:, 240:] = 255
    path = save(tmp_path / "m.png", pixels)
    check_mask(path, info)
    mask = decode_mask(path, Clip(), Transform(1080, 1920), info)[0, 0]
    column = int(np.argmax(mask[0] > 127))
    assert abs(column - 240 / 483 * 1920) <= 1
    cropped = decode_mask(path, Clip(), Transform(540, 960, crop=(480, 0, 1440, 540)), info)[0, 0]
    assert abs(int(np.argmax(cropped[0] > 127)) - (240 / 483 * 1920 - 480)) <= 5  # a mask's pixel is 4 of the media's


@pytest.mark.parametrize("size", [(97, 64), (48, 32), (960, 645), (95, 63)])
def test_shapes_that_agree(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("L", size, 255).save(tmp_path / "m.png")
    agrees = abs(size[0] / size[1] / 1.5 - 1) <= 0.01
    if agrees:
        check_mask(str(tmp_path / "m.png"), PHOTO)
        return
    with pytest.raises(MediaError, match=f"has {size[0]}x{size[1]} pixels and its image 96x64") as caught:
        check_mask(str(tmp_path / "m.png"), PHOTO)
    assert caught.value.code == "mask of another shape"


# ---- videos


def grey_video(path: Path, levels: list[int], rate: int = 25, **how: Any) -> Path:
    return write_video(path, [np.full((48, 64, 3), level, np.uint8) for level in levels], rate=rate, **how)


def test_a_picture_stands_for_all_frames(tmp_path: Path) -> None:
    info = probe(grey_video(tmp_path / "v.mp4", [9] * 20))
    path = save(tmp_path / "m.png", np.full((48, 64), 70, np.uint8))
    mask = decode_mask(path, Clip(3, 9, 25.0), Transform(32, 32), info)
    assert mask.shape == (1, 1, 32, 32) and (mask == 70).all()


@pytest.mark.parametrize("fps, start, frames", [(25.0, 0, 40), (25.0, 13, 9), (10.0, 3, 9), (16.0, 5, 17), (0.0, 4, 5)])
def test_a_video_is_read_at_the_times_of_the_clip(tmp_path: Path, fps: float, start: int, frames: int) -> None:
    """Mask and media show the same numbers, so they must show the same numbers in every clip."""
    numbers = [numbered_frame(i) for i in range(40)]
    media = write_video(tmp_path / "v.mp4", numbers)
    write_video(tmp_path / "m.mkv", numbers, codec="ffv1", pixel_format="bgr0")
    info = probe(media)
    clip = Clip(start, frames, fps)
    shown = decode_clip(media, clip, Transform(32, 32), info).mean((0, 2, 3))
    mask = decode_mask(str(tmp_path / "m.mkv"), clip, Transform(32, 32), info)
    assert mask.shape == (1, frames, 32, 32)
    np.testing.assert_allclose(mask.mean((0, 2, 3)), shown, atol=1)


def test_a_mask_of_another_frame_rate_follows_time(tmp_path: Path) -> None:
    info = probe(grey_video(tmp_path / "v.mp4", [9] * 50))
    path = str(grey_video(tmp_path / "m.mkv", [4 * i for i in range(20)], 10, codec="ffv1", pixel_format="bgr0"))
    check_mask(path, info)
    mask = decode_mask(path, Clip(5, 33, 25.0), Transform(32, 32), info)
    times = [Fraction(k, 25) for k in range(5, 38)]
    nearest = [min(range(20), key=lambda i: (abs(Fraction(i, 10) - time), i)) for time in times]
    np.testing.assert_array_equal(mask[0, :, 0, 0], [4 * i for i in nearest])


def test_limited_range_black_and_white_are_0_and_255(tmp_path: Path) -> None:
    path = grey_video(tmp_path / "m.mp4", [0] * 5 + [255] * 5)
    info = probe(path)
    assert info.color_range == "limited"
    mask = decode_mask(str(path), Clip(0, 10, 25.0), Transform(32, 32), info)[0]
    assert mask[:5].max() <= 1 and mask[5:].min() >= 254
    assert is_black(str(path), Clip(0, 4, 25.0), Transform(32, 32), info) == (not mask[:4].any())
    assert not is_black(str(path), Clip(0, 10, 25.0), Transform(32, 32), info)


def test_a_turned_mask_fits_a_turned_video(tmp_path: Path) -> None:
    """A mask may be stored upright for a video that is stored on its side."""
    corner = np.zeros((64, 96, 3), np.uint8)
    corner[:32, :48] = 255
    media = write_video(tmp_path / "v.mp4", [corner] * 3, setup=lambda s: s.set_display_rotation(90))
    info = probe(media)
    turned = write_video(tmp_path / "m.mp4", [corner] * 3, setup=lambda s: s.set_display_rotation(90))
    upright = save(tmp_path / "m.png", np.rot90(corner[..., 0]).copy())
    crop = (8, 30, 60, 96)
    for transform in (Transform(48, 32), Transform(33, 26, crop=crop)):
        one = decode_mask(str(turned), Clip(0, 1, 25.0), transform, info)[0, 0].astype(int)
        other = decode_mask(upright, Clip(0, 1, 25.0), transform, info)[0, 0].astype(int)
        shown = decode_clip(media, Clip(0, 1, 25.0), transform, info)[0, 0].astype(int)
        assert np.abs(one - other).max() <= 2
        assert np.abs(one - shown).mean() < 6


def test_a_mask_that_ends_before_the_clip_is_an_error(tmp_path: Path) -> None:
    info = probe(grey_video(tmp_path / "v.mp4", [9] * 40))
    path = str(grey_video(tmp_path / "m.mp4", [200] * 20))
    with pytest.raises(MediaError, match=r"only 10 of the 30 frames|only 1. of the 30"):
        decode_mask(path, Clip(10, 30, 25.0), Transform(32, 32), info)
