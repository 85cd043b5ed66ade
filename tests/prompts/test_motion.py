"""Motion scores from a chat model: a whole number from 1 to 15, or an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer, Step, serve
from hypothesis import given
from hypothesis import strategies as st

from kinema.errors import UserError
from kinema.prompts.chat import Chat
from kinema.prompts.motion import INSTRUCTIONS, motion_score, parse_score

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "prompts.md"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve(ChatServer()) as running:
        yield running


def chat(server: ChatServer) -> Chat:
    return Chat(server.url, "tiny", retries=0)


@pytest.mark.parametrize("score", range(1, 16))
@pytest.mark.parametrize("form", ["{}", " {}\n", '"{}"', "{}.", "**{}**", "{} motion score", "{} Motion Score."])
def test_scores(form: str, score: int) -> None:
    assert parse_score(form.format(score)) == score


@pytest.mark.parametrize(
    "answer",
    ["0", "16", "-3", "4.5", "4.0", "7/15", "7 or 8", "about 7", "seven", "", "007", "1 0", "٤", "score: 7",
     "7 FPS", "7\n8"],
)  # fmt: skip
def test_what_is_no_score(answer: str) -> None:
    assert parse_score(answer) is None


@given(st.text(max_size=20))
def test_nothing_else_is_read_as_a_score(answer: str) -> None:
    score = parse_score(answer)
    if score is not None:
        assert re.findall(r"[0-9]+", answer) in ([str(score)], [f"0{score}"])
        assert 1 <= score <= 15


def test_a_prompt_gets_its_score(server: ChatServer) -> None:
    server.steps = [Step("<think>a race...</think>13")]
    assert motion_score("  a car race\n", chat(server)) == 13
    (payload,) = server.asked
    system, user = (message["content"] for message in payload["messages"])
    assert (system, user) == (INSTRUCTIONS, "<prompt>a car race</prompt>")
    assert payload["temperature"] == 0
    covered = [int(n) for n in re.findall(r"^(\d+) to (\d+):", system, re.MULTILINE) for n in n]
    assert covered == [1, 2, 3, 5, 6, 8, 9, 12, 13, 15]  # every score is described once


def test_one_more_try(server: ChatServer) -> None:
    server.steps = [Step("It is a fast scene."), Step("9")]
    assert motion_score("a dog runs", chat(server)) == 9
    first, second = (payload["messages"][1]["content"] for payload in server.asked)
    assert second == f"{first}\n\nYour last answer was no whole number from 1 to 15. Write the number alone."


def test_two_answers_without_a_score_are_an_error(server: ChatServer) -> None:
    server.steps = [Step("It is\x1b[31m fast. " * 40)]
    with pytest.raises(UserError) as caught:
        motion_score("a dog runs", chat(server))
    assert len(server.asked) == 2
    assert "gave no motion score from 1 to 15: 'It is [31m fast." in str(caught.value)
    assert "Give a number with --motion" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt(server: ChatServer, prompt: str) -> None:
    with pytest.raises(UserError, match="empty prompt"):
        motion_score(prompt, chat(server))
    assert server.requests == []


def test_the_guides_program_runs(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.steps = [Step("A wave rolls over dark rocks in the rain."), Step("6")]
    (program,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(program, str(GUIDE), "exec"), {})
    assert capsys.readouterr().out == "A wave rolls over dark rocks in the rain. 6 motion score.\n"
    assert [json.dumps(payload)[:17] for payload in server.asked] == ['{"model": "tiny",'] * 2
