"""Every command of docs/guides/open-sora-options.md, run on a tiny Open-Sora: each changes what it says."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "prompts"))

from chat_server import ChatServer, Step, serve

from kinema.cli import app
from kinema.families.registry import family_class
from kinema.families.resolutions import size
from kinema.sampling import weights
from kinema.sampling.writing import read_metadata, write_video

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "open-sora-options.md"
SMALL = {"256px": "48px", "768px": "64px", "129": "13"}
"""Sizes of the page, and those that stand for them here."""
PROMPT = "rain on the sea"


class Row(NamedTuple):
    theirs: str
    command: str


def rows() -> list[Row]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return [Row(one[0], one[1].strip("`")) for one in cells]


class Drawn(NamedTuple):
    """What one command wrote."""

    facts: list[dict[str, Any]]
    pixels: list[np.ndarray]
    rates: list[float]
    folder: Path


def options(expected: Mapping[str, Any]) -> Callable[[Drawn, Drawn], None]:
    """The settings that a file has, and another video than without the option."""

    def check(found: Drawn, usual: Drawn) -> None:
        assert {name: found.facts[0].get(name) for name in expected} == dict(expected)
        assert found.pixels[0].shape != usual.pixels[0].shape or (found.pixels[0] != usual.pixels[0]).any()

    return check


def only(expected: Mapping[str, Any]) -> Callable[[Drawn, Drawn], None]:
    """The settings that a file has, and the same video."""

    def check(found: Drawn, usual: Drawn) -> None:
        assert {name: found.facts[0].get(name) for name in expected} == dict(expected)
        assert np.array_equal(found.pixels[0], usual.pixels[0])

    return check


def of_size(resolution: str) -> Callable[[Drawn, Drawn], None]:
    height, width = size(SMALL[resolution], "16:9")
    return options({"height": height, "width": width})


def written_to(found: Drawn, usual: Drawn) -> None:
    assert found.folder.name == "samples" and len(found.facts) == 1


def a_picture_first(found: Drawn, usual: Drawn) -> None:
    (picture,) = (found.folder / "first").glob("*.png")
    assert found.facts[0]["images"] == [str(picture)] and found.facts[0]["width"] == size(SMALL["256px"])[1]


def listed(found: Drawn, usual: Drawn) -> None:
    assert [(one["prompt"], one["negative"]) for one in found.facts] == [(PROMPT, ""), ("snow", "rain")]
    assert [len(one["images"]) for one in found.facts] == [0, 1]


def told(prompt: str) -> Callable[[Drawn, Drawn], None]:
    return options({"prompt": prompt})


def two_seeds(found: Drawn, usual: Drawn) -> None:
    assert [one["seed"] for one in found.facts] == [0, 1] and (found.pixels[0] != found.pixels[1]).any()


def rate(found: Drawn, usual: Drawn) -> None:
    assert found.rates == [12.0] and usual.rates == [24.0]


def longer(found: Drawn, usual: Drawn) -> None:
    assert found.pixels[0].shape[0] == 13 == found.facts[0]["length"]


EXPECTED: dict[str, Callable[[Drawn, Drawn], None]] = {
    '`--prompt "..."`': only({"prompt": PROMPT}),
    "`configs/.../256px.py`": of_size("256px"),
    "`configs/.../768px.py`": of_size("768px"),
    "`configs/.../t2i2v_256px.py`, `t2i2v_768px.py`": a_picture_first,
    "`--save-dir samples`": written_to,
    "`--dataset.data-path example.csv`": listed,
    "`--offload True`": only({}),
    "`--aspect_ratio 1:1`": options({"height": 32, "width": 32}),
    "`--num_frames 129`": options({"frames": 13}),
    "`--cond_type i2v_head --ref first.png`": options({"condition": "i2v_head"}),
    "`--cond_type i2v_tail --ref first.png`": options({"condition": "i2v_tail"}),
    "`--cond_type i2v_loop --ref first.png,last.png`": options({"condition": "i2v_loop"}),
    "`--cond_type v2v_head --ref clip.mp4`": options({"condition": "v2v_head"}),
    "`--cond_type v2v_tail --ref clip.mp4`": options({"condition": "v2v_tail"}),
    "`--motion-score 4`": told(f"{PROMPT} 24 FPS, 4 motion score."),
    "`--motion-score dynamic`": told(f"{PROMPT} 24 FPS, 7 motion score."),
    "`--refine-prompt True`": told("Rain falls on the sea."),
    "`--sampling_option.seed 42 --seed 42`": options({"seed": 42}),
    "`--num-sample 2`": two_seeds,
    "`torchrun --nproc_per_node 2`": listed,
    "`--sampling_option.num_steps 50`": options({"steps": 50}),
    "`--sampling_option.guidance 5`": options({"guidance": 5.0}),
    "`--sampling_option.guidance_img 2`": options({"image_guidance": 2.0}),
    "`--sampling_option.text_osci False`": options({"text_osci": False, "full_steps": 1}),
    "`--sampling_option.image_osci False`": options({"image_osci": False, "full_steps": 1}),
    "`--sampling_option.scale_temporal_osci False`": options({"temporal_osci": False}),
    "`--sampling_option.flow_shift 3`": options({"shift": 3.0}),
    "`--fps_save 12`": rate,
    '1.x: `{"mask_strategy": "0,0,0,-1"}`': options({"condition": "0,0,0,-1"}),
    "1.x: `--loop 2 --condition-frame-length 5`": longer,
    "1.x: `--condition-frame-edit 0.5`": longer,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models and the files of the page."""
    folder = tmp_path_factory.mktemp("flags")
    family_class("open_sora").tiny(folder / "MODEL", "v2", seed=8)
    family_class("flux").tiny(folder / "PICTURES", "schnell", seed=8)
    draw = np.random.default_rng(0)
    for name, count in (("first.png", 1), ("last.png", 1), ("clip.mp4", 33)):
        write_video(draw.integers(0, 256, (count, 32, 48, 3), dtype=np.uint8), folder / name, 24)
    (folder / "example.csv").write_text(f"text,ref,name,neg\n{PROMPT},,,\nsnow,first.png,,rain\n")
    return folder


def run(command: str, out: Path, like: str | None = None) -> Drawn:
    """A command of the page at a small size, or at that of the command ``like``."""
    for large, small in SMALL.items():
        command = re.sub(rf"\b{large}\b", small, command)
    ranks, _, rest = command.rpartition("kinema sample ")
    words = shlex.split(rest)
    folder = out if "samples" not in words else Path("samples")
    given = {**small_settings(words if like is None else shlex.split(like), like is None), "--out": str(out)}
    words += [part for name, value in given.items() if name not in words for part in (name, value)]
    for rank in range(2 if ranks.startswith("torchrun") else 1):
        with pytest.MonkeyPatch.context() as environment:
            if ranks:
                for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
                    environment.setenv(name, str(value))
            result = CliRunner().invoke(app, ["sample", *words])
        assert result.exit_code == 0, (command, result.output, result.exception)
    files = sorted(folder.glob("*.mp4"))
    pixels, rates = zip(*map(decoded, files), strict=True)
    return Drawn([read_metadata(file) for file in files], list(pixels), list(rates), folder)


def small_settings(words: list[str], itself: bool) -> dict[str, str]:
    """What makes a command cheap, besides what it says ``itself``; or what makes another one cheap just as much."""
    stretch = any("v2v" in word for word in words)
    small = {"--frames": "37" if stretch else "9", "--steps": "4" if "--full-steps" in words else "2"}
    if itself and "--first-model" in words:
        small |= {"--first-variant": "schnell", "--first-steps": "1"}
    if itself and "--aspect-ratio" in words:
        return small | {"--resolution": "32px"}
    if itself and "--resolution" in words:
        return small
    return small | {"--height": "16", "--width": "16" if stretch or "--steps" in words else "32"}


def decoded(path: Path) -> tuple[np.ndarray, float]:
    """Frames, and how many there are in a second."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), float(container.streams.video[0].average_rate or 0)


def test_the_page_and_the_expectations_are_of_the_same_options() -> None:
    assert [row.theirs for row in rows()] == list(EXPECTED)


@pytest.fixture(scope="module")
def usual(place: Path) -> Callable[[str], Drawn]:
    """What the same command without the option draws: of the same size, steps and pictures."""
    known: dict[str, Drawn] = {}
    of_pictures = ("--image-guidance", "--no-text-osci", "--no-image-osci", "--no-temporal-osci")

    def drawn(command: str) -> Drawn:
        image = " --image first.png" if any(option in command for option in of_pictures) else ""
        early = " --full-steps 1" if "--full-steps" in command else ""
        plain = f'kinema sample "{PROMPT}" --model MODEL{image}{early}'
        key = f"{plain} {small_settings(shlex.split(command), itself=False)}"
        if key not in known:
            known[key] = run(plain, place / f"usual-{len(known)}", command)
        return known[key]

    return drawn


ELSEWHERE = (
    "256px", "768px", "data-path", "offload", "v2v", "motion", "refine", "seed", "num-sample", "torchrun", "num_steps",
    "loop", "edit",
)  # fmt: skip
"""What other tests run already, of other families or through the pipeline: slow here."""


def parameters() -> list[Any]:
    slow = {row for row in rows() for part in ELSEWHERE if part in row.theirs}
    return [pytest.param(row, marks=[pytest.mark.slow] if row in slow else [], id=row.theirs[:40]) for row in rows()]


@pytest.fixture(scope="module", autouse=True)
def parts_are_loaded_once() -> Iterator[None]:
    known: dict[str, Any] = {}
    load = weights.load_parts

    def remembered(of: weights.Weights, *how: Any) -> Any:
        if of.label not in known:
            known[of.label] = load(of, *how)
        return known[of.label]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load_parts", remembered)
        yield


@pytest.mark.parametrize("row", parameters())
def test_each_option_has_one_of_kinema(
    row: Row, place: Path, usual: Callable[[str], Drawn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    answer = "7" if "dynamic" in row.command else "Rain falls on the sea."
    with serve(ChatServer(Step(answer))) as chat:
        monkeypatch.setenv("OPENAI_BASE_URL", chat.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        found = run(row.command, tmp_path / "out")
    EXPECTED[row.theirs](found, usual(row.command))
