"""A local stand-in for an endpoint that speaks OpenAI's chat protocol, on a real socket: it answers what a test has
put down for it, fails in the ways in which servers fail, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

IMAGE_REFUSALS = {
    "llama.cpp": (
        500,
        "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
    ),
    "llama.cpp, older": (500, 'Failed to parse messages: Unsupported content part type: "image_url"; messages = ['),
    "ollama": (400, "this model does not support image input (ref: b8bd630e)"),
    "vllm": (400, "facebook/opt-125m is not a multimodal model None"),
    "vllm, limit": (400, "At most 0 image(s) may be provided in one prompt."),
    "openai": (400, "Invalid content type. image_url is only supported by certain models."),
    "deepseek": (400, "Failed to deserialize the JSON body: messages[1]: unknown variant `image_url`, expected `text`"),
    "groq": (400, "'messages.1' : for 'role:user' the following must be satisfied: content must be a string"),
    "openrouter": (404, "No endpoints found that support image input"),
    "llama-cpp-python": (500, 'can only concatenate str (not "list") to str'),
}
"""How real endpoints say that a model takes no pictures (from their issue trackers)."""


@dataclass
class Step:
    """One answer. ``text``: of a completion; ``body``: anything else instead."""

    text: str = ""
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    wait: float = 0.0
    """Seconds before the answer."""
    trickle: float = 0.0
    """Seconds between the bytes of the answer."""
    fault: str = ""
    """"drop": no answer at all; "cut": half of the body, and the connection closes."""


def error(status: int, message: str, **more: Any) -> Step:
    """An error as OpenAI words it."""
    return Step(status=status, body={"error": {"message": message, **more}})


class ChatServer:
    """``steps``: the answers in turn; the last one stands for all that follow."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps) or [Step("An answer.")]
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        """(method, path, headers, JSON) of all that was asked."""
        self.models = ["tiny"]
        self.refuses: dict[str, Step] = {}
        """What is answered, whatever the turn, to a request with "pictures", "temperature" or "system" in it."""
        self.url = ""

    @property
    def asked(self) -> list[Any]:
        """The JSON of all requests for completions."""
        return [payload for method, _, _, payload in self.requests if method == "POST"]

    def answer(self, payload: Any) -> Step:
        used = {
            "pictures": any(isinstance(one["content"], list) for one in payload["messages"]),
            "temperature": "temperature" in payload,
            "system": payload["messages"][0]["role"] == "system",
        }
        for name, step in self.refuses.items():
            if used[name]:
                return step
        return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]


@contextmanager
def serve(chat: ChatServer) -> Iterator[ChatServer]:
    """Runs the server; its address stands in ``chat.url``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": chat}))
    server.daemon_threads = True
    server.block_on_close = False  # a step that waits does not hold the test up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.keep(None)
        if self.path != "/v1/models":
            self.reply(Step(status=404, body={"detail": "Not Found"}))
            return
        self.reply(Step(body={"object": "list", "data": [{"id": name} for name in self.chat.models]}))

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keep(payload)
        if self.path != "/v1/chat/completions":
            self.reply(Step(status=404, body={"detail": "Not Found"}))
            return
        self.reply(self.chat.answer(payload))

    def keep(self, payload: Any) -> None:
        self.chat.requests.append((self.command, self.path, dict(self.headers), payload))

    def reply(self, step: Step) -> None:
        time.sleep(step.wait)
        if step.fault == "drop":
            return
        body: Any = step.body
        if body is None:
            message = {"role": "assistant", "content": step.text}
            body = {"choices": [{"index": 0, "message": message, "finish_reason": step.finish}]}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(step.status)
        for key, value in ({"Content-Length": str(len(data))} | step.headers).items():
            self.send_header(key, value)
        self.end_headers()
        if step.fault == "cut":
            data = data[: len(data) // 2]
        pieces = [data] if not step.trickle else [data[i : i + 1] for i in range(len(data))]
        try:
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(step.trickle)
        except OSError:
            return
