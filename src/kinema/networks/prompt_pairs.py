"""What pipelines of ours do alike with texts: the prompts of a call and their negative texts, embedded one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

Texts = str | Sequence[str] | None
"""One text or several; None: the empty one."""


def prompt_pairs(
    embed: Callable[[str], T],
    prompt: Texts,
    negative_prompt: Texts,
    guided: bool,
    prompt_embeds: list[T] | None = None,
    negative_prompt_embeds: list[T] | None = None,
) -> tuple[list[T], list[T] | None]:
    """What ``embed`` makes of every prompt, and of its negative text (None where nothing is ``guided``).

    Embeddings that are given stand for texts. One negative text serves all prompts.
    """
    if prompt_embeds is None:
        prompt_embeds = [embed(text) for text in _listed(prompt)]
    if not guided:
        return prompt_embeds, None
    if negative_prompt_embeds is None:
        negative_prompt_embeds = [embed(text) for text in _listed(negative_prompt)]
    if len(negative_prompt_embeds) == 1:
        negative_prompt_embeds = negative_prompt_embeds * len(prompt_embeds)
    assert len(negative_prompt_embeds) == len(prompt_embeds), "one negative text, or one for each prompt"
    return prompt_embeds, negative_prompt_embeds


def _listed(texts: Texts) -> list[str]:
    return [texts or ""] if texts is None or isinstance(texts, str) else list(texts)
