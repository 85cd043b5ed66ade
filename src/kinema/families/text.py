"""Text that families share: captions that are too long, embeddings that are stored without their padding."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def warn_if_cut(tokenizer: Any, caption: str, length: int, text: str | None = None) -> None:
    """Warn how many tokens of a caption are lost if the encoder sees ``length`` of them.

    ``text``: what is tokenized, where a template surrounds the caption; ``length`` then counts the template too.
    """
    count = len(tokenizer(caption if text is None else text).input_ids)
    if count > length:
        log.warning("a caption has %d tokens, the last %d are cut: %.60s...", count, count - length, caption)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of diffusers' pipelines, which repeat every caption that CLIP or another encoder cuts."""
    logger = logging.getLogger("diffusers.pipelines")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def padded(rows: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Embeddings [tokens, C] of each sample stacked to [B, length, C], with zeros after the end, and the mask
    [B, length] (bool) of what is text."""
    import torch

    stacked = rows[0].new_zeros(len(rows), length, rows[0].shape[-1])
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=stacked.device)
    for i, row in enumerate(rows):
        stacked[i, : len(row)] = row
        mask[i, : len(row)] = True
    return stacked, mask
