"""`--refine-prompt` and `--motion dynamic`: a chat model words the prompts, and files keep what was asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "prompts"))

from chat_server import ChatServer, Step, serve

from kinema.errors import UserError
from kinema.families.registry import family_class
from kinema.sampling.command import sample
from kinema.sampling.first_picture import FirstPicture
from kinema.sampling.writing import read_metadata

SMALL: dict[str, Any] = {"height": 32, "width": 32, "frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_class("wan").tiny(tmp_path_factory.mktemp("wording"), "t2v-1.3b")


def test_prompts_are_worded_once_and_the_file_keeps_what_was_asked(base: Path, tmp_path: Path) -> None:
    with serve(ChatServer(Step("A red ball rolls slowly over a lawn."), Step("7"))) as chat:
        how = {"model": str(base), "prompt_url": chat.url, "out": tmp_path, **SMALL}
        (path,) = sample(["a red ball"], refine_prompt=True, motion="dynamic", **how)
        assert len(chat.asked) == 2
        told = read_metadata(path)
        assert told["prompt"] == "A red ball rolls slowly over a lawn. 16 FPS, 7 motion score."
        assert (told["asked"], told["text"]) == ("a red ball", "A red ball rolls slowly over a lawn.")
        assert told["scores"] == {"fps": 16.0, "motion": 7.0} and "127.0.0.1" in told["worded_by"]
        before = path.read_bytes()
        assert sample(["a red ball"], refine_prompt=True, motion="dynamic", **how) == [path]
        assert len(chat.asked) == 2, "answers are kept, and the file is there already"
    (repeated,) = sample(repeat=path, out=tmp_path / "again")  # nobody is asked
    assert repeated.read_bytes() == before


def test_rows_of_a_list_are_scored_one_by_one(base: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "a cat", "motion": "dynamic"},
        {"text": "a dog", "motion": 3},
        {"text": "a cow", "motion": "dynamic"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serve(ChatServer(Step("9"))) as chat:
        paths = sample(
            prompt_list=tmp_path / "list.jsonl", rows=":2", model=str(base), prompt_url=chat.url, out=tmp_path / "out",
            tell_fps=False, **SMALL,
        )  # fmt: skip
        assert len(chat.asked) == 1, "the third row is not drawn, so nobody is asked about it"
    assert [read_metadata(path)["prompt"] for path in paths] == ["a cat 9 motion score.", "a dog 3 motion score."]


def test_all_else_is_checked_before_anyone_is_asked(base: Path, tmp_path: Path) -> None:
    """A whole list would be paid for, and then refused."""
    (tmp_path / "l.csv").write_text("text,height,motion\na cat,32,dynamic\na dog,100,dynamic\n,32,3\n")
    drawer = family_class("sdxl").tiny(tmp_path / "sdxl", "base-eps")
    from_image = family_class("wan").tiny(tmp_path / "i2v", "i2v-14b-480p")
    with serve(ChatServer()) as chat:
        how: dict[str, Any] = {"model": str(base), "prompt_url": chat.url, "out": tmp_path / "out", **SMALL}
        for message, options in (
            (r"--height 100: wan makes", {**how, "height": 100}),
            (r"--device warp", {**how, "device": "warp"}),
            (r"--tile-size 9", {**how, "tile_size": 9}),
            (r"first picture has the video's size", {**how, "model": str(from_image), "height": 48, "first": drawer}),
        ):
            if "first" in options:
                options["first"] = FirstPicture(model=str(options["first"]), variant="base-eps")
            with pytest.raises(UserError, match=message):
                sample(["a cat"], refine_prompt=True, motion="dynamic", **options)
        for rows, message in ((None, r"row 1: height 100(.|\n)*row 2: text"), ("1", r"row 1: height 100")):
            with pytest.raises(UserError, match=message):
                sample(prompt_list=tmp_path / "l.csv", rows=rows, **{**how, "height": None})
        assert not chat.requests and not (tmp_path / "out").exists()


def test_what_cannot_be_is_refused_before_anyone_is_asked(base: Path, tmp_path: Path) -> None:
    with serve(ChatServer()) as chat:
        with pytest.raises(UserError, match="--motion fast: expected a number, or dynamic"):
            sample(["a cat"], motion="fast", model=str(base), prompt_url=chat.url, **SMALL)
        edits = family_class("flux").tiny(tmp_path / "flux", "kontext-dev")
        with pytest.raises(UserError, match="--refine-prompt: an instruction to edit"):
            sample(
                ["a cat"],
                refine_prompt=True,
                model=str(edits),
                family="flux",
                variant="kontext-dev",
                prompt_url=chat.url,
                steps=1,
            )
        with pytest.raises(UserError, match="leave --refine-prompt away"):
            sample(repeat=tmp_path / "a.mp4", refine_prompt=True)
        assert not chat.requests
