"""Conditions and references that are videos: which frames are read of them, and what a sample is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from kinema.config.schema import ModelConfig
from kinema.data import media
from kinema.data.buckets import Clip
from kinema.data.transform import Transform
from kinema.errors import UserError
from kinema.families.open_sora_request import Abilities, check_asked
from kinema.families.registry import family_class, open_family
from kinema.families.steering import Steering
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings, sample_many
from kinema.sampling.references import frames_at, shown
from kinema.sampling.writing import write_video

SIZE: dict[str, Any] = {"height": 32, "width": 32, "frames": 9, "steps": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video of 40 frames at 24 a second, each of a grey of its own, one of 300, and a picture."""
    folder = tmp_path_factory.mktemp("files")

    def video(name: str, count: int) -> Path:
        greys = np.linspace(10, 240, count).astype(np.uint8)
        return write_video(np.broadcast_to(greys[:, None, None, None], (count, 32, 48, 3)).copy(), folder / name, 24)

    picture = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    return {
        "clip": video("clip.mp4", 40),
        "long": video("long.mp4", 300),
        "picture": write_video(picture, folder / "picture.png"),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("open_sora").tiny(tmp_path_factory.mktemp("given") / "v2", "v2", seed=5)


@pytest.fixture(scope="module")
def family(model: Path) -> Any:
    return open_family(ModelConfig(family="open_sora", path=str(model)))


@pytest.fixture(scope="module")
def pipeline(family: Any) -> Any:
    made = family.pipeline({part: family.load(part, "cpu", torch.float32) for part in family.variant.parts})
    made.set_progress_bar_config(disable=True)
    return made


def decoded(path: Path) -> list[np.ndarray]:
    """The frames of a video, by PyAV alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_frames_at_the_rate_of_the_sample(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    info = media.known_info(files["clip"])
    counts = {fps: frames_at(info, fps)[0] for fps in (24.0, 23.976, 12.0, 8.0, 48.0, None)}
    assert counts == {24.0: 40, 23.976: 40, 12.0: 20, 8.0: 14, 48.0: 80, None: 40}
    assert frames_at(media.known_info(files["picture"]), 24.0) == (1, 0.0)
    whole = np.array([frame.mean() for frame in decoded(files["clip"])])
    asked: list[int] = []
    decode = media.decode_clip

    def counting(path: Any, clip: Any, *rest: Any) -> np.ndarray:
        asked.append(clip.frames)
        return decode(path, clip, *rest)

    monkeypatch.setattr(media, "decode_clip", counting)
    for cut, fps, expected in (
        ((0, 5), 24.0, whole[:5]),
        ((0, -5), 24.0, whole[-5:]),
        ((0, 5), 12.0, whole[:10:2]),
        ((0, -5), 12.0, whole[30::2]),
        ((0, 0), 12.0, whole[::2]),
        ((0, 1), 24.0, whole[:1]),
        ((-1, -1), 24.0, whole[-1:]),
    ):
        (found,) = shown([files["clip"]], [cut], fps, 32, 32)
        greys = np.asarray(found).reshape(-1, 32 * 32 * 3).mean(axis=1)
        np.testing.assert_allclose(greys, expected, atol=1.5)
    assert asked == [5, 5, 5, 5, 20, 1, 1], "nothing else is decoded"


@pytest.mark.parametrize(
    ("condition", "first", "last"), [("v2v_head_5", 0, 5), ("v2v_tail_5", 35, 40), ("i2v_loop", 0, 40), (None, 0, 1)]
)
def test_a_sample_is_told_the_frames_of_a_video(
    condition: str | None, first: int, last: int, family: Any, pipeline: Any, files: dict[str, Path]
) -> None:
    """As the pipeline that is handed these frames."""
    settings = SampleSettings(
        "a ball", 32, 32, 9, 2, 7.5, 3.0, images=(files["clip"],), fps=24.0, condition=condition, text_length=512
    )
    (ours,) = sample_many(family, pipeline, [settings])
    whole = media.decode_clip(files["clip"], Clip(0, 40, 24.0), Transform(32, 32))
    fitted = whole.transpose(1, 2, 3, 0)[first:last]
    references = [fitted[:1], fitted[-1:]] if condition == "i2v_loop" else [fitted]
    expected = pipeline(
        "a ball", references=references, condition=condition, height=32, width=32, num_frames=9,
        num_inference_steps=2, seed=0, output_type="pt",
    ).frames[0]  # fmt: skip
    torch.testing.assert_close(ours / 2 + 0.5, expected.transpose(0, 1), rtol=0, atol=1e-5)
    (other,) = sample_many(family, pipeline, [SampleSettings(**{**vars(settings), "images": (), "condition": None})])
    assert (ours - other).abs().max() > 0.05


def test_conditions_are_checked_before_anything_is_loaded(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    clip, picture = files["clip"], files["picture"]
    cases: list[tuple[str, list[Path], dict[str, Any], str]] = [
        ("i2v_haed", [picture], {}, "no condition 'i2v_haed'; did you mean 'i2v_head'"),
        ("v2v_head_8", [clip], {}, "v2v_head_8: .* nearest: 5 or 9"),
        ("i2v_head", [], {}, "--condition i2v_head takes frames from pictures or videos, and there are none"),
        ("0,0", [], {}, "--condition 0,0 takes frames from"),
        ("t2v", [picture], {}, "--condition t2v: it takes frames from no reference"),
        ("i2v_head", [picture, picture], {}, "takes frames from 1 reference"),
        ("v2v_head_5", [picture], {}, "told 5 frames, and the reference has 1"),
        ("v2v_head", [clip], {"fps": 12.0, "frames": 37}, "told 33 frames, and the reference has 20"),
        ("v2v_head_9", [clip], {}, "gives all 9 frames of the video, which leaves none"),
        ("i2v_loop", [picture], {"frames": 5}, "gives all 5 frames"),
        ("0,2,0,0,1", [picture, picture], {}, "from reference 2; the sample has 2"),
        ("0,0,0,7,1", [picture], {}, "Frame 7 is not there: the video has 3 latent"),
        ("0,0,0,0,1;0,0,12,1,1", [clip], {}, "Frame 12 is not there: the reference has 10 latent"),
        ("0,0,0,0,0,0", [picture], {}, "frames 1 or more"),
        ("1,0", [picture], {}, "stretch 1, and the last one is 0"),
        ("0,0", [picture, picture], {}, "no frame is taken from reference 1"),
        ("0,0", [files["long"]], {}, "reference 0 has 300 frames .* up to 257"),
        ("i2v_head", [picture], {"frames": 1}, "--frames 1: a picture has no place"),
    ]
    for condition, images, change, message in cases:
        with pytest.raises(UserError, match=message):
            options = {**SIZE, "out": tmp_path / "out", **change}
            sample(["x"], model=str(model), images=images, condition=condition, **options)
    rows = "\n".join(["a,i2v_haed,picture.png", "b,v2v_head,picture.png", 'c,"0,0,0,0,1",gone.png'])
    (picture.parent / "l.csv").write_text(f"text,condition,ref\n{rows}\n")
    with pytest.raises(
        UserError, match=r"row 0: There is no condition(.|\n)*row 1: condition v2v_head(.|\n)*row 2: ref"
    ):
        sample(prompt_list=picture.parent / "l.csv", model=str(model), **{**SIZE, "frames": 37}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("can", "asked", "message"),
    [
        (Abilities(True, False, False), {"condition": "i2v_head"}, "--image: this network was made for text alone"),
        (Abilities(True, False, False), {"extend": 1}, "--extend: this network was made for text alone"),
        (Abilities(True, True, True), {"text_osci": True}, "--text-osci: this network was distilled"),
        (Abilities(True, True, True), {"full_steps": 3}, "--full-steps: this network was distilled"),
        (Abilities(False, True, False), {"condition": "v2v_head_9"}, "v2v_head_9: .* nearest: 8 or 12"),
        (
            Abilities(True, True, False),
            {"text_osci": False, "image_osci": False, "full_steps": 3},
            "nothing oscillates",
        ),
    ],
)
def test_what_a_network_cannot_do(can: Abilities, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_asked(Steering(**asked), 17, 7.5, [1], can)
    check_asked(Steering(), 17, 7.5, [], can)


@pytest.mark.parametrize("name", ["image_osci", "temporal_osci"])
def test_guidance_towards_frames_needs_frames(name: str) -> None:
    able = Abilities(True, True, False)
    on, off = Steering(**{name: True}), Steering(**{name: False})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: .* and there are none; leave it away or give"):
        check_asked(on, 17, 7.5, [], able)
    check_asked(on, 17, 7.5, [1], able)
    check_asked(replace(on, extend=1), 17, 7.5, [], able)
    check_asked(off, 17, 7.5, [], able)
    with pytest.raises(UserError, match="--full-steps 3: nothing oscillates"):
        check_asked(Steering(text_osci=False, full_steps=3), 17, 7.5, [], able)
    check_asked(Steering(text_osci=False, full_steps=3), 17, 7.5, [1], able)


@pytest.mark.parametrize(
    ("name", "variant", "usual", "images"),
    [
        ("wan", "t2v-1.3b", "t2v", 0),
        ("wan", "i2v-14b-480p", "i2v_head", 1),
        ("wan", "flf2v-14b-720p", "i2v_loop", 2),
        ("flux", "dev", None, 0),
    ],
)
def test_other_families_know_the_name_of_what_they_do(name: str, variant: str, usual: str | None, images: int) -> None:
    bound = open_family(ModelConfig(family=name, variant=variant))
    for condition in ("t2v", "i2v_head", "i2v_loop", "v2v_head", "0,0"):
        asked = SampleSettings("x", 32, 32, 9, condition=condition)
        if condition == usual:
            bound.check_steering(asked, 9, 5.0, [1] * images)
            continue
        with pytest.raises(UserError, match=f"--condition {condition}: {variant} (is given|makes pictures)"):
            bound.check_steering(asked, 9, 5.0, [1] * images)
