"""Pictures and short animations (GIF, WebP, APNG), read through Pillow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .files import local_path, open_binary
from .records import MediaError, MediaInfo

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**28
"""The largest picture that is read (268 megapixels: 0.8 GB as RGB); what claims more is refused unread."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000", "PPM", "DIB", "ICO")
"""What Pillow may try: formats with a signature, and none (such as EPS) that runs another program."""
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")


@contextmanager
def open_picture(location: str) -> Iterator[Image.Image | None]:
    """The opened picture (header read, pixels not yet), or None where the content is no picture.

    Raises MediaError for a picture that is too large or whose header or pixels turn out damaged.
    """
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own guard counts tiles and canvases too
    Image.init()
    path = local_path(location)
    try:
        with (
            nullcontext(path) if path is not None else open_binary(location) as file,
            Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise too_large(location, f"{image.width}x{image.height}")
            yield image
    except UnidentifiedImageError:
        yield None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(location, str(error)) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(
            f"{location} is a picture that cannot be read ({_short(error)}): "
            "the file is damaged or cut short; fetch it again or take it out",
            "unreadable picture",
        ) from error


def too_large(location: str, size: str) -> MediaError:
    return MediaError(
        f"{location} is too large ({size}; at most {MAX_PIXELS // 10**6} megapixels are read): scale it",
        "picture too large",
    )


def probe_picture(image: Image.Image, decode: bool) -> MediaInfo:
    """What an opened picture or animation holds. With ``decode`` its pixels are read too, to find damage."""
    if image.format in ANIMATED and getattr(image, "n_frames", 1) > 1:
        return _probe_animation(image)
    width, height = image.size
    if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # orientations that lie on their side
        width, height = height, width
    pixel_format = image.mode
    if decode:
        image.load()
    return MediaInfo("image", width, height, pixel_format=pixel_format)


def _probe_animation(image: Image.Image) -> MediaInfo:
    times, end = [], Fraction(0)
    notes: tuple[str, ...] = ()
    pixel_format = image.mode
    try:
        for time, duration in _walk(image):
            times.append(time)
            end = time + duration
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if not times:
            raise
        notes = (f"damaged after frame {len(times)} ({_short(error)}): only the frames before are used",)
    fps = len(times) / float(end)
    even = all(abs(float(t) - i / fps) < 0.5 / fps for i, t in enumerate(times))
    return MediaInfo(
        "video", image.width, image.height, len(times), fps, float(end), float(times[-1]),
        pixel_format=pixel_format, variable=not even, notes=notes,
    )  # fmt: skip


def _walk(image: Image.Image) -> Iterator[tuple[Fraction, Fraction]]:
    """Step through an animation: (start, duration) of each frame in seconds, the image showing that frame."""
    time = Fraction(0)
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()
        milliseconds = image.info.get("duration", 0) or 0
        if milliseconds <= 10:
            milliseconds = 100  # as browsers show frames that name no usable duration
        duration = Fraction(milliseconds).limit_denominator(1000) / 1000
        yield time, duration
        time += duration


def read_animation(image: Image.Image) -> Iterator[tuple[Fraction, Image.Image]]:
    """The frames of an animation with their times in seconds."""
    for time, _ in _walk(image):
        yield time, image.copy()


def to_rgb(image: Image.Image, background: int = 255, profiled: bool = True) -> Image.Image:
    """8-bit sRGB of any picture: upright, deep greys scaled, colour profile applied (unless ``profiled`` is False),
    transparency on white or another grey ``background``."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile") if profiled else None
    if image.mode.startswith("I") or image.mode == "F":
        image = _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colours = image.convert("RGBA")
        under = Image.new("RGBA", colours.size, (background, background, background, 255))
        image = Image.alpha_composite(under, colours).convert("RGB")
    return _to_srgb(image, profile)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greys as 8-bit: 16-bit by 257, float from [0, 1] unless it holds larger
    values."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    else:
        scale = 1.0 / 257 if image.mode != "I" or values.max(initial=0.0) > 255 else 1.0
    return Image.fromarray(np.clip(np.nan_to_num(values) * scale + 0.5, 0, 255).astype(np.uint8), "L")


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """RGB in sRGB. A profile that cannot be applied (damaged, or of another mode) is set aside."""
    from PIL import features

    plain = image.convert("RGB")
    if profile and image.mode in ("RGB", "CMYK") and features.check("littlecms2"):
        import io

        from PIL import ImageCms

        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except ImageCms.PyCMSError:
            return plain
    return plain


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
