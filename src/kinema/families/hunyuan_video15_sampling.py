"""Image-to-video at the size that is asked for: diffusers' pipeline takes a size of its own, by the picture's shape."""

from __future__ import annotations

import inspect
from typing import Any


def sized_pipeline() -> Any:
    """HunyuanVideo15ImageToVideoPipeline whose call takes ``height`` and ``width`` too."""
    from diffusers import HunyuanVideo15ImageToVideoPipeline

    class SizedImageToVideoPipeline(HunyuanVideo15ImageToVideoPipeline):
        def __call__(self, *args: Any, height: int | None = None, width: int | None = None, **kwargs: Any) -> Any:
            processor: Any = self.video_processor
            if height is not None and width is not None:
                processor.calculate_default_height_width = lambda **_: (height, width)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                vars(processor).pop("calculate_default_height_width", None)

    # who asks what the call takes sees diffusers' own arguments too
    own = inspect.signature(HunyuanVideo15ImageToVideoPipeline.__call__)
    sizes = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("height", "width")]
    signature = own.replace(parameters=[*own.parameters.values(), *sizes])
    SizedImageToVideoPipeline.__call__.__signature__ = signature  # type: ignore[attr-defined]
    return SizedImageToVideoPipeline
