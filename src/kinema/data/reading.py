"""What encoders get of an item: the pixels of its clip, its control pictures, its mask; decoded, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kinema.errors import UserError

from .batch import Encoding, Sample
from .buckets import Clip
from .encode import MASK, Encoder
from .facts import PROBED, FactStore, info_from_text, info_to_text
from .items import Item
from .masks import check_mask, decode_mask
from .media import decode_clip, memo_key, probe
from .records import MediaError, MediaInfo
from .transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Decoded:
    """As far as it was asked for."""

    pixels: Tensor | None = None
    """uint8 [C, T, H, W]."""
    controls: tuple[Tensor, ...] = ()
    """uint8 [C, 1, H, W] each."""
    mask: Tensor | None = None
    """uint8 [1, 1 or T, H, W]."""
    size: tuple[int, int] | None = None
    """Height and width of what the clip was scaled from: the file as shown, or the record's crop of it."""
    problem: MediaError | None = None
    """Why the rest is but a stand-in; see `stand_in`."""


def info_of(location: str, facts: FactStore | None) -> MediaInfo:
    """`probe`, remembered in ``facts``."""
    if facts is None:
        return probe(location)
    key = f"{PROBED}\0{memo_key(location)}"
    if (text := facts.get(key)) is not None:
        return info_from_text(text)
    info = probe(location)
    facts[key] = info_to_text(info)
    return info


def read_item(item: Item, encodings: Sequence[Encoding], facts: FactStore | None) -> Decoded:
    """Decode what these encodings of an item read. MediaError where a file is damaged or gone."""
    try:
        return _read_item(item, encodings, facts)
    except (UserError, AssertionError, MemoryError):
        raise
    except Exception as error:  # a decoder's own failure on a hostile file must not end the run
        what = f"could not be decoded ({type(error).__name__}: {error}): take it out, and report this"
        raise MediaError(f"{item.record.path} {what}", "unreadable") from error


def _read_item(item: Item, encodings: Sequence[Encoding], facts: FactStore | None) -> Decoded:
    from torch import from_numpy

    record, bucket, clip = item.record, item.bucket, item.clip
    transform = Transform(bucket.height, bucket.width, crop=record.crop)
    result = Decoded()
    wants_mask = MASK in encodings
    if wants_mask or any(one.reads_pixels for one in encodings):
        info = info_of(record.path, facts)
        if any(one.reads_pixels for one in encodings if one is not MASK):
            size = (info.height, info.width)
            if record.crop is not None:
                left, top, right, bottom = record.crop
                size = (min(bottom, info.height) - top, min(right, info.width) - left)
            result = replace(result, pixels=from_numpy(decode_clip(record.path, clip, transform, info)), size=size)
        if wants_mask:
            assert record.mask is not None
            check_mask(record.mask, info)
            result = replace(result, mask=from_numpy(decode_mask(record.mask, clip, transform, info)))
    if any(one.controls for one in encodings):
        plain = Transform(bucket.height, bucket.width)
        controls = tuple(from_numpy(decode_clip(path, Clip(), plain)) for path in record.controls)
        result = replace(result, controls=controls)
    return result


def stand_in(item: Item, problem: MediaError) -> Decoded:
    """Black pixels in the place of files that cannot be read: a batch must have its shape."""
    from torch import uint8, zeros

    frames, height, width = item.bucket.frames, item.bucket.height, item.bucket.width
    controls = tuple(zeros((3, 1, height, width), dtype=uint8) for _ in item.record.controls)
    return Decoded(
        zeros((3, frames, height, width), dtype=uint8), controls, zeros((1, 1, height, width), dtype=uint8),
        (height, width), problem,
    )  # fmt: skip


def encode_one(
    encoder: Encoder, encoding: Encoding, parts: dict[str, Any], decoded: Decoded, caption: str
) -> dict[str, Tensor]:
    """The tensors of one encoding of one item."""
    import torch

    if encoding is MASK:
        assert decoded.mask is not None
        return {"mask": decoded.mask}
    pixels = decoded.pixels if encoding.reads_pixels else None
    controls = decoded.controls if encoding.controls else ()
    sample = Sample(
        caption if encoding.reads_caption else "", pixels, controls, None if pixels is None else decoded.size
    )
    with torch.no_grad():
        (tensors,) = encoder.encode(encoding, parts, [sample])
    return tensors
