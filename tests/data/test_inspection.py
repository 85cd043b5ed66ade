"""What `kinema data inspect` and `check` say: figures that add up, reasons, duplicates, captions, crops, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from media_files import numbered_frame, write_video
from PIL import Image
from small_encoder import Alone, SmallEncoder
from typer.testing import CliRunner, Result

from kinema.cli import app
from kinema.config.schema import Config
from kinema.data.inspection import Inspection, inspect_data, thumbnail
from kinema.errors import UserError
from kinema.ui.data_page import write_data_page
from kinema.ui.data_text import print_inspection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sound records, of which two have one content, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("media")
    for k in range(2):
        write_video(folder / f"video{k}.mp4", [numbered_frame(5 * k + i, 48, 64) for i in range(12)], rate=16)
        (folder / f"video{k}.txt").write_text("a shared caption")
    for name, shade in (("one", 0), ("two", 1), ("twin", 1)):
        pixels = np.full((40, 80, 3), 100 * shade, np.uint8)
        pixels[:, :20] = 255
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("" if name == "one" else f"this is picture {name}")
    (folder / "bare.png").write_bytes((folder / "one.png").read_bytes())
    (folder / "torn.mp4").write_bytes((folder / "video0.mp4").read_bytes()[:300])
    (folder / "torn.txt").write_text("torn")
    write_video(folder / "short.mp4", [numbered_frame(0, 48, 64)] * 2, rate=16)
    (folder / "short.txt").write_text("short")
    return folder


def config_for(folder: Path, root: Path, **training: object) -> Config:
    buckets = {"resolutions": [32], "frames": [1, 9], "aspects": [1.0]}
    sources = [{"path": folder, "captions": {"prefix": "xyz, "}}, {"path": folder, "name": "again", "repeats": 2.5}]
    sources[1]["buckets"] = {"frames": [9], "clip": "slide", "clip_stride": 1}
    return Config.model_validate(
        {
            "model": {"family": "small"},
            "data": {"sources": sources, "buckets": buckets, "cache": root / "cache"},
            "training": {"steps": 1, "batch_size": 2, **training},
            "run": {"dir": root / "run"},
        }
    )


def look(folder: Path, root: Path, **training: object) -> Inspection:
    config = config_for(folder, root, **training)
    return inspect_data(config, config.data.sources, SmallEncoder(), Alone())


def test_the_figures_add_up_and_every_record_is_accounted_for(folder: Path, tmp_path: Path) -> None:
    encoder = SmallEncoder()
    config = config_for(folder, tmp_path)
    found = inspect_data(config, config.data.sources, encoder, Alone())
    assert not encoder.loaded, "nothing is encoded"
    # Both sources have 8 media files. All but "bare" and "torn" are used by the first; the second wants 9 frames.
    assert (found.records, found.used, len(found.left_out)) == (16, 6 + 2, 2 + 6)
    assert [(one.name, one.records, one.used, one.items, one.repeats) for one in found.sources] == [
        (folder.name, 8, 6, 6, 1.0),
        ("again", 8, 2, 2 * 4, 2.5),  # windows of 9 in 12 frames
    ]
    assert found.codes == {"picture without bucket": 3, "no caption": 2, "truncated": 2, "too short": 1}
    # 4 pictures make 2 batches. 2 + 8 clips of 9 frames are drawn 2 + 20 times, in 11 batches.
    assert {(b.frames, b.height, b.width): (b.items, b.batch_size) for b in found.buckets} == {
        (1, 32, 32): (4, 2),
        (9, 32, 32): (10, 2),
    }
    assert found.steps_per_epoch == 2 + 11
    assert [sorted(Path(path).name for path in group) for group in found.duplicates] == [["twin.png", "two.png"]]
    captions = found.captions
    assert (captions.captions, captions.distinct, captions.empty) == (8, 5, 1)
    assert captions.shared == (("a shared caption", 4),)
    assert (captions.words_least, captions.words_most) == (0, 4)
    assert {caption for _, caption in found.examples} >= {"xyz, a shared caption", "a shared caption", "xyz, "}


def test_batch_sizes_that_trials_will_find_leave_the_steps_open(folder: Path, tmp_path: Path) -> None:
    found = look(folder, tmp_path, batch_size="auto")
    assert found.steps_per_epoch is None and {one.batch_size for one in found.buckets} == {None}


def test_a_thumbnail_shows_the_frame_and_what_is_cropped_away(folder: Path, tmp_path: Path) -> None:
    found = look(folder, tmp_path)
    item = next(item for item, _ in found.examples if item.record.path.endswith("two.png"))
    shown = thumbnail(item, width=80)
    assert shown.pixels.shape == (40, 80, 3) and shown.size == (40, 80)
    assert shown.box == (0.25, 0.0, 0.75, 1.0)  # the middle square of a picture of 80 x 40
    assert shown.pixels[20, 10].tolist() == [255] * 3 and shown.pixels[20, 60].tolist() == [100] * 3


def test_the_page_and_the_terminal_show_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = look(folder, tmp_path)
    page = write_data_page([found], tmp_path / "deep" / "data.html", "my <set>").read_text()
    print_inspection(found)
    said = capsys.readouterr().out
    for text in (page, said):
        assert "torn.mp4" in text and "has no caption" in text and "a shared caption" in text
    assert page.count('<li class="card">') == len(found.examples) == page.count("data:image/jpeg")
    assert "my &lt;set&gt;" in page and "http://" not in page and "https://" not in page
    assert "8 of 16 records used as 14 items" in said and "steps per epoch: 13" in said


CONFIG = """
[model]
family = "wan"
variant = "t2v-1.3b"
path = "nowhere"
[data]
sources = [{{ path = "{folder}" }}]
cache = "cache"
buckets = {{ resolutions = [64], frames = [1, 9] }}
[training]
steps = 1
"""


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", *arguments])


def test_the_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text(CONFIG.format(folder=folder))
    inspected = command("inspect", "c.toml", "--json")
    found = json.loads(inspected.stdout)
    assert (found["records"], found["used"], len(found["left_out"])) == (8, 6, 2)
    reasons = {Path(one["path"]).name: one["reason"] for one in found["left_out"]}
    assert reasons.keys() == {"bare.png", "torn.mp4"} and "has no caption" in reasons["bare.png"]
    assert sum(one["items"] for one in found["buckets"]) == 6
    checked = command("check", "c.toml")
    assert checked.exit_code == 1 and "6 of 8 records used, 2 left out: not usable" in checked.stdout
    assert "torn.mp4" in checked.stdout
    allowed = command("check", "c.toml", "--max-left-out", "2", "--json")
    assert allowed.exit_code == 0 and json.loads(allowed.stdout)["ok"] is True
    mistake = command("check", "c.toml", "--data.sources.0.path", "missing")
    assert isinstance(mistake.exception, UserError) and "missing" in str(mistake.exception)
