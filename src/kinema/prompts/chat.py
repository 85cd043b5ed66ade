"""A chat model behind any endpoint that speaks OpenAI's protocol: OpenAI, vLLM, llama.cpp, Ollama, LM Studio...

The key comes from the environment alone. It is sent to the endpoint and reaches nothing else: no file, no message.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kinema.errors import UserError
from kinema.prompts.exchange import NoReply, Reply, exchange

OPENAI = "https://api.openai.com/v1"
OPENAI_MODEL = "gpt-4o"
"""The model that OpenAI is asked for by default; Open-Sora 2.0 asks for it too."""
LONGEST_PAUSE = 60.0
"""Seconds between two tries, at most; a server that asks for more is not waited for."""
PICTURE_SIDE = 1024
"""The longer side, in pixels, of a picture that is shown to a model, at most."""

AGAIN = (408, 409, 429, *range(500, 600))
"""Statuses that the same request may not meet a moment later."""

REFUSED = {
    "pictures": re.compile(
        r"(image|vision|multi-?modal|content part).*(support|not a |unknown|missing|expected)"
        r"|(support|not a |unknown|missing|at most 0).*(image|vision|multi-?modal|content part)"
        r"|must be a string|valid string|not \"list\"",
        re.IGNORECASE | re.DOTALL,
    ),
    "temperature": re.compile(r"temperature", re.IGNORECASE),
    "system": re.compile(r"\bsystem\b.*support|support.*\bsystem\b", re.IGNORECASE | re.DOTALL),
}
"""How endpoints say, each in its own words, that a model takes no pictures, no temperature but its own (models that
think), or no message of the system's (Gemma). Requests then go without. llama.cpp says it with status 500."""


class PictureRefused(UserError):
    """The model takes no pictures."""


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Chat:
    """A model at an endpoint. May be used by several threads at once.

    >>> chat = Chat("http://localhost:8000/v1", "qwen3")
    >>> chat.complete("Answer with one word.", "What barks?")  # doctest: +SKIP
    'Dogs.'
    """

    url: str
    """Address of the endpoint up to its version, such as `http://localhost:8000/v1`."""
    model: str | None = None
    """Name at the endpoint; None: the only one that it offers."""
    key: InitVar[str | None] = None
    """Sent with every request; endpoints on one's own machine mostly need none."""
    timeout: float = 120.0
    """Seconds that one request may take."""
    retries: int = 3
    """Further tries where the endpoint is busy, fails or does not answer in time."""
    pause: float = 1.0
    """Seconds before the first further try; each next pause is twice as long."""
    say: Callable[[str], None] = field(default=_to_stderr, repr=False, compare=False)
    """Takes notices, a line each: what is tried again, and what goes without."""
    refused: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What the endpoint turned out not to take (a key of `REFUSED`), and the words in which it said so."""

    def __post_init__(self, key: str | None) -> None:
        self.url = base_address(self.url)
        self._key = usable_key(key)
        assert self.timeout > 0 and self.retries >= 0 and self.pause >= 0

    @property
    def label(self) -> str:
        """Model and host, such as a file's metadata may name them."""
        return f"{self.model} at {urlsplit(self.url).netloc}"

    def complete(
        self, system: str, user: str, image: Path | str | None = None, *, temperature: float | None = None
    ) -> str:
        """The model's answer to one message, without surrounding space and without what it thought aloud.

        ``image``: a picture, or a video of which the first frame is shown. ``temperature`` None: the endpoint's own.
        UserError, which names the endpoint and what to do, where no whole answer comes; PictureRefused where the model
        takes no pictures.
        """
        if self.model is None:
            self.model = self._only_model()
        shown = None
        if image is not None:
            if "pictures" in self.refused:
                raise self._picture_refused()
            shown = picture_address(image)
        while True:
            asked = {"pictures": shown is not None, "temperature": temperature is not None, "system": True}
            open_questions = tuple(name for name, used in asked.items() if used and name not in self.refused)
            reply = self._send("chat/completions", self._payload(system, user, shown, temperature), open_questions)
            if 200 <= reply.status < 300:
                return self._answer(reply)
            refused = _refusal(reply, open_questions)
            if refused is None:
                raise self._error(reply)
            self.refused[refused] = self._words(reply)
            if refused == "pictures":
                raise self._picture_refused()

    def _payload(self, system: str, user: str, shown: str | None, temperature: float | None) -> dict[str, Any]:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
        if "system" in self.refused:
            messages, user = [], f"{system}\n\n{user}"
        content: Any = user
        if shown is not None:
            content = [{"type": "text", "text": user}, {"type": "image_url", "image_url": {"url": shown}}]
        payload: dict[str, Any] = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        if temperature is not None and "temperature" not in self.refused:
            payload["temperature"] = temperature
        return payload

    def _send(self, path: str, payload: Any | None, open_questions: tuple[str, ...] = ()) -> Reply:
        """The first reply that another try would not change. UserError where there is none after all tries."""
        for attempt in range(self.retries + 1):
            wait: float | None = None
            try:
                reply = _settled(exchange(f"{self.url}/{path}", payload, self._key, self.timeout))
            except NoReply as error:
                problem = str(error)
                if not error.temporary:
                    raise UserError(f"{self.url}: {problem}") from None
            else:
                if reply.status not in AGAIN or _out_of_credit(reply) or _refusal(reply, open_questions):
                    return reply
                problem, wait = f"status {reply.status}: {self._words(reply)}", reply.retry_after
            if attempt == self.retries:
                tries = "once" if attempt == 0 else f"{attempt + 1} times"
                raise UserError(f"{self.url}: {problem}. Tried {tries}; try again later.")
            seconds = self._pause_before(attempt + 1) if wait is None else wait
            if seconds > LONGEST_PAUSE:
                raise UserError(f"{self.url}: {problem}. It asks to wait {seconds:.0f} s; try again then.")
            self.say(f"{self.url}: {problem}; next try in {seconds:.1f} s ({attempt + 1} of {self.retries}).")
            time.sleep(seconds)
        raise AssertionError("unreachable")

    def _pause_before(self, attempt: int) -> float:
        """Seconds; drawn a little apart, so that several processes do not come back at once."""
        return min(self.pause * 2 ** (attempt - 1) * random.SystemRandom().uniform(1, 1.25), LONGEST_PAUSE)

    def _answer(self, reply: Reply) -> str:
        """The text of a completion."""
        try:
            choice = reply.body["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            refusal, content = message.get("refusal"), message.get("content")
            if isinstance(content, list):
                content = "".join(part["text"] for part in content if part.get("type") == "text")
            if not isinstance(content, str | None):
                raise TypeError
        except (TypeError, KeyError, IndexError, AttributeError):
            said = self._clean(reply.text, 200) or "nothing"
            raise UserError(
                f"{self.url} answered what is no chat completion: {said}. Is it the address of an endpoint that "
                "speaks OpenAI's protocol?"
            ) from None
        if finish == "length":
            raise UserError(f"{self.label}: the answer was cut short. Let it write more tokens, or take another model.")
        if refusal or finish == "content_filter":
            said = self._clean(refusal, 200) if isinstance(refusal, str) else "its filter stopped the answer"
            raise UserError(f"{self.label} declines to answer: {said}. Change the prompt, or take another model.")
        text = _without_thinking(self._without_key(content or "")).strip()
        if not text:
            raise UserError(f"{self.label}: the answer is empty. Try again, or take another model.")
        return text

    def _only_model(self) -> str:
        """The name of the only model that the endpoint offers; UserError where there are more, or it does not say."""
        choose = "Name one with --prompt-model, or in the environment as OPENAI_MODEL"
        reply = self._send("models", None)
        if reply.status in (401, 403):
            raise self._error(reply)
        try:
            names = [str(one["id"]) for one in reply.body["data"]]
        except (TypeError, KeyError):
            raise UserError(f"{self.url} does not say which models it has. {choose}.") from None
        if len(names) != 1:
            known = ", ".join(self._clean(name, 80) for name in names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"{self.url} has {len(names)} models. {choose}{': ' if names else '.'}{known}")
        return names[0]

    def _error(self, reply: Reply) -> UserError:
        """What a status means to the user."""
        words, status = self._words(reply), reply.status
        if status == 401 and self._key is None:
            advice = "it asks for a key. Put it into the environment as OPENAI_API_KEY"
        elif status == 401:
            advice = "it does not accept the key. Put a valid one into the environment as OPENAI_API_KEY"
        elif status == 403:
            advice = f"the key does not admit to {self.model or 'its models'}"
        elif status == 404 and "model" in words.lower():
            advice = f"it has no model {self.model}. Name another with --prompt-model"
        elif status == 404:
            advice = "nothing is served at this address. Does it lack its end, such as /v1?"
        elif _out_of_credit(reply):
            advice = "the account has no credit left"
        elif 300 <= status < 400:
            advice = "it sends requests elsewhere, which are not followed. Give the address that it leads to"
        else:
            advice = f"it does not take the request (status {status})"
        return UserError(f"{self.url}: {advice}." + (f" It says: {words}" if words else ""))

    def _picture_refused(self) -> PictureRefused:
        return PictureRefused(f"{self.label} takes no pictures. It says: {self.refused['pictures']}")

    def _words(self, reply: Reply) -> str:
        """What the endpoint says about an error, fit for one line."""
        return self._clean(_message(reply), 300)

    def _clean(self, text: str, longest: int) -> str:
        """A server's text for a message: on one line, without control characters, cut, and never with the key."""
        return one_line(self._without_key(text), longest)

    def _without_key(self, text: str) -> str:
        if self._key is None or len(self._key) < 6:  # short ones ("EMPTY", "-") are placeholders
            return text
        return text.replace(self._key, "***")


def chat_from_environment(url: str | None = None, model: str | None = None) -> Chat:
    """The chat model that the user means: ``url``, or OPENAI_BASE_URL, or OpenAI; ``model``, or OPENAI_MODEL, or the
    only one that is there (of OpenAI: gpt-4o); the key in OPENAI_API_KEY.

    UserError where something is missing, before any work starts: an endpoint whose model is not named is asked for it.
    """
    environment = {name: os.environ.get(name, "").strip() for name in ("OPENAI_BASE_URL", "OPENAI_MODEL")}
    name = "--prompt-url" if url else "OPENAI_BASE_URL"
    address = base_address(url or environment["OPENAI_BASE_URL"] or OPENAI, name)
    model = model or environment["OPENAI_MODEL"] or None
    key = usable_key(os.environ.get("OPENAI_API_KEY"))
    if urlsplit(address).hostname == urlsplit(OPENAI).hostname:
        if key is None:
            raise UserError(
                "A chat model is asked, and none is named. Put OpenAI's key into the environment as OPENAI_API_KEY, or "
                "name another endpoint with --prompt-url, such as http://localhost:8000/v1."
            )
        model = model or OPENAI_MODEL
    chat = Chat(address, model, key)
    if chat.model is None:
        chat.model = chat._only_model()
    return chat


def one_line(text: str, longest: int) -> str:
    """Somebody else's text as part of a message: on one line, without control characters, cut where it is longer."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def base_address(url: str, name: str = "The chat endpoint's address") -> str:
    """An endpoint's address without its last parts (`/`, `/chat/completions`). UserError for what is no address.

    What is wrong is not repeated: it may hold a password.
    """
    url = url.strip()
    try:
        parts = urlsplit(url)
        _ = parts.port
        sound = url.isascii() and url.isprintable() and " " not in url
        sound = sound and parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{name}: this is no address. It looks like http://localhost:8000/v1.")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"{name}: an address ends with its path here, such as http://localhost:8000/v1. "
            "A key goes into the environment, as OPENAI_API_KEY."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def usable_key(key: str | None) -> str | None:
    """A key without surrounding space; None for none. UserError, which does not show it, for what no header holds."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            "OPENAI_API_KEY holds characters that no key has, such as a blank or a line break: set it anew."
        )
    return key or None


def picture_address(image: Path | str) -> str:
    """A picture, or a video's first frame, as a data URL: JPEG, upright, scaled down to `PICTURE_SIDE`, and without the
    file's metadata. MediaError for what cannot be read."""
    from PIL import Image

    from kinema.data.buckets import Clip
    from kinema.data.media import decode_clip, probe
    from kinema.data.transform import Transform

    info = probe(image)
    scale = min(1.0, PICTURE_SIDE / max(info.height, info.width))
    size = Transform(max(1, round(info.height * scale)), max(1, round(info.width * scale)))
    pixels = decode_clip(image, Clip(), size)
    file = io.BytesIO()
    Image.fromarray(pixels[:, 0].transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _without_thinking(text: str) -> str:
    """The answer after what a model thought aloud; "" if it never came to an answer."""
    _, end, answer = text.rpartition("</think>")
    return "" if not end and text.lstrip().startswith("<think>") else answer


def _refusal(reply: Reply, open_questions: tuple[str, ...]) -> str | None:
    """Which of these parts of a request (keys of `REFUSED`) a reply says that the model does not take."""
    if reply.status not in (400, 404, 415, 422, 500, 501):
        return None
    message = _message(reply)
    return next((name for name in open_questions if REFUSED[name].search(message)), None)


def _out_of_credit(reply: Reply) -> bool:
    """Whether a 429 will stay one: OpenAI's code for an account without credit."""
    return reply.status == 402 or (reply.status == 429 and "insufficient_quota" in reply.text)


def _settled(reply: Reply) -> Reply:
    """A reply whose status is that of the error in its body: gateways answer 200 before they know."""
    body = reply.body
    if reply.status != 200 or not isinstance(body, dict) or not body.get("error") or body.get("choices"):
        return reply
    code = body["error"].get("code") if isinstance(body["error"], dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 400
    return Reply(status, body, reply.text, reply.retry_after)


def _message(reply: Reply) -> str:
    """The sentence in an error's body, wherever this endpoint puts it; "" for a page of HTML."""
    body = reply.body
    if not isinstance(body, dict):
        return "" if reply.text.lstrip().startswith("<") else reply.text
    found: Any = body.get("error") or body.get("message") or body.get("detail") or ""
    if isinstance(found, dict):
        found = found.get("message") or found
    return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
