"""Text to image to video: the picture is a sample of its model, and the video one that was given that picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from kinema.cli import app
from kinema.errors import UserError
from kinema.families.registry import family_class
from kinema.sampling.command import sample
from kinema.sampling.first_picture import FirstPicture
from kinema.sampling.index import read_index
from kinema.sampling.writing import read_metadata

SMALL: dict[str, Any] = {"height": 32, "width": 48, "frames": 5, "steps": 1, "guidance": 1.0, "device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    tiny = {"video": ("wan", "i2v-14b-480p"), "picture": ("flux", "schnell"), "open_sora": ("open_sora", "v2")}
    return {name: str(family_class(family).tiny(root / name, variant)) for name, (family, variant) in tiny.items()}


def painter(models: dict[str, str], **changes: Any) -> FirstPicture:
    return FirstPicture(**{"model": models["picture"], "variant": "schnell", "steps": 2, **changes})


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def test_a_picture_and_a_video_that_begins_with_it(models: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    common: dict[str, Any] = {"model": models["video"], "aesthetic": 5.5, "num_samples": 2, **SMALL}
    videos = sample(["A red ball"], first=painter(models), out=out, **common)
    assert len(videos) == 2 == len(read_index(out)) and len(read_index(out / "first")) == 2
    pictures = [Path(read_metadata(path)["images"][0]) for path in videos]
    assert [path.name for path in pictures] == ["a-red-ball-0.png", "a-red-ball-1.png"]
    assert all(path.parent == out / "first" and Image.open(path).size == (48, 32) for path in pictures)
    told = read_metadata(pictures[1])
    assert (told["prompt"], told["seed"], told["steps"], told["weights"]) == ("A red ball", 1, 2, "picture")
    assert "5.5" in read_metadata(videos[1])["prompt"]

    alone = {"model": models["picture"], "variant": "schnell", "height": 32, "width": 48, "steps": 2}
    (picture,) = sample(["A red ball"], seed=1, out=tmp_path / "alone", device="cpu", **alone)
    assert picture.read_bytes() == pictures[1].read_bytes(), "a sample like any other"
    given = {**common, "num_samples": 1}
    (video,) = sample(["A red ball"], images=[pictures[1]], seed=1, out=tmp_path / "given", **given)
    assert video.read_bytes() == videos[1].read_bytes()
    (again,) = sample(repeat=videos[1], device="cpu")
    assert again.read_bytes() == videos[1].read_bytes(), "from the picture that is there"
    assert not (again.parent / "first").exists()


def test_what_is_there_is_not_drawn_again(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common: dict[str, Any] = {"model": models["video"], "out": tmp_path, **SMALL}

    def drawn(**changes: Any) -> list[str]:
        capsys.readouterr()
        sample(["a", "b"], first=painter(models, **changes), **common)
        said = capsys.readouterr().err.splitlines()
        return sorted(str(Path(line).relative_to(tmp_path)) for line in said if line.endswith(("-0.mp4", "-0.png")))

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, name in (("1", "b"), ("0", "a")):
        monkeypatch.setenv("RANK", rank)
        assert [path.name for path in sample(["a", "b"], first=painter(models), **common)] == [f"{name}-0.mp4"]
        there = sorted(times(tmp_path / "first"))
        assert there == (["b-0.png"] if rank == "1" else ["a-0.png", "b-0.png"]), "those of its own videos"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    before, whole = times(tmp_path / "first"), {path.name: path.read_bytes() for path in tmp_path.glob("*.mp4")}
    assert drawn() == []
    (tmp_path / "a-0.mp4").unlink()
    assert drawn() == ["a-0.mp4"], "its picture is there"
    (tmp_path / "first" / "b-0.png").unlink()
    assert drawn() == ["first/b-0.png"], "its video is there, and was made from the same picture"
    assert times(tmp_path / "first")["a-0.png"] == before["a-0.png"]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.mp4")} == whole
    assert drawn(steps=1) == ["a-0.mp4", "b-0.mp4", "first/a-0.png", "first/b-0.png"], "others, and so other videos"


def test_rows_with_a_picture_of_their_own_keep_it(models: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    (tmp_path / "l.csv").write_text("text,ref,width,seed\na,,48,3\nb,red.png,48,0\na,,32,3\n")
    out, listed = tmp_path / "out", str(tmp_path / "l.csv")
    options = {"prompt_list": listed, "model": models["open_sora"], "out": out, **SMALL, "width": None}
    videos = sample(first=painter(models), **options)
    given = [Path(read_metadata(path)["images"][0]) for path in videos]
    assert given[1] == tmp_path / "red.png" and len(times(out / "first")) == 2
    assert [Image.open(given[i]).size for i in (0, 2)] == [(48, 32), (32, 32)]
    sdxl = FirstPicture(model=str(family_class("sdxl").tiny(tmp_path / "sdxl", "base-eps")), variant="base-eps")
    (tmp_path / "l.csv").write_text("text,ref\na,\nb,red.png\nc,\n")
    with pytest.raises(
        UserError, match=r"2 of 3 rows cannot .*[\s\S]*rows 0, 2: the first picture .* 32 x 48: width 48"
    ):
        sample(first=sdxl, **{**options, "width": 48})


def test_refused_before_anything_is_loaded(models: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    base: dict[str, Any] = {"model": models["video"], "out": tmp_path / "out", "first": painter(models), **SMALL}
    sdxl = FirstPicture(model=str(family_class("sdxl").tiny(tmp_path / "sdxl", "base-eps")), variant="base-eps")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"images": [tmp_path / "a.png"]}, r"--first-model and --image both say"),
        ({"first": FirstPicture(steps=3)}, r"--first-steps belongs to --first-model"),
        ({"first": FirstPicture(guidance=0.0)}, r"--first-guidance belongs to --first-model"),
        ({"first": painter(models, steps=0)}, r"--first-steps 0: expected a whole number from 1 on"),
        ({"first": painter(models, guidance=-1.0)}, r"--first-guidance -1.0: expected a number from 0 on"),
        ({"first": FirstPicture(model="nowhere")}, r"^--first-model nowhere: there is no such file"),
        ({"first": painter(models, variant="schnel")}, r"^--first-variant: flux has no variant 'schnel'"),
        ({"first": FirstPicture(model=models["video"])}, r"i2v-14b-480p makes videos from pictures"),
        ({"model": models["picture"], "variant": "schnell"}, r"schnell makes pictures itself"),
        ({"model": str(family_class("wan").tiny(tmp_path / "t2v", "t2v-1.3b"))}, r"t2v-1.3b makes videos from text"),
        (
            {"model": str(family_class("wan").tiny(tmp_path / "flf", "flf2v-14b-720p"))},
            r"flf2v-14b-720p needs 2 pictures",
        ),
        ({"frames": 1}, r"one frame is a picture already"),
        ({"height": 40}, r"--height 40: wan"),
        ({"model": models["open_sora"], "height": 16, "first": sdxl}, r"first picture has the video's size, 16 x 48"),
    ]
    for changes, message in refused:
        with pytest.raises(UserError, match=message):
            sample(["x"], **{**base, **changes})
    with pytest.raises(UserError, match=r"--first-model and --from both say"):
        sample(repeat=tmp_path / "a.png", first=painter(models))
    assert not (tmp_path / "out").exists()


def test_the_flags(models: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(models["picture"], tmp_path / "picture")
    options = {name: value for name, value in SMALL.items() if name != "guidance"}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    first = ["--first-model", str(tmp_path / "picture"), "--first-variant", "schnell", "--first-family", "flux"]
    first += ["--first-steps", "1", "--first-guidance", "2.5"]
    command = ["sample", "a ball", "--model", models["video"], *flags, *first, "--out", str(tmp_path / "o")]
    result = CliRunner().invoke(app, [*command, "--offload", "parts", "--crf", "30"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "First pictures: 1" in result.stderr and "on a CPU" in result.stderr
    facts = read_metadata(tmp_path / "o" / "first" / "a-ball-0.png")
    assert (facts["steps"], facts["guidance"], facts["weights_from"]["family"]) == (1, 2.5, "flux")
    video = tmp_path / "o" / "a-ball-0.mp4"
    assert read_metadata(video)["crf"] == 30
    shutil.rmtree(tmp_path / "picture")
    (again,) = sample(repeat=video, device="cpu")
    assert again.read_bytes() == video.read_bytes(), "without the model that drew the picture"
