"""Texts of samples, encoded before the pipeline's call: the text encoders are then needed for that long alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kinema.sampling.placing import on_device, text_encoders

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kinema.families.base import Family
    from kinema.sampling.pipeline import SampleSettings

NEGATIVE = "negative_"


class Texts:
    """Embeddings of texts, each encoded once and alone, by the pipeline's own ``encode_prompt``.

    ``apart``: whether the pipeline's text can be encoded apart from its call. That is so where the family says which
    of the call's arguments ``encode_prompt`` returns (`Family.encoded_text`), and they are all that the call takes;
    other pipelines get the words, and so do those whose text encoder sees pictures too.
    """

    def __init__(self, family: Family, pipeline: Any) -> None:
        known, encode = call_parameters(pipeline), getattr(pipeline, "encode_prompt", None)
        self.pipeline = pipeline
        self.returned = family.encoded_text
        self.encode_takes = {} if encode is None else dict(inspect.signature(encode).parameters)
        of_text = {name for name in known if "prompt" in name and ("embeds" in name or "mask" in name)}
        said = {name.removeprefix(NEGATIVE) for name in self.returned if name}
        self.apart = {name.removeprefix(NEGATIVE) for name in of_text} == said and "image" not in self.encode_takes
        self.has_negative = "negative_prompt" in known
        # some encode the negative text in a way of its own, the others as any prompt
        self.tells_apart = any(name.startswith(NEGATIVE) for name in self.returned)
        length = known.get("max_sequence_length")
        # the call's default: encode_prompt may have another one
        self.default_length: int | None = None if length is None else length.default
        self.found: dict[tuple[str, int | None, bool], dict[str, Any]] = {}
        """By text, length, and whether it was encoded as a negative text: the call's arguments, as of a prompt. They
        wait on the CPU: of thousands of prompts they would fill a device."""
        self.device: torch.device | str = "cpu"

    def encode(
        self, settings: Sequence[SampleSettings], device: torch.device | str = "cpu", *, move: bool = True
    ) -> None:
        """Encode on ``device`` the texts of these samples that are not known yet, if that can be done apart; ``move``:
        the encoders have to be moved there for it."""
        if not self.apart:
            return
        wanted = {key for one in settings for key in self._keys(one)}
        self.device = device
        missing = sorted(wanted - self.found.keys(), key=lambda key: (key[2], key[0]))  # prompts first
        if missing:
            with on_device(text_encoders(self.pipeline) if move else [], device):
                self.found.update((key, self._encode(*key, device)) for key in missing)

    def arguments(self, members: Sequence[SampleSettings]) -> dict[str, Any]:
        """The call's arguments that tell it the text."""
        guided = members[0].guidance > 1
        if not self.apart:
            negative = {"negative_prompt": [one.negative for one in members]} if guided and self.has_negative else {}
            return {"prompt": [one.prompt for one in members], **negative}
        prompts, *negatives = zip(*(self._keys(one) for one in members), strict=True)
        arguments = joined([self.found[key] for key in prompts])
        for keys in negatives:
            arguments |= {NEGATIVE + name: rows for name, rows in joined([self.found[key] for key in keys]).items()}
        return _on(self.device, arguments)

    def _keys(self, one: SampleSettings) -> list[tuple[str, int | None, bool]]:
        """What the sample's prompt is found by, and its negative text where it is guided by one."""
        length = one.text_length or self.default_length
        prompt = (one.prompt, length, False)
        return (
            [prompt, (one.negative, length, self.tells_apart)] if one.guidance > 1 and self.has_negative else [prompt]
        )

    def _encode(self, text: str, length: int | None, negative: bool, device: torch.device | str) -> dict[str, Any]:
        import torch

        arguments: dict[str, Any] = {"prompt": text, "device": torch.device(device)}
        if length is not None:
            arguments["max_sequence_length"] = length
        if "do_classifier_free_guidance" in self.encode_takes:
            arguments["do_classifier_free_guidance"] = negative
        if negative:  # beside a prompt that is encoded already, and not encoded again
            arguments |= _on(device, next(found for key, found in self.found.items() if key[1:] == (length, False)))
            arguments["negative_prompt"] = text
        empty = inspect.Parameter.empty  # further words of the prompt, which some will have said to be none
        arguments |= {
            name: None
            for name, parameter in self.encode_takes.items()
            if name.startswith("prompt_") and parameter.default is empty
        }
        with torch.no_grad():
            results = self.pipeline.encode_prompt(**arguments)
        named = zip(self.returned, results, strict=True)
        found = {
            name.removeprefix(NEGATIVE): value
            for name, value in named
            if name and name.startswith(NEGATIVE) == negative
        }
        return _on("cpu", {name: _all_of(found) if value is None else value for name, value in found.items()})


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipeline).__call__).parameters)


def _on(device: torch.device | str, values: dict[str, Any]) -> dict[str, Any]:
    from accelerate.utils import send_to_device

    moved: dict[str, Any] = send_to_device(values, device)
    return moved


def joined(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of the embeddings of several texts: [1, tokens, channels], with several layers before these, [1,
    channels], a mask [1, tokens], or a list of one tensor of pipelines that pad no texts."""
    return {name: _joined([text[name] for text in texts]) for name in texts[0]}


def _joined(rows: Sequence[Any]) -> Any:
    import torch

    if not isinstance(rows[0], torch.Tensor):
        return [one for row in rows for one in row]
    batch = max(rows[0].ndim - 3, 0)  # layers, where there are several, come before it
    longest = max(row.shape[batch + 1] for row in rows)
    return torch.cat([_padded(row, batch + 1, longest) for row in rows], dim=batch)


def _padded(row: Tensor, axis: int, length: int) -> Tensor:
    """With zeros up to ``length``, as pipelines do whose texts are as long as the longest of a call."""
    import torch

    missing = list(row.shape)
    missing[axis] = length - row.shape[axis]
    return torch.cat([row, row.new_zeros(missing)], dim=axis) if missing[axis] else row


def _all_of(found: Mapping[str, Any]) -> Tensor:
    """The mask of a text none of whose tokens is padding; pipelines that have one return None for it."""
    import torch

    first = next(value for value in found.values() if value is not None)
    return torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
