"""Files are drawn again to the bit from what they carry; what has changed since is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_command import make_config, make_run
from test_lists import noise

from kinema.config.schema import ModelConfig
from kinema.errors import UserError
from kinema.families.registry import family_class, open_family
from kinema.parallel.mesh import World
from kinema.sampling import planning, repeat
from kinema.sampling.command import sample
from kinema.sampling.pipeline import SampleSettings
from kinema.sampling.planning import Drawing
from kinema.sampling.repeat import Origin, plan_repeat
from kinema.sampling.weights import Weights
from kinema.sampling.writing import read_metadata
from kinema.training.export import export_weights

SMALL: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "steps": 2}
ALONE = World.alone()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("repeat"), "t2v-1.3b")


def again(path: Path, **options: Any) -> Path:
    (repeated,) = sample(repeat=path, **options)
    return repeated


MODELS = [("wan", "t2v-1.3b", 5, 0), ("wan", "i2v-14b-480p", 5, 1), ("z_image", "base", 1, 0), ("flux", "dev", 1, 0)]


@pytest.mark.parametrize(("name", "variant", "frames", "pictures"), MODELS)
def test_to_the_bit_from_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, variant: str, frames: int, pictures: int
) -> None:
    """Four of one call, whose size changes the last digits, by relative paths; repeated from elsewhere."""
    family_class(name).tiny(tmp_path / "model", variant)
    images = [noise(tmp_path / f"{i}.png", i).name for i in range(pictures)]
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {**SMALL, "frames": frames, "images": images, "seed": 0}
    prompts = ["a red ball", "größe 雪 " + "and so on " * 300]
    options |= {"model": "model", "variant": variant, "out": "out", "negative": "box", "shift": 4.0, "fps": 12.5}
    drawn = sample(prompts, num_samples=2, **options)
    (tmp_path / "elsewhere").mkdir()
    for path in list(drawn):
        (tmp_path / "elsewhere" / f"renamed-{path.name}").write_bytes(path.read_bytes())
    monkeypatch.chdir("/")
    for path in (tmp_path / drawn[0], tmp_path / drawn[3]):
        batch = read_metadata(path)["batch"]
        assert len(batch["others"]) == 3
        repeated = again(tmp_path / "elsewhere" / f"renamed-{path.name}")
        assert repeated == tmp_path / "elsewhere" / "repeats" / f"renamed-{path.name}"
        assert repeated.read_bytes() == path.read_bytes()
        beside = [Path(f"{one}.json").read_text() for one in (repeated, path)]
        assert beside[0] == beside[1] and json.loads(beside[0]) == read_metadata(path)
    assert len(list((tmp_path / "elsewhere" / "repeats").glob("renamed*"))) == 4, "its companions are not written"


def test_alone_and_in_a_call_with_others_differ_in_the_last_digits(base: Path) -> None:
    """Why the call is stored: pixels of float differ, so bytes may."""
    from kinema.sampling.pipeline import SampleSettings, sample_many
    from kinema.sampling.weights import load_parts

    family = open_family(ModelConfig(family="wan", path=str(base)))
    pipeline = family.pipeline(load_parts(Weights(family, "tiny"), "cpu", torch.float32))
    pipeline.set_progress_bar_config(disable=True)
    settings = [SampleSettings("a red ball", 32, 48, 5, steps=2, seed=i, text_length=512) for i in range(4)]
    together = list(sample_many(family, pipeline, settings))
    alone = list(sample_many(family, pipeline, settings, groups=[[i] for i in range(4)]))
    error = max((a - b).abs().max().item() for a, b in zip(together, alone, strict=True))
    assert 0 < error < 1e-4
    twice = list(sample_many(family, pipeline, settings, groups=[[0, 1, 2, 3]]))
    assert all(torch.equal(a, b) for a, b in zip(together, twice, strict=True))


def test_options_change_single_settings(base: Path, tmp_path: Path) -> None:
    (path,) = sample(
        ["a ball"], model=str(base), out=tmp_path, seed=4, motion=3.0, negative="box", shift=2.0, fps=8.0, **SMALL
    )
    stored = read_metadata(path)
    assert stored["prompt"] == "a ball 8 FPS, 3 motion score."
    volatile = ("weights_from", "images")

    def changed(**options: Any) -> dict[str, Any]:
        found = read_metadata(again(path, out=tmp_path / "v", **options))
        return {key: value for key, value in found.items() if value != stored.get(key) and key not in volatile}

    assert changed(seed=0) == {"seed": 0}
    assert changed(guidance=2.0, steps=1) == {"guidance": 2.0, "steps": 1}
    assert changed(prompts=["a box"]) == {"prompt": "a box 8 FPS, 3 motion score.", "text": "a box"}
    assert changed(fps=16.0, motion=5.0) == {
        "fps": 16.0,
        "prompt": "a ball 16 FPS, 5 motion score.",
        "scores": {"fps": 16.0, "motion": 5.0},
    }
    assert changed(dtype="bf16") == {"dtype": "bfloat16"}
    several = sample(repeat=path, num_samples=3, out=tmp_path / "n")
    assert [read_metadata(one)["seed"] for one in several] == [4, 5, 6]
    with pytest.raises(UserError, match=r"--height 33: wan makes multiples of 16"):
        sample(repeat=path, height=33)


def test_the_step_of_a_run_that_has_gone_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn from a checkpoint and from an export with an adapter; the run then trains on, and moves."""
    from kinema.runs.trained import named_trainables
    from kinema.training.checkpoint import Checkpointer
    from kinema.training.state import training_state

    config = make_config(base, tmp_path, adapter={"rank": 4, "alpha": 8.0})
    network, ema = make_run(config)
    run = config.run.dir
    (early,) = sample(["a ball"], run=run)
    (raw,) = sample(["a ball"], run=run, ema=False, out=tmp_path / "raw")
    assert early.read_bytes() != raw.read_bytes()
    export = export_weights(run / "exports", 3, open_family(config.model), {"network": network}, config, ALONE)
    (exported,) = sample(["a ball"], run=run, adapter=[f"{export / 'diffusers'}:0.5"], out=tmp_path / "export")

    with torch.no_grad():
        for parameter in named_trainables({"network": network}).values():
            parameter.add_(0.1)
    checkpointer = Checkpointer(run / "checkpoints", 9, False, ALONE)
    checkpointer.save(9, training_state({"network": network}, (), ema), {})
    checkpointer.close()
    (newest,) = sample(["a ball"], run=run, ema=False, out=tmp_path / "new")
    assert read_metadata(newest)["weights"] == "run at step 9" and newest.read_bytes() != raw.read_bytes()
    for path in (early, raw, exported):
        assert again(path, out=tmp_path / "again" / path.parent.name).read_bytes() == path.read_bytes()
    capsys.readouterr()

    old = run / "checkpoints" / "step-00000002"
    shutil.rmtree(old)
    with pytest.raises(UserError, match=r"--from .*step-00000002 is no longer there. Say with --run or --model"):
        again(early)
    anew = again(early, run=run, out=tmp_path / "anew")
    assert read_metadata(anew)["weights"] == "run at step 9"
    said = capsys.readouterr().err
    assert "Not the same as a-ball-0.mp4: run at step 9 holds other weights than the file was drawn with" in said


def test_what_has_changed_since_is_refused_or_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    (path,) = sample(["a ball"], model=str(model), out=tmp_path, **SMALL)
    model.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"--from .*a-ball-0.mp4: --model .*model: there is no such file"):
        again(path)
    capsys.readouterr()
    repeated = again(path, model=str(tmp_path / "moved"), family="wan")
    assert "Not the same" not in capsys.readouterr().err, "they are the same, elsewhere"
    places = [read_metadata(one).pop("weights_from") for one in (path, repeated)]
    assert [one["model"] for one in places] == [str(model), str(tmp_path / "moved")]

    family_class("wan").tiny(model, "t2v-1.3b", seed=8)
    with pytest.raises(
        UserError, match=r"model holds other weights .*Give --run or --model to draw with what is there"
    ):
        again(path)
    again(path, model=str(model), out=tmp_path / "other")
    assert "Not the same as a-ball-0.mp4: model holds other weights" in capsys.readouterr().err

    from kinema.sampling.writing import write_video

    bare = write_video(torch.zeros(3, 5, 32, 32), tmp_path / "bare.mp4", metadata={"prompt": "x"})
    with pytest.raises(UserError, match=r"its settings say no height, width, frames, seed, fps; it cannot be drawn"):
        again(bare)
    preview = {key: value for key, value in read_metadata(path).items() if not key.startswith("weights")}
    old = write_video(torch.zeros(3, 5, 32, 32), tmp_path / "old.mp4", metadata=preview)
    with pytest.raises(UserError, match=r"does not say where its weights are: give them with --run or --model"):
        again(old)
    again(old, model=str(model), out=tmp_path / "old")
    assert "does not say which weights it was drawn with" in capsys.readouterr().err


def test_pictures_that_have_changed(tmp_path: Path) -> None:
    model = family_class("wan").tiny(tmp_path / "model", "i2v-14b-480p")
    picture = noise(tmp_path / "a.png", 0)
    (path,) = sample(["x"], model=str(model), images=[picture], out=tmp_path, **{**SMALL, "steps": 1})
    noise(picture, 1)
    with pytest.raises(UserError, match=r"a\.png has changed since"):
        again(path)
    found = read_metadata(again(path, images=[picture]))
    assert found["images"] == [str(picture)] and found["image_contents"] != read_metadata(path)["image_contents"]
    picture.unlink()
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        again(path)


@pytest.mark.parametrize(
    ("model", "stored", "changed", "full_steps"),
    [
        (("sdxl", "base-eps"), {"text_osci": True}, {"text_osci": False}, None),
        (("sdxl", "base-eps"), {"text_osci": True}, {"seed": 1}, 4),
        (("open_sora", "v2"), {"image_osci": False}, {"text_osci": False}, None),
        (("open_sora", "v2"), {"image_osci": False, "images": ["a.png"]}, {"text_osci": False}, None),
        (("open_sora", "v2"), {"images": ["a.png"]}, {"text_osci": False}, 4),  # that of the frames still oscillates
        (("open_sora", "v2"), {"extend": 1, "text_osci": False}, {"extend": 0}, None),
        (("open_sora", "v2"), {"extend": 1, "image_osci": True, "overlap": 1}, {"extend": 0}, 4),
        (("open_sora", "v2"), {"extend": 1, "text_osci": False}, {"seed": 1}, 4),
        (("open_sora", "v2"), {"text_osci": False, "images": ["a.png"]}, {"image_osci": False}, None),
    ],
)
def test_what_nothing_is_left_to_act_on_is_not_kept(
    model: tuple[str, str],
    stored: dict[str, Any],
    changed: dict[str, Any],
    full_steps: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Full steps of an oscillation that a variation turns off, as nobody can say "none" in their place."""
    monkeypatch.setattr(repeat, "_check_contents", lambda _: None)
    monkeypatch.setattr(planning, "_length", lambda *_: 1)
    family = open_family(ModelConfig(family=model[0], variant=model[1]))
    size = {"height": 64, "width": 64, "frames": 1 if model[0] == "sdxl" else 9, "fps": 24.0}
    own = {"prompt": "a", "seed": 0, "steps": 20, "guidance": 5.0, "images": [], **size, "full_steps": 4, **stored}
    (drawing,) = plan_repeat(Origin(Path("a.mp4"), own), Weights(family, "a"), (), (), changed, Path("o")).drawings
    kept = drawing.settings
    assert kept.full_steps == full_steps
    assert {name: getattr(kept, name) for name in changed} == {
        name: None if (name, value) == ("extend", 0) else value for name, value in changed.items()
    }


def test_no_secret_of_an_address_reaches_a_file() -> None:
    signed = "https://h/a.png?X-Amz-Credential=AKIA%2Fx&X-Amz-Signature=beef&part=1"
    for location, expected in (
        (signed, "https://h/a.png?X-Amz-Credential=HIDDEN&X-Amz-Signature=HIDDEN&part=1"),
        ("https://me:pass@h/a.png", "https://h/a.png"),
        ("https://h/a.tar?sv=1&sig=beef::b/c.png", "https://h/a.tar?sv=1&sig=HIDDEN::b/c.png"),
        ("https://h/a.png?id=3&token=beef#x", "https://h/a.png?id=3&token=HIDDEN#x"),
        ("/data/me@home/a.png", "/data/me@home/a.png"),
        ("s3://bucket/a@b/c.png", "s3://bucket/a@b/c.png"),
    ):
        settings = SampleSettings("x", 32, 32, 5, images=(location,))
        assert Drawing(settings, 16.0).entry()["images"] == [expected]
