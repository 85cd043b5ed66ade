"""Refinement of prompts: what the model is told and shown, what becomes of its answer, and that failures are errors."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
from chat_server import IMAGE_REFUSALS, ChatServer, Step, error, serve
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from kinema.errors import UserError
from kinema.prompts.chat import Chat
from kinema.prompts.refine import LONGEST, Task, clean, instructions, length, refine, shorten

REFINED = "A small brown dog trots from left to right over a wet lawn while the camera follows it at knee height."


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve(ChatServer(Step(REFINED))) as running:
        yield running


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def chat(server: ChatServer, said: list[str] | None = None) -> Chat:
    return Chat(server.url, "tiny", retries=0, say=(said if said is not None else []).append)


def told(payload: Any) -> tuple[str, Any]:
    """(instructions, what the user's message holds) of a request."""
    system, user = payload["messages"]
    return system["content"], user["content"]


# -- what the model is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", get_args(Task))
def test_each_task_has_its_own_instructions(server: ChatServer, task: Task) -> None:
    assert refine("  a dog runs ", task, chat(server)) == REFINED
    system, user = told(server.asked[0])
    assert user == "<prompt>a dog runs</prompt>"
    assert system == instructions(task, "en", False)
    assert {"t2v": "text-to-video", "i2v": "image-to-video", "t2i": "text-to-image"}[task] in system
    assert server.asked[0]["temperature"] == 0.5


def test_no_two_instructions_are_the_same_and_none_has_a_gap() -> None:
    variants = [instructions(*one) for one in product(get_args(Task), ("en", "same"), (False, True))]
    assert len(set(variants)) == 8  # only i2v has a picture to see
    for text in variants:
        assert "{" not in text
        assert "\n\n" not in text
        assert 900 < len(text) < 2200
    for task in get_args(Task):
        assert "Write in English" in instructions(task, "en", False)
        assert "language of the prompt." in instructions(task, "same", False)


def test_the_picture_is_seen(server: ChatServer, picture: Path) -> None:
    assert refine("a dog runs", "i2v", chat(server), picture) == REFINED
    system, user = told(server.asked[0])
    assert "You see the picture." in system
    assert [part["type"] for part in user] == ["text", "image_url"]
    assert user[0]["text"] == "<prompt>a dog runs</prompt>"


@pytest.mark.parametrize("who", ["llama.cpp", "vllm"])
def test_a_model_that_takes_no_pictures_gets_the_words_and_says_so(server: ChatServer, picture: Path, who: str) -> None:
    status, words = IMAGE_REFUSALS[who]
    server.refuses, said = {"pictures": error(status, words)}, []
    asked = chat(server, said)
    assert [refine("a dog runs", "i2v", asked, picture) for _ in range(2)] == [REFINED] * 2
    assert len(server.asked) == 3  # the picture once, the words twice
    assert [told(payload)[1] for payload in server.asked[1:]] == ["<prompt>a dog runs</prompt>"] * 2
    assert all("You do not see the picture." in told(payload)[0] for payload in server.asked[1:])
    assert len(said) == 2
    assert all(words in line and line.endswith("The prompt is refined from its words alone.") for line in said)


def test_other_failures_with_a_picture_stay_failures(server: ChatServer, picture: Path) -> None:
    server.refuses = {"pictures": error(400, "the request is too long")}
    with pytest.raises(UserError, match="too long"):
        refine("a dog runs", "i2v", chat(server), picture)
    assert len(server.asked) == 1


@pytest.mark.parametrize("task", ["t2v", "t2i"])
def test_a_picture_goes_with_i2v_alone(server: ChatServer, picture: Path, task: Task) -> None:
    with pytest.raises(UserError, match="i2v"):
        refine("a dog runs", task, chat(server), picture)


# -- what becomes of the answer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        REFINED,
        f'"{REFINED}"',
        f"“{REFINED}”",
        f"'{REFINED}'",
        f"«{REFINED}»",
        f"**{REFINED}**",
        f"`{REFINED}`",
        f"<prompt>{REFINED}</prompt>",
        f"<prompt>\n{REFINED}",
        f"```text\n{REFINED}\n```",
        f"```\n{REFINED}\n```\nThis prompt keeps the dog.",
        f"Refined prompt: {REFINED}",
        f'**Refined Prompt:** "{REFINED}"',
        f"### Prompt\n### Description: {REFINED}"[len("### Prompt\n") :],
        f"Here is the refined prompt:\n\n{REFINED}",
        f"Here's a more detailed version of your prompt: {REFINED}",
        f'Sure! Here is a refined prompt for a text-to-video model:\n\n"{REFINED}"\n\nLet me know if you like it!',
        f"Certainly: here is your prompt: {REFINED}",
        f"Sure! {REFINED}",
        f"优化后的提示词：{REFINED}",
        REFINED.replace(" over", "\nover").replace(" camera", "\r\n\tcamera"),
        f"- {REFINED}",
        f"{REFINED}\n\nNote: the breed was left open.",
    ],
)
def test_what_surrounds_the_prompt_is_taken_off(answer: str) -> None:
    assert clean(answer) == REFINED


@pytest.mark.parametrize(
    "prompt",
    [
        '"OPEN" blinks in red above a door, and below it hangs a sign that says "SALE"',
        "'Tis the dogs' lawn, not the cats', says the sign",
        "A note lies on the table: it says Here is the key",
        "A shop's sign reads: bread",
        "Here a dog sleeps: it does not wake up.",
        "Sure-footed goats climb a cliff.",
        "The camera prompts a dog to bark: it barks.",
        "雨中的海面，一艘小船缓缓驶向远方。",
        "می‌رود سگ کوچک",
        "24 birds rise at once",
        'A neon sign reads "東京" over a wet street.',
    ],
)
def test_what_belongs_to_the_prompt_stays(prompt: str) -> None:
    assert clean(prompt) == prompt


@given(st.text(max_size=300))
@example("<prompt>")
@example("``` \n```")
@example('"' * 7)
def test_cleaning_makes_one_line(text: str) -> None:
    once = clean(text)
    assert once == once.strip()
    assert not any(c in once for c in "\n\r\t\x00\x1b\x85")
    assert len(once) <= 2 * len(text)  # NFC may part some letters


@given(
    st.lists(
        st.sampled_from(["A dog runs.", "It rains! ", "雨。", "Why? ", "x" * 200 + ". ", "犬" * 90 + "。"]), max_size=60
    )
)
def test_a_long_answer_ends_with_a_whole_sentence(parts: list[str]) -> None:
    text = " ".join(parts).strip()
    short = shorten(text)
    assert text.startswith(short)
    assert length(short) <= LONGEST
    if length(text) <= LONGEST:
        assert short == text
    else:  # as much as fits: the next sentence would not
        assert short[-1] in ".!?。"
        rest = text[len(short) :]
        following = next(i for i, c in enumerate(rest) if c in ".!?。") + 1
        assert length(short + rest[:following]) > LONGEST


def test_wide_letters_count_three() -> None:
    assert [length(text) for text in ("dog", "犬", "개", "dög", "")] == [3, 3, 3, 3, 0]


def test_a_long_answer_is_cut_and_said(server: ChatServer) -> None:
    server.steps, said = [Step(" ".join([REFINED] * 30))], []
    refined = refine("a dog", "t2v", chat(server, said))
    assert refined == " ".join([REFINED] * 14)
    assert (len(refined), len(REFINED)) == (1441, 102)
    assert said[0].startswith(
        f"tiny at 127.0.0.1:{server.url.split(':')[2][:-3]} wrote 3089 characters; the first 1441"
    )


# -- failures ---------------------------------------------------------------------------------------------------------

USELESS = {
    "it holds no words": "...",
    "it declines": "I'm sorry, but I can't help with that.",
    "it is one sentence of more than 1500 characters": "word " * 400,
    "it is not in English": "一只小狗在草地上奔跑。",
}


@pytest.mark.parametrize("fault", USELESS)
def test_a_useless_answer_gets_a_second_try(server: ChatServer, fault: str) -> None:
    server.steps = [Step(USELESS[fault]), Step(REFINED)]
    assert refine("a dog runs", "t2v", chat(server)) == REFINED
    first, second = (told(payload)[1] for payload in server.asked)
    assert second == f"{first}\n\nYour last answer was of no use: {fault}. Answer with the paragraph alone."


@pytest.mark.parametrize("fault", USELESS)
def test_two_useless_answers_are_an_error(server: ChatServer, fault: str) -> None:
    server.steps = [Step(USELESS[fault])]
    with pytest.raises(UserError) as caught:
        refine("a dog runs", "t2v", chat(server))
    message = str(caught.value)
    assert f"did not refine the prompt 'a dog runs': {fault}. It answered '{USELESS[fault][:20].strip()}" in message
    assert message.endswith("Try again, take another model, or refine it yourself.")
    assert len(message) < 400
    assert len(server.asked) == 2


def test_the_prompts_own_language(server: ChatServer) -> None:
    server.steps = [Step(USELESS["it is not in English"])]
    assert refine("一只狗", "t2v", chat(server), language="same") == USELESS["it is not in English"]


def test_foreign_words_to_be_read_are_english_enough(server: ChatServer) -> None:
    server.steps = [Step('A neon sign reads "東京" over a wet street.')]
    assert refine("東京", "t2v", chat(server)) == 'A neon sign reads "東京" over a wet street.'


def test_an_endpoint_that_fails_is_an_error_not_the_original(server: ChatServer) -> None:
    server.steps = [error(500, "oops")]
    with pytest.raises(UserError, match="oops"):
        refine("a dog runs", "t2v", chat(server))


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(server: ChatServer, prompt: str) -> None:
    with pytest.raises(UserError, match="empty prompt"):
        refine(prompt, "t2v", chat(server))
    assert server.requests == []
