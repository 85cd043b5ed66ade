"""What a chat model does for a whole batch of prompts, before any weights are loaded."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.prompts.chat import Chat, one_line
from kinema.prompts.motion import motion_score
from kinema.prompts.refine import Language, Task, refine

AT_ONCE = 4
"""Requests under way at a time."""
LOOK_EVERY = 0.2
"""Seconds between two looks at what another process has been answered."""


@dataclass(frozen=True)
class Wish:
    """A prompt as somebody wrote it, and what is made of it."""

    prompt: str
    task: Task
    image: str | None = None
    """Location of the picture that a video starts from."""
    refined: bool = True
    scored: bool = False
    """Whether a motion score is asked for too."""


@dataclass(frozen=True)
class Prepared:
    """What is used in the place of a wish's prompt; ``motion`` None where no score was asked for."""

    prompt: str
    motion: int | None
    by: str
    """The chat model and its host."""


def prepare(
    wishes: Sequence[Wish],
    chat: Chat,
    *,
    language: Language = "en",
    memory: Path | None = None,
    ask: bool = True,
) -> list[Prepared]:
    """For each wish its prompt, refined where it wants that, and the motion score of that prompt where it wants one.

    Equal wishes are asked for once, `AT_ONCE` at a time. Answers are kept in ``memory``, a file of JSON lines, as soon
    as they are there, and not asked for again: chat models do not repeat themselves, and a batch that is taken up again
    is to have the same prompts. ``ask`` False: wait for those that another process (rank 0) writes there.

    UserError, which names the prompt, as soon as one fails.
    """
    assert ask or memory is not None
    distinct = list(dict.fromkeys(wishes))
    keys = {wish: _key(wish, chat, language) for wish in distinct}
    known = _recall(memory)
    while not ask and any(keys[wish] not in known for wish in distinct):
        time.sleep(LOOK_EVERY)
        known = _recall(memory)
    missing = [wish for wish in distinct if keys[wish] not in known]
    lock = threading.Lock()

    def one(wish: Wish) -> Prepared:
        try:
            prompt = (
                refine(wish.prompt, wish.task, chat, wish.image, language=language) if wish.refined else wish.prompt
            )
            found = Prepared(prompt, motion_score(prompt, chat) if wish.scored else None, chat.label)
        except UserError as error:
            if len(distinct) == 1:
                raise
            raise UserError(f"Prompt '{one_line(wish.prompt, 60)}': {error}") from error
        with lock:
            _remember(memory, keys[wish], wish, found)
        return found

    if len(missing) < 2:  # in this thread, so that Ctrl-C ends it at once
        answers = [one(wish) for wish in missing]
    else:
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            answers = list(pool.map(one, missing))
        finally:
            pool.shutdown(wait=False)  # what has not begun, `map` cancels
    known |= {keys[wish]: answer for wish, answer in zip(missing, answers, strict=True)}
    return [known[keys[wish]] for wish in wishes]


# -- answers that are kept --------------------------------------------------------------------------------------------


def _key(wish: Wish, chat: Chat, language: str) -> str:
    """What an answer depends on: the wish, the picture's file as it is now, the language and the model."""
    parts: dict[str, Any] = {**asdict(wish), "language": language, "model": chat.model, "url": chat.url}
    if wish.image is not None:
        from kinema.data.files import status

        parts["file"] = asdict(status(wish.image))
    return json.dumps(parts, sort_keys=True)


def _recall(memory: Path | None) -> dict[str, Prepared]:
    """The answers in a file, the first for each key; a line cut short by a full disk or a kill is none."""
    found: dict[str, Prepared] = {}
    if memory is None or not memory.exists():
        return found
    for line in memory.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            answer = Prepared(str(entry["prompt"]), entry["motion"], str(entry["by"]))
            found.setdefault(json.dumps(entry["asked"], sort_keys=True), answer)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _remember(memory: Path | None, key: str, wish: Wish, answer: Prepared) -> None:
    """Append one line, in one write that begins on a new line whatever an earlier one was cut off at."""
    if memory is None:
        return
    line = "\n" + json.dumps({**asdict(answer), "text": wish.prompt, "asked": json.loads(key)}) + "\n"
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(memory, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{memory}: cannot be written ({error.strerror}).") from error
