"""Batches of prompts: each asked for once, several at a time, in order; a failure names its prompt."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Step, error, serve
from PIL import Image

from kinema.errors import UserError
from kinema.prompts.chat import Chat
from kinema.prompts.prepare import AT_ONCE, Prepared, Wish, prepare

KEY = "sk-secret-0123456789"


class Model(ChatServer):
    """Makes "dog 3" into "Refined dog 3." and scores it 3; what holds "broken" fails. Counts requests under way."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.under_way, self.most = threading.Lock(), 0, 0

    def answer(self, payload: Any) -> Step:
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(0.05)
        with self.lock:
            self.under_way -= 1
        system, user = (message["content"] for message in payload["messages"])
        words = user if isinstance(user, str) else user[0]["text"]
        prompt = re.findall(r"<prompt>(.*)</prompt>", words)[0]
        if "broken" in prompt:
            return error(400, "no")
        return Step(f"Refined {prompt}." if "one paragraph" in system else re.findall(r"\d+", prompt)[0])


@pytest.fixture
def model() -> Iterator[Model]:
    with serve(Model()) as running:
        assert isinstance(running, Model)
        yield running


def test_each_once_in_order_and_several_at_a_time(model: Model) -> None:
    wishes = [Wish(f"dog {1 + i % 10}", "t2v", scored=True) for i in range(30)]
    chat = Chat(model.url, "tiny")
    prepared = prepare(wishes, chat)
    assert prepared == [Prepared(f"Refined dog {1 + i % 10}.", 1 + i % 10, chat.label) for i in range(30)]
    assert len(model.asked) == 20
    assert 2 <= model.most <= AT_ONCE


@pytest.mark.parametrize(("refined", "scored", "requests"), [(True, False, 1), (False, True, 1), (False, False, 0)])
def test_only_what_is_asked_for(model: Model, refined: bool, scored: bool, requests: int) -> None:
    wish = Wish("dog 7", "t2i", refined=refined, scored=scored)
    (found,) = prepare([wish], Chat(model.url, "tiny"))
    assert (found.prompt, found.motion) == ("Refined dog 7." if refined else "dog 7", 7 if scored else None)
    assert len(model.asked) == requests


def test_the_picture_goes_with_its_prompt(model: Model, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    wishes = [Wish("dog 1", "i2v", str(tmp_path / "a.png")), Wish("dog 1", "i2v")]
    prepare(wishes, Chat(model.url, "tiny"))
    shown = [isinstance(payload["messages"][1]["content"], list) for payload in model.asked]
    assert sorted(shown) == [False, True]


def test_a_failure_names_its_prompt_and_stops_the_rest(model: Model) -> None:
    wishes = [Wish("broken dog 1", "t2v")] + [Wish(f"dog {i}", "t2v") for i in range(2, 60)]
    with pytest.raises(UserError, match=r"^Prompt 'broken dog 1': .*It says: no"):
        prepare(wishes, Chat(model.url, "tiny"))
    assert len(model.asked) < 30
    with pytest.raises(UserError, match=r"^http"):
        prepare(wishes[:1], Chat(model.url, "tiny"))


def test_answers_are_kept(model: Model, tmp_path: Path) -> None:
    """Also those that came before another prompt failed; a changed picture, model or wish is asked for anew."""
    memory, picture = tmp_path / "out" / "prompts.jsonl", tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(picture)
    chat = Chat(model.url, "tiny", KEY)
    wishes = [Wish(f"dog {i}", "t2v", scored=True) for i in range(1, 6)] + [Wish("dog 6 é犬", "i2v", str(picture))]
    with pytest.raises(UserError, match="broken"):
        prepare([*wishes, Wish("broken dog", "t2v")], chat, memory=memory)
    deadline = time.monotonic() + 10  # requests that were under way still end
    while memory.read_text().count('"by"') < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    first = prepare(wishes, chat, memory=memory)
    asked = len(model.asked)
    assert asked == 12  # twice 5, the picture's, and the broken one: none a second time
    with memory.open("a") as file:
        file.write('{"prompt": "cut sho')
    assert prepare(wishes, chat, memory=memory) == first
    assert len(model.asked) == asked
    Image.new("RGB", (9, 9), (1, 2, 3)).save(picture)
    assert prepare(wishes, chat, memory=memory) == first
    assert len(model.asked) == asked + 1
    assert prepare(wishes, chat, memory=memory) == first  # what was written after the cut line is read
    assert len(model.asked) == asked + 1
    prepare(wishes[:1], Chat(model.url, "other"), memory=memory)
    prepare([replace(wishes[0], task="t2i")], chat, memory=memory)
    prepare(wishes[:1], chat, memory=memory, language="same")
    assert len(model.asked) == asked + 7
    assert KEY not in memory.read_text()


def test_other_ranks_wait_for_the_first(model: Model, tmp_path: Path) -> None:
    memory, wishes = tmp_path / "prompts.jsonl", [Wish(f"dog {i}", "t2v") for i in range(1, 9)]
    chats = [Chat(model.url, "tiny") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        ranks = [pool.submit(prepare, wishes, chats[r], memory=memory, ask=r == 0) for r in (1, 2, 0)]
        found = [rank.result(timeout=20) for rank in ranks]
    assert found[0] == found[1] == found[2]
    assert len(model.asked) == 8


def test_a_place_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare([Wish("dog 1", "t2v")], Chat(model.url, "tiny"), memory=tmp_path / "file" / "prompts.jsonl")


def test_no_wishes(model: Model) -> None:
    assert prepare([], Chat(model.url, "tiny")) == []
