"""Captions as they are trained on: prefix, shuffled tags and capitals, suffix, score text, and whose turn it is.

Everything is a pure function of the seed, the record's captions and the name of its file, so that neither other
records nor ranks nor the folder that it lies in change a caption.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from kinema.randomness import derive_seed

from .files import file_name

if TYPE_CHECKING:
    from kinema.config.data import CaptionConfig

    from .records import Record

T = TypeVar("T")

SCORES = {"fps": "{:g} FPS", "motion": "{:g} motion score", "aesthetic": "{:g} aesthetic score"}
"""How each score is said, in the order in which they are said."""

TRIES = 40
"""Draws for each variant that is wanted, at most: draws repeat each other, and tags that differ in their capitals alone
give fewer texts than are counted."""

_WORD_START = re.compile(r"(?<!\w)(?<!\w['’])[^\W\d_]")
"""The first letter of a word; what follows an apostrophe inside a word (don't) or a digit (1girl) is none."""


def _each_word(text: str) -> str:
    return _WORD_START.sub(lambda found: found[0].upper(), text)


CAPITALS: tuple[Callable[[str], str], ...] = (str, str.lower, _each_word, str.upper)
"""As it is, all lower case, Each Word, ALL UPPER CASE: one of them is drawn."""


def score_text(scores: Mapping[str, float], which: Sequence[str]) -> str:
    """``24 FPS, 4 motion score, 5.5 aesthetic score.``: those of ``which`` that ``scores`` has as a finite number, in
    ``%g``.

    The order is always this one, whatever that of ``which``; "" where there is nothing to say. It is the form that the
    captions had which Open-Sora 2.0's published weights were trained with ("<caption> 24 FPS, 4 motion score."); its
    own sampler writes ". 24 FPS. 4 motion score.", which they never saw in training. The aesthetic score joins in the
    same style.
    """
    said = [
        form.format(scores[name])
        for name, form in SCORES.items()
        if name in which and math.isfinite(scores.get(name, math.nan))
    ]
    return f"{', '.join(said)}." if said else ""


def with_scores(text: str, scores: Mapping[str, float], which: Sequence[str]) -> str:
    """``text`` with the score text after it, one space between; the score text alone where ``text`` is empty."""
    return " ".join(filter(None, (text, score_text(scores, which))))


class Captioner:
    """What becomes of the captions of a source's records.

    A finished caption is the prefix, the caption with its tags and capitals shuffled, the suffix, exactly as written,
    then the score text. An empty caption becomes prefix and suffix: a trigger word is to be learnt. (The caption that
    is dropped in training is always "", and no business of this class.)

    Both methods take ``fps``, the frame rate of the clip, which is said in the place of the file's; 0, that of
    pictures, is not said; None leaves the record's own.
    """

    def __init__(self, config: CaptionConfig, seed: int, online: bool) -> None:
        """``online``: text is encoded when it is needed, and shuffled anew for every use."""
        self.config, self.seed, self.online = config, seed, online

    def variants(self, record: Record, fps: float | None = None) -> tuple[str, ...]:
        """All finished captions of a record that are cached, at least one.

        Of each caption that is shuffled, up to ``config.variants`` that differ, and fewer where there are no more; of
        several captions, those with fewer repeat them, so that all captions have equally many. A larger number keeps
        those of a smaller one. With ``online``, one of each caption.
        """
        count = 1 if self.online else self.config.variants
        texts = [self._shuffled(caption, count, file_name(record.path)) for caption in record.captions]
        most = max(map(len, texts))
        return tuple(self._finish(own[i % len(own)], record, fps) for own in texts for i in range(most))

    def choose(self, record: Record, use: int, fps: float | None = None) -> str:
        """The caption of the record's use number ``use``, from 0.

        They take turns: each once in every len(variants) uses (with ``online``, every len(captions) uses), in a new
        random order every time. With ``online`` it is shuffled for this use alone.
        """
        assert use >= 0
        if not self.online:
            finished = self.variants(record, fps)
            return finished[self.turn(record, use, len(finished))]
        caption = record.captions[self.turn(record, use, len(record.captions))]
        return self._finish(self._shuffled(caption, 1, file_name(record.path), use)[0], record, fps)

    def draws(self, record: Record) -> bool:
        """Whether the name of a record's file decides anything."""
        config = self.config
        return len(record.captions) > 1 or config.shuffle_tags or config.shuffle_capitals

    def turn(self, record: Record, use: int, count: int) -> int:
        """Whose turn it is of ``count``: the place in `variants` of what `choose` gives, where text is cached."""
        if count == 1:
            return 0
        number, place = divmod(use, count)
        draw = self._stream("turns", file_name(record.path), number)
        return _in_random_order(range(count), draw)[place]

    def _shuffled(self, caption: str, count: int, *key: int | str) -> list[str]:
        """Up to ``count`` texts that differ, with shuffled tags and capitals, drawn for this caption and ``key``."""
        config = self.config
        head, tail, end = self._tags(caption) if config.shuffle_tags else ([caption], [], "")
        if len(tail) < 2 and not config.shuffle_capitals:
            return [caption]
        draw = self._stream("shuffle", *key, caption)
        found: dict[str, None] = {}
        count = min(count, _orders(tail) * (len({f(caption) for f in CAPITALS}) if config.shuffle_capitals else 1))
        for _ in range(TRIES * count):
            text = config.delimiter.join(head + _in_random_order(tail, draw)) + end
            if config.shuffle_capitals:
                text = CAPITALS[int(draw.random() * len(CAPITALS))](text)
            found[text] = None
            if len(found) == count:
                break
        return list(found)

    def _tags(self, caption: str) -> tuple[list[str], list[str], str]:
        """Tags that stay, tags that are shuffled, and what ends the caption: a last delimiter, with or without its
        space ("a, b," or "One. Two."), is no part of the last tag."""
        whole, bare = self.config.delimiter, self.config.delimiter.rstrip()
        end = next((mark for mark in (whole, bare) if mark and caption.endswith(mark)), "")
        tags = caption.removesuffix(end).split(whole)
        return tags[: self.config.keep_tags], tags[self.config.keep_tags :], end

    def _finish(self, text: str, record: Record, fps: float | None) -> str:
        config = self.config
        scores = record.scores if fps is None else {**record.scores, "fps": fps}
        said = [name for name in config.scores if name != "fps" or scores.get("fps", 0) > 0]
        return with_scores(f"{config.prefix}{text}{config.suffix}", scores, said)

    def _stream(self, purpose: str, *key: int | str) -> random.Random:
        """Random numbers of which `random.Random.random` alone is used: Python promises that stream, and no other."""
        return random.Random(derive_seed(self.seed, f"caption {purpose}", *key))


def _orders(tags: Sequence[str]) -> int:
    """How many orders of the tags differ."""
    return math.factorial(len(tags)) // math.prod(map(math.factorial, Counter(tags).values()))


def _in_random_order(values: Sequence[T], draw: random.Random) -> list[T]:
    keys = [draw.random() for _ in values]
    return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]
