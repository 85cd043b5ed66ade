"""`--resolution` and `--aspect-ratio`: sizes by name on every family's grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.base import SamplingDefaults
from kinema.families.registry import family_class, open_family
from kinema.families.resolutions import RATIOS, inverse, named, shape_of, size, with_resolution, with_shape
from kinema.sampling.command import sample
from kinema.sampling.sizes import asked_size, merged
from kinema.sampling.writing import read_metadata


@pytest.mark.parametrize("resolution", ["256px", "768px"])
def test_open_soras_sizes_turn_into_each_other(resolution: str) -> None:
    """From its default, 16:9 at 256px, a shape or a resolution alone gives the size of its tables."""
    default = size("256px", "16:9")
    assert with_resolution(*default, resolution, 16) == size(resolution, "16:9")
    for ratio in (*RATIOS, *map(inverse, RATIOS)):
        assert with_shape(*size(resolution, "16:9"), ratio, 16) == size(resolution, ratio)
    assert with_resolution(*size("256px", "2.39:1"), "768px", 16) == (496, 1184)


def test_sizes_of_other_families() -> None:
    wan = (480, 832)  # a size that no rule gives
    assert named(*wan, 16) is None and shape_of(*wan) == "16:9"
    assert with_resolution(*wan, "480p", 16) == wan, "it has 480 lines"
    assert with_resolution(*wan, "720p", 16) == (720, 1280)
    assert with_shape(*wan, "16:9", 16) == wan and with_shape(*wan, "9:16", 16) == (832, 480)
    assert with_shape(*wan, "1:1", 16) == (624, 624)
    for ratio in ("4:3", "1:1", "2.39:1", "1:3"):
        height, width = with_shape(*wan, ratio, 32)
        wide, high = map(float, ratio.split(":"))
        assert height % 32 == width % 32 == 0 and 0.85 < height * width / (480 * 832) < 1.15
        assert 0.9 < width / height / (wide / high) < 1.1
    assert with_shape(1024, 1024, "16:9", 16) == (768, 1360) and with_resolution(1024, 1024, "768px", 16) == (768, 768)
    assert shape_of(100, 300) == "300:100", "no usual shape is near"


@pytest.fixture(scope="module")
def wan() -> Any:
    return open_family(ModelConfig(family="wan", variant="t2v-1.3b"))


def test_the_first_reference_gives_the_shape(wan: Any, tmp_path: Path) -> None:
    defaults = SamplingDefaults(height=480, width=832)
    for name, (height, width), expected in (
        ("a.png", (108, 192), (480, 832)), ("b.png", (192, 108), (832, 480)), ("c.png", (60, 60), (624, 624)),
    ):  # fmt: skip
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / name)
        asked = {"aspect_ratio": "auto"}
        assert asked_size(wan, defaults, asked, [tmp_path / name], "--") == expected
        at = asked_size(wan, defaults, {**asked, "resolution": "256px"}, [tmp_path / name], "--")
        assert at == size("256px", shape_of(height, width))


def test_a_row_says_its_size_in_its_own_way() -> None:
    command = {"resolution": "256px", "aspect_ratio": "1:1", "steps": 3}
    assert merged(command, {"height": 64}) == {"steps": 3, "height": 64, "resolution": None, "aspect_ratio": None}
    assert merged(command, {"aspect_ratio": "4:3"})["resolution"] == "256px"
    own = merged({"height": 64, "width": 32}, {"resolution": "480p"})
    assert (own["height"], own["width"], own["resolution"]) == (None, None, "480p")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "256px", "height": 64}, "--resolution and --height both say the size"),
        ({"aspect_ratio": "1:1", "width": 64}, "--aspect-ratio and --width both say the size"),
        ({"resolution": "256"}, "'256' is no resolution. Write 256px"),
        ({"aspect_ratio": "wide"}, "'wide' is no shape. Write width:height"),
        ({"aspect_ratio": "0:1"}, "'0:1' is no shape"),
        ({"aspect_ratio": "auto"}, "--aspect-ratio auto takes the shape of the first picture, and there is none"),
        ({"resolution": "8px"}, "a side would be shorter than 16 pixels"),
    ],
)
def test_what_is_no_size(wan: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked_size(wan, SamplingDefaults(), options, [], "--")


def test_from_options_and_lists_to_files(tmp_path: Path) -> None:
    base = family_class("wan").tiny(tmp_path / "base", "t2v-1.3b")
    (tmp_path / "l.csv").write_text("text,resolution,aspect_ratio,height,width\na,,9:16,,\nb,,,32,16\nc,64px,2:1,,\n")
    options: dict[str, Any] = {"model": str(base), "frames": 1, "steps": 1, "out": tmp_path / "out"}
    paths = sample(prompt_list=tmp_path / "l.csv", resolution="48px", **options)
    sizes = [Image.open(path).size for path in paths]
    assert sizes == [(32, 64), (16, 32), (80, 48)]
    assert [(read_metadata(path)["width"], read_metadata(path)["height"]) for path in paths] == sizes
    (turned,) = sample(repeat=paths[0], aspect_ratio="16:9")
    assert Image.open(turned).size == (64, 32)
    (tmp_path / "bad.csv").write_text("text,resolution,height\na,256px,64\nb,256,\n")
    with pytest.raises(UserError, match=r"row 0: resolution and height both say.*\n.*row 1: '256' is no resolution"):
        sample(prompt_list=tmp_path / "bad.csv", **options)
