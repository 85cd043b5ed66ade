"""One JSON request over HTTP, from the standard library: with a deadline, without redirects, and no key in a message.

A client library would bring a dozen packages for two kinds of request. What matters here is in one page: urllib's own
redirects would carry the key to another host, and its timeout alone would wait for ever on a server that trickles.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from kinema import __version__

LONGEST_REPLY = 2**23
"""Bytes of a reply that are read at most."""


@dataclass(frozen=True)
class Reply:
    """What a server answered: a status of any kind, and the body as JSON (None where it is none)."""

    status: int
    body: Any
    text: str
    retry_after: float | None
    """Seconds that the server asks to wait before the next request."""


class NoReply(Exception):
    """No whole reply came. ``temporary``: the same request may work a moment later."""

    def __init__(self, reason: str, temporary: bool) -> None:
        super().__init__(reason)
        self.temporary = temporary


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands over replies of every status as they are. Redirects are replies too: none is followed."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def exchange(url: str, payload: Any | None, key: str | None, timeout: float) -> Reply:
    """POST ``payload`` as JSON, or GET where it is None. ``timeout``: seconds, for each wait and for the whole.

    NoReply where no whole reply came.
    """
    headers = {"Accept": "application/json", "User-Agent": f"kinema/{__version__}"}
    data = None
    if payload is not None:
        data = json.dumps(payload).encode("ascii")
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(url, data=data, headers=headers)
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    handlers: list[Any] = [_AnyStatus()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))  # no proxy reaches what listens on this very machine
    deadline = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            body = _read(response, deadline)
            return Reply(response.status, _as_json(body), _as_text(body), _retry_after(response.headers))
    except urllib.error.URLError as error:
        raise _no_reply(error.reason, timeout) from None
    except (OSError, http.client.HTTPException) as error:
        raise _no_reply(error, timeout) from None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, within the deadline."""
    body = bytearray()
    while chunk := response.read1(2**16):
        body += chunk
        if len(body) > LONGEST_REPLY:
            raise NoReply(f"its reply is longer than {LONGEST_REPLY >> 20} MiB", temporary=False)
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # bytes that were announced and did not come
        raise http.client.IncompleteRead(bytes(body), response.length)
    return bytes(body)


def _as_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _as_text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _retry_after(headers: Any) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    said = headers.get("Retry-After")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _no_reply(reason: Any, timeout: float) -> NoReply:
    """What went wrong below HTTP, in words."""
    if isinstance(reason, NoReply):
        return reason
    if isinstance(reason, TimeoutError):
        return NoReply(f"no answer within {timeout:g} s", temporary=True)
    if isinstance(reason, ConnectionRefusedError):
        return NoReply("nothing listens there: is the server running?", temporary=False)
    if isinstance(reason, socket.gaierror):
        return NoReply("its name cannot be resolved", temporary=reason.errno == socket.EAI_AGAIN)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return NoReply(f"its certificate is not trusted ({reason.verify_message})", temporary=False)
    if isinstance(reason, ssl.SSLError):
        return NoReply("it does not answer in TLS: is it http:// instead of https://?", temporary=False)
    if isinstance(reason, ConnectionError | http.client.IncompleteRead):
        return NoReply("the connection broke off", temporary=True)
    if isinstance(reason, http.client.HTTPException):
        return NoReply("what answers there does not speak HTTP: is it https:// instead of http://?", temporary=False)
    return NoReply(getattr(reason, "strerror", None) or "the connection failed", temporary=False)


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
