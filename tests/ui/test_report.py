import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest

from kinema.config.schema import Config
from kinema.config.write import to_toml
from kinema.shapes.video import write_video
from kinema.ui.report import write_report

VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The page's elements, and its text; fails on tags that do not close in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def sections(self):
        return [attrs["id"] for attrs in self.all("section")]


def clip(path, side=64, noise=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(len(path.name))
    frames = np.zeros((17, side, side, 3), np.uint8)
    if noise:
        frames = draw.integers(0, 255, frames.shape, dtype=np.uint8)
    write_video(path, frames)


def write_index(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A run directory with one of everything."""
    root = tmp_path / "a run & more"
    root.mkdir()
    config = Config.model_validate(
        {
            "run": {"dir": root},
            "model": {"family": "wan", "variant": "t2v-1.3b", "path": "somewhere/<model>"},
            "data": {"sources": [{"path": "clips"}]},
            "adapter": {"rank": 6},
            "training": {"steps": 40},
        }
    )
    (root / "config.toml").write_text(to_toml(config))
    facts = {"kinema": "0.1.0", "packages": {"torch": "2.13.0", "av": None}, "git_commit": "abc123"}
    (root / "environment.json").write_text(json.dumps(facts))
    with (root / "metrics.jsonl").open("w") as metrics:
        for step in range(41):
            row = {"step": step}
            if step:
                row |= {"loss": 2.0 / step, "grad_norm": 1.0, "lr": 1e-4, "seconds": 0.25, "wait_share": 0.02}
            if step % 20 == 0:
                quantiles = {f"val/loss_quantile_{q / 10:.2f}": 0.1 * q + 1 / (step + 1) for q in range(1, 10)}
                row |= {**quantiles, "val/loss": 0.5 + 1 / (step + 1)}
            metrics.write(json.dumps(row) + "\n")
        metrics.write('{"step": 41, "loss": 0.')  # cut short by a kill
    rows = []
    for i, (prompt, read) in enumerate([("a red <b>circle</b>", "red"), ("a blue square", None)]):
        clip(root / "samples" / f"{i}.mp4")
        judged = {"colour": [read, prompt.split()[1]], "shape": ["circle", "circle"]}
        rows.append({"file": f"{i}.mp4", "prompt": prompt, "seed": i, "height": 64, "width": 64, "judged": judged})
    write_index(root / "samples", [*rows, {"file": "gone.mp4", "prompt": "gone"}])
    for step in range(0, 41, 5):
        clip(root / "previews" / f"step-{step:08d}" / "00.mp4")
        write_index(root / "previews" / f"step-{step:08d}", [{"file": "00.mp4", "prompt": "a dog", "seed": 3}])
    scores = {"colour": 0.5, "all": 0.5}
    (root / "scores.json").write_text(
        json.dumps({"held_out": scores, "chance": {"colour": 1 / 6}, "samples": 2, "seconds": {"sampling": 75.0}})
    )
    return root


def test_a_whole_run(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert page.sections() == [
        *("samples", "scores", "training", "evaluation", "previews", "time", "configuration", "environment")
    ]
    assert [link["href"] for link in page.all("a")] == [f"#{name}" for name in page.sections()]
    text = re.sub(r"\s+", " ", page.text)
    assert "a run & more" in text
    assert "A LoRA of rank 6 on wan t2v-1.3b. 40 of 40 steps." in text
    assert "2 samples. The judge finds a mistake in 1 of 2." in text
    assert "✗ colour: unreadable" in text and text.count("✓ shape") == 2 and text.count("✓ colour") == 1
    assert "colour50 %16.7 %" in text.replace(" 50", "50").replace("% 16", "%16")
    assert "alpha 6" in text and "2.13.0" in text and "abc123" in text
    assert "sampling 75.0 s" in text and "median step250 ms" in text and "waiting for data2 %" in text
    assert not list(run.glob(".report*")), "the temporary file is gone"


def test_nothing_is_fetched_and_everything_is_escaped(run):
    page = Page(write_report(run))
    assert "a red &lt;b&gt;circle&lt;/b&gt;" in page.source and "<b>circle" not in page.source
    assert "somewhere/&lt;model&gt;" in page.source
    for tag, attrs in page.elements:
        for name in ("src", "href", "data", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:", "samples/", "previews/")), (tag, attrs)
    assert not page.all("link")
    assert "http" not in re.sub(r"data:video/mp4;base64,[\w+/=]+", "", page.source)
    assert "@import" not in page.source and "url(" not in page.source


def test_videos_loop_muted_and_sharp(run):
    videos = Page(write_report(run)).all("video")
    assert len(videos) == 2 + 6
    for video in videos:
        assert {"loop", "muted", "autoplay", "playsinline", "aria-label"} <= video.keys()
    assert videos[0]["class"] == "pixels" and (videos[0]["width"], videos[0]["height"]) == ("64", "64")


def test_previews_keep_the_first_and_the_last_step(run):
    text = Page(write_report(run)).text
    shown = [int(step) for step in re.findall(r"step (\d+)", text)]
    assert len(shown) == 6 and shown[0] == 0 and shown[-1] == 40 and shown == sorted(shown)
    assert "3 more steps are in the run directory." in text


def test_small_files_are_inside_the_page_and_large_ones_beside_it(tmp_path):
    clip(tmp_path / "samples" / "small one.mp4")
    clip(tmp_path / "samples" / "large ä.mp4", side=128, noise=True)
    assert (tmp_path / "samples" / "large ä.mp4").stat().st_size > 64 * 1024
    (tmp_path / "samples" / "notes.txt").write_text("no media")
    large, small = Page(write_report(tmp_path)).all("video")
    assert small["src"].startswith("data:video/mp4;base64,")
    assert large["src"] == "samples/large%20%C3%A4.mp4"


def test_at_most_96_samples_are_inside_the_page(tmp_path):
    (tmp_path / "samples").mkdir()
    for i in range(200):
        (tmp_path / "samples" / f"{i:03d}.png").write_bytes(b"x")
    page = Page(write_report(tmp_path))
    sources = [image["src"] for image in page.all("img")]
    assert [source.startswith("data:image/png") for source in sources] == [True] * 96 + [False] * 96
    assert "200 samples, the first 192 of them shown." in page.text
    assert "Show the other 168" in page.text


def test_an_empty_directory_says_so(tmp_path):
    page = Page(write_report(tmp_path))
    assert page.sections() == [] and "This run has written nothing yet." in page.text


@pytest.mark.parametrize("missing", ["samples", "previews", "scores.json", "metrics.jsonl", "config.toml"])
def test_missing_pieces_leave_out_their_section(run, missing):
    (run / missing).rename(run.parent / missing)
    page = Page(write_report(run))
    section = {"scores.json": "scores", "metrics.jsonl": "evaluation", "config.toml": "configuration"}
    assert section.get(missing, missing) not in page.sections()
    assert len(page.sections()) >= 6
    if missing == "metrics.jsonl":
        assert "No step is logged yet." in page.text


@pytest.mark.parametrize("file", ["scores.json", "environment.json", "config.toml", "samples/index.jsonl"])
@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x00\xff", '{"a": '], ids=repr)
def test_broken_files_do_no_harm(run, file, content):
    (run / file).write_text(content)
    page = Page(write_report(run))
    assert "training" in page.sections()


def test_a_run_at_its_first_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7, "grad_norm": null, "lr": 1e-4, "seconds": 1.5}\n')
    page = Page(write_report(tmp_path))
    assert page.sections() == ["training", "time"]
    assert "1 steps" in page.text and "0.7" in page.text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null, "lr": 1e-4}\n{"step": 2, "loss": 1.0}\n')
    assert "The loss of 1 steps was not finite." in Page(write_report(tmp_path)).text


def contrast(one, two):
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_in_both_schemes():
    style = (files("kinema.ui") / "templates" / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", block))
        for ground in ("ground", "sheet"):
            for text in ("ink", "soft", "accent", "right", "wrong"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["line"], colours["ground"]) >= 3


@pytest.mark.parametrize(
    ("training", "sizes", "told"),
    [
        ({"batch_size": 4}, None, "batch4"),
        ({"batch_size": 4}, [4, 4], "batch4"),
        ({"batch_size": "auto"}, [5, 9], "batch5 to 9, the most that fit"),
        ({"token_budget": 4096}, [5, 9], "batch5 to 9, at most 4096 tokens on each device"),
    ],
)
def test_batches_are_told(tmp_path, training, sizes, told):
    keys = {"run": {"dir": "x"}, "model": {"family": "wan", "path": "m"}, "data": {"sources": [{"path": "a"}]}}
    (tmp_path / "config.toml").write_text(to_toml(Config(**keys, training={"steps": 1, **training})))
    if sizes:
        kept = {f"64x64x{i}": {"total": total, "device": None} for i, total in enumerate(sizes)}
        (tmp_path / "batch_sizes.json").write_text(json.dumps(kept))
    assert told in re.sub(r"\n\s*", "", Page(write_report(tmp_path)).text)
