"""Image-to-video at the size that is asked for: diffusers' pipeline takes a size of its own, by the picture's shape."""

from __future__ import annotations

from typing import Any


def sized_pipeline() -> Any:
    """HunyuanVideo15ImageToVideoPipeline whose call takes ``height`` and ``width`` too."""
    from diffusers import HunyuanVideo15ImageToVideoPipeline

    class SizedImageToVideoPipeline(HunyuanVideo15ImageToVideoPipeline):
        def __call__(
            self,
            image: Any,
            prompt: Any = None,
            negative_prompt: Any = None,
            height: int | None = None,
            width: int | None = None,
            num_frames: int = 121,
            num_inference_steps: int = 50,
            generator: Any = None,
            output_type: str | None = "np",
            return_dict: bool = True,
            **others: Any,
        ) -> Any:
            processor: Any = self.video_processor
            if height is not None and width is not None:
                processor.calculate_default_height_width = lambda **_: (height, width)
            try:
                return super().__call__(
                    image,
                    prompt,
                    negative_prompt,
                    num_frames=num_frames,
                    num_inference_steps=num_inference_steps,
                    generator=generator,
                    output_type=output_type,
                    return_dict=return_dict,
                    **others,
                )
            finally:
                vars(processor).pop("calculate_default_height_width", None)

    return SizedImageToVideoPipeline
