"""Chat endpoints: what is sent, what is tried again, what a failure says, and that the key reaches nothing."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import json
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import IMAGE_REFUSALS, ChatServer, Step, error, serve
from PIL import Image

from kinema.data.records import MediaError
from kinema.errors import UserError
from kinema.prompts.chat import Chat, PictureRefused, base_address, chat_from_environment
from kinema.prompts.exchange import LONGEST_REPLY

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # what goes to this machine takes no proxy


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serve(ChatServer()) as running:
        yield running


def chat(server: ChatServer, said: list[str] | None = None, **more: Any) -> Chat:
    options: dict[str, Any] = {"pause": 0.01, "timeout": 10.0, "say": (said if said is not None else []).append}
    return Chat(server.url, "tiny", **(options | more))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_the_request_is_openais(server: ChatServer) -> None:
    server.steps = [Step("  Dogs.\n")]
    assert chat(server, key=KEY).complete("One word.", "What barks? 犬", temperature=0.5) == "Dogs."
    ((method, path, headers, payload),) = server.requests
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    system, user = {"role": "system", "content": "One word."}, {"role": "user", "content": "What barks? 犬"}
    assert payload == {"model": "tiny", "messages": [system, user], "temperature": 0.5}


def test_without_key_and_temperature_neither_is_sent(server: ChatServer) -> None:
    assert chat(server).complete("a", "b") == "An answer."
    _, _, headers, payload = server.requests[0]
    assert "Authorization" not in headers
    assert "temperature" not in payload


@pytest.mark.parametrize(
    ("size", "shown"), [((1600, 400), (1024, 256)), ((300, 200), (300, 200)), ((4000, 1), (1024, 1))]
)
def test_a_picture_is_sent_small_upright_and_without_metadata(
    server: ChatServer, tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    """Stored on its side with a note in its EXIF: left half red, right half blue once upright."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[:, width // 2 :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "SECRET PLACE"
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    chat(server).complete("a", "b", path)
    text, picture = server.asked[0]["messages"][1]["content"]
    assert text == {"type": "text", "text": "b"}
    assert picture["type"] == "image_url"
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    assert b"SECRET" not in base64.b64decode(data)
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert (sent.size, sent.format, len(sent.getexif())) == (shown, "JPEG", 0)
        if min(shown) > 1:
            assert np.allclose(sent.getpixel((shown[0] // 8, shown[1] // 2)), (255, 0, 0), atol=8)
            assert np.allclose(sent.getpixel((shown[0] * 7 // 8, shown[1] // 2)), (0, 0, 255), atol=8)


def test_of_a_video_the_first_frame_is_sent(server: ChatServer, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 24), (grey, grey, grey)) for grey in (40, 200)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    chat(server).complete("a", "b", tmp_path / "clip.gif")
    data = server.asked[0]["messages"][1]["content"][1]["image_url"]["url"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert abs(np.asarray(sent).mean() - 40) < 3


def test_a_picture_that_is_not_there_is_said_before_anything_is_asked(server: ChatServer, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"nowhere\.png"):
        chat(server).complete("a", "b", tmp_path / "nowhere.png")
    assert server.requests == []


# -- what models do not take ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", IMAGE_REFUSALS)
def test_a_model_that_takes_no_pictures_is_asked_once(server: ChatServer, tmp_path: Path, who: str) -> None:
    status, words = IMAGE_REFUSALS[who]
    server.refuses = {"pictures": error(status, words)}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = chat(server)
    for _ in range(2):
        with pytest.raises(PictureRefused) as caught:
            asked.complete("a", "b", tmp_path / "a.png", temperature=0.5)
        assert words in str(caught.value)
    assert len(server.requests) == 1
    assert asked.complete("a", "b") == "An answer."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1)"),
        ("system", "System role not supported"),
        ("system", "Unsupported value: 'messages[0].role' does not support 'system' with this model."),
    ],
)
def test_what_a_model_does_not_take_is_left_out_from_then_on(server: ChatServer, name: str, words: str) -> None:
    server.refuses = {name: error(400, words)}
    asked = chat(server)
    assert [asked.complete("Be brief.", "b", temperature=0.5) for _ in range(2)] == ["An answer."] * 2
    refused, second, third = server.asked
    assert second == third != refused
    expected = copy.deepcopy(refused)
    if name == "temperature":
        del expected["temperature"]
    else:
        expected["messages"] = [{"role": "user", "content": "Be brief.\n\nb"}]
    assert second == expected


def test_both_can_be_refused_one_after_the_other(server: ChatServer) -> None:
    server.refuses = {"system": error(400, "System role not supported"), "temperature": error(400, "temperature?")}
    assert chat(server).complete("a", "b", temperature=0.5) == "An answer."
    assert server.asked[-1] == {"model": "tiny", "messages": [{"role": "user", "content": "a\n\nb"}]}
    assert len(server.asked) == 3


# -- what is tried again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [error(429, "slow down"), error(500, "oops"), error(503, "loading"), Step(status=502, body=b"<html>bad</html>"),
     Step(fault="drop"), Step("half", fault="cut"), Step(body={"error": {"message": "upstream", "code": 502}})],
)  # fmt: skip
def test_passing_failures_are_tried_again_and_said(server: ChatServer, failure: Step) -> None:
    server.steps, said = [failure, failure, Step("Here.")], []
    assert chat(server, said).complete("a", "b") == "Here."
    assert len(server.requests) == 3
    assert ["(1 of 3)" in said[0], "(2 of 3)" in said[1], len(said)] == [True, True, 2]


def test_pauses_double(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)  # the server sleeps 0.0 s; only real pauses are looked at
    server.steps = [error(500, "oops")]
    assert "Tried 8 times" in refusal(lambda: chat(server, retries=7, pause=1.0).complete("a", "b"))
    pauses = [seconds for seconds in slept if seconds]
    assert len(pauses) == 7
    assert all(2**i <= pause <= 1.25 * 2**i for i, pause in enumerate(pauses[:6]))
    assert pauses[6] == 60


def test_the_server_says_how_long_to_wait(server: ChatServer) -> None:
    server.steps = [Step(status=429, body={}, headers={"Retry-After": "0.3"}), Step("Here.")]
    start = time.monotonic()
    assert chat(server).complete("a", "b") == "Here."
    assert 0.3 <= time.monotonic() - start < 2


@pytest.mark.parametrize("form", ["3600", "date"])
def test_an_hour_is_not_waited(server: ChatServer, form: str) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=3601), usegmt=True)
    said = form if form != "date" else later
    server.steps = [Step(status=429, body={"error": {"message": "tomorrow"}}, headers={"Retry-After": said})]
    message = refusal(lambda: chat(server).complete("a", "b"))
    assert "tomorrow" in message
    assert any(f"It asks to wait {seconds} s" in message for seconds in (3600, 3601))
    assert len(server.requests) == 1


@pytest.mark.parametrize("step", [Step("late", wait=3.0), Step("trickles", trickle=0.1)])
def test_a_server_that_does_not_finish_is_left(server: ChatServer, step: Step) -> None:
    """Also one that sends a byte now and then, which no socket's timeout would notice."""
    server.steps = [step]
    start = time.monotonic()
    message = refusal(lambda: chat(server, timeout=0.4, retries=1).complete("a", "b"))
    assert "no answer within 0.4 s. Tried 2 times" in message
    assert 0.8 <= time.monotonic() - start < 2.5


# -- what is said of failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (error(401, "Incorrect API key provided"), "does not accept the key. Put a valid one"),
        (error(403, "not yours"), "the key does not admit to tiny. It says: not yours"),
        (error(404, "The model `tiny` does not exist"), "it has no model tiny. Name another with --prompt-model."),
        (Step(status=404, body={"detail": "Not Found"}), "nothing is served at this address. Does it lack its end"),
        (error(429, "quota", code="insufficient_quota"), "the account has no credit left. It says: quota"),
        (error(402, "pay"), "the account has no credit left. It says: pay"),
        (error(400, "too long"), "does not take the request (status 400). It says: too long"),
        (Step(status=422, body={"detail": [{"loc": ["body"], "msg": "bad"}]}), '[{"loc": ["body"], "msg": "bad"}]'),
        (Step(status=413, body=b"<html>too large</html>"), "does not take the request (status 413)."),
        (Step(status=302, body=b"", headers={"Location": "/elsewhere"}), "sends requests elsewhere"),
        (Step(body={"error": "model is broken"}), "It says: model is broken"),
        (Step(body=b"<html>welcome</html>"), "no chat completion: <html>welcome</html>. Is it the address of an"),
        (Step(body=b""), "no chat completion: nothing."),
        (Step(body={"choices": []}), 'no chat completion: {"choices": []}'),
        (Step(body=[1]), "no chat completion: [1]"),
        (Step(body={"choices": [{"message": {"content": 7}}]}), "no chat completion"),
        (Step(body=b"[" * 100_000), "no chat completion"),
        (Step(body={"choices": [{"message": {"content": None}}]}), "the answer is empty"),
        (Step(" \n"), "the answer is empty"),
        (Step("<think>hm, hm"), "the answer is empty"),
        (Step("A dog ru", finish="length"), "the answer was cut short"),
        (Step("", finish="content_filter"), "declines to answer: its filter stopped"),
        (Step(body={"choices": [{"message": {"content": None, "refusal": "No.\x1b[31m"}}]}), "answer: No. [31m"),
        (Step(body=b'{"choices":' + b" " * LONGEST_REPLY), "its reply is longer than 8 MiB"),
    ],
)  # fmt: skip
def test_lasting_failures_are_said_at_once(server: ChatServer, step: Step, expected: str) -> None:
    server.steps = [step]
    message = refusal(lambda: chat(server, key=KEY).complete("a", "b"))
    assert expected in message
    assert len(message) < 600
    assert server.url.removeprefix("http://").removesuffix("/v1") in message
    assert len(server.requests) == 1


def test_an_endpoint_that_asks_for_a_key(server: ChatServer) -> None:
    server.steps = [error(401, "no key")]
    assert "it asks for a key. Put it into the environment" in refusal(lambda: chat(server).complete("a", "b"))


def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        said: list[str] = []
        message = refusal(lambda: Chat(url, "tiny", say=said.append).complete("a", "b"))
    assert message == f"{url}: nothing listens there: is the server running?"
    assert said == []


def test_tls_and_none(server: ChatServer) -> None:
    asked = Chat(server.url.replace("http:", "https:"), "tiny", timeout=5)
    assert "it does not answer in TLS" in refusal(lambda: asked.complete("a", "b"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a dog?</think>\nA dog.", "A dog."),
        ("no tag before</think>A dog.", "A dog."),
        ("A <b>dog</b>.", "A <b>dog</b>."),
    ],
)
def test_what_was_thought_aloud_is_left_out(server: ChatServer, answer: str, expected: str) -> None:
    server.steps = [Step(answer)]
    assert chat(server).complete("a", "b") == expected


def test_content_in_parts(server: ChatServer) -> None:
    parts = [{"type": "text", "text": "A "}, {"type": "other"}, {"type": "text", "text": "dog."}]
    server.steps = [Step(body={"choices": [{"message": {"content": parts}}]})]
    assert chat(server).complete("a", "b") == "A dog."


# -- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [error(401, f"Incorrect key {KEY}"), error(500, f"cannot use {KEY}"), Step(body=f"hello {KEY}".encode()),
     Step(body={"choices": [{"message": {"content": None, "refusal": KEY}}]}), error(400, "x" * 290 + KEY),
     Step(fault="drop"), Step(status=302, body=b"", headers={"Location": f"/{KEY}"})],
)  # fmt: skip
def test_the_key_reaches_no_message(
    server: ChatServer, step: Step, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    server.steps, said = [step], []
    asked = chat(server, said, key=f" {KEY}\n", retries=1)
    with pytest.raises(UserError) as caught:
        asked.complete("a", "b")
    assert server.requests[0][2]["Authorization"] == f"Bearer {KEY}"  # it was used
    told = ["".join(traceback.format_exception(caught.value)), *said, repr(asked), str(asked), asked.label]
    told += [json.dumps(dataclasses.asdict(asked), default=str), caplog.text, *capfd.readouterr()]
    told += [repr(error) for error in (caught.value.__cause__, caught.value.__context__)]
    assert all(KEY[:6] not in text for text in told)


def test_an_answer_that_repeats_the_key_is_kept_without(server: ChatServer) -> None:
    server.steps = [Step(f"A dog. {KEY}")]
    assert chat(server, key=KEY).complete("a", "b") == "A dog. ***"


def test_a_redirect_gets_nothing(server: ChatServer) -> None:
    with serve(ChatServer()) as other:
        server.steps = [Step(status=307, body=b"", headers={"Location": f"{other.url}/chat/completions"})]
        assert "not followed" in refusal(lambda: chat(server, key=KEY).complete("a", "b"))
        assert other.requests == []


@pytest.mark.parametrize("key", ["sk-abc\nX-Evil: 1", "sk abc", "sk-é", "sk-\x00"])
def test_a_key_that_no_header_holds_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    if "\x00" not in key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert "sk" not in refusal(lambda: chat_from_environment("http://localhost:1/v1", "m"))
    message = refusal(lambda: Chat("http://localhost:1/v1", "m", key))
    assert message.startswith("OPENAI_API_KEY holds characters")
    assert "sk" not in message


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"{KEY}", f"http://{KEY} /"])
def test_an_address_with_a_secret_is_not_repeated(url: str) -> None:
    assert KEY not in refusal(lambda: base_address(url))


# -- addresses and the environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["", "/", "/chat/completions", "/chat/completions/"])
def test_addresses(tail: str) -> None:
    assert base_address(f" https://host:8000/v1{tail}") == "https://host:8000/v1"
    assert base_address(f"http://[::1]:80{tail}") == "http://[::1]:80"


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://host", "http://", "http://host:x/v1", "http://[::1", "http://a b"]
)
def test_what_is_no_address(url: str) -> None:
    assert refusal(lambda: base_address(url, "--prompt-url")).startswith("--prompt-url: this is no address. It looks")


def test_the_environment_decides(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    openai = chat_from_environment()
    assert openai.label == "gpt-4o at api.openai.com"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
    monkeypatch.setenv("OPENAI_MODEL", "second")
    local = chat_from_environment()
    assert (local.url, local.model) == (server.url, "second")
    given = chat_from_environment("http://localhost:9/v1", "third")
    assert (given.url, given.model) == ("http://localhost:9/v1", "third")
    assert local.complete("a", "b") == "An answer."
    assert server.requests[-1][2]["Authorization"] == f"Bearer {KEY}"
    assert server.asked[-1]["model"] == "second"


def test_empty_names_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.setenv(name, " ")
    message = refusal(chat_from_environment)
    assert "OPENAI_API_KEY" in message
    assert "--prompt-url" in message


def test_the_only_model_is_taken(server: ChatServer) -> None:
    assert chat_from_environment(server.url).model == "tiny"
    server.models = ["one", "two"]
    assert "has 2 models. Name one with --prompt-model" in refusal(lambda: chat_from_environment(server.url))
    server.models = [f"m{i}" for i in range(300)]
    assert refusal(lambda: chat_from_environment(server.url)).endswith("m6, m7, ...")
    server.models = []
    assert "has 0 models" in refusal(lambda: chat_from_environment(server.url))
    assert "does not say which models" in refusal(lambda: chat_from_environment(server.url[:-3]))
    assert all("Authorization" not in headers for _, _, headers, _ in server.requests)


def test_several_threads_share_one(server: ChatServer) -> None:
    server.refuses = {"temperature": error(400, "temperature")}
    asked = chat(server)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: asked.complete("a", str(i), temperature=0.5), range(20)))
    assert answers == ["An answer."] * 20
    sent = [payload["messages"][1]["content"] for payload in server.asked if "temperature" not in payload]
    assert sorted(sent, key=int) == [str(i) for i in range(20)]
