"""The processor of Qwen2.5-VL without torchvision: its own class, around the image processor that works with Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.errors import UserError
from kinema.families.loading import read_json


def assemble_qwen_processor(tokenizer: Any, image_processor: Any, chat_template: str | None = None) -> Any:
    """A Qwen2_5_VLProcessor for text and pictures; it makes of them what the one with torchvision does.

    Its class insists on a video processor, which needs torchvision. No diffusion model shows it a video.
    """
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    processor = Qwen2_5_VLProcessor.__new__(Qwen2_5_VLProcessor)
    processor.get_attributes = lambda: ["image_processor", "tokenizer"]
    Qwen2_5_VLProcessor.__init__(processor, image_processor, tokenizer, None, chat_template)
    return processor


def load_qwen_processor(place: Path) -> Any:
    """The processor whose files lie in ``place``: a tokenizer's, and ``preprocessor_config.json`` or
    ``processor_config.json``. UserError if there is neither of the two."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = _image_settings(place)
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    return assemble_qwen_processor(tokenizer, Qwen2VLImageProcessorPil(**settings), tokenizer.chat_template)


def _image_settings(place: Path) -> dict[str, Any]:
    """Settings of the image processor; transformers 5 keeps them inside the processor's own file."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (place / name).is_file():
            settings = read_json(place / name)
            settings = settings.get("image_processor", settings)
            return {key: value for key, value in settings.items() if value is not None and key not in _NOT_SETTINGS}
    raise UserError(
        f"{place} holds no preprocessor_config.json: it is no processor of Qwen2.5-VL. Give the folder `processor` of "
        "the model, or a directory of Qwen2.5-VL itself."
    )


_NOT_SETTINGS = ("image_processor_type", "processor_class", "feature_extractor_type", "auto_map")
