"""Small Qwen-Image models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import qwen25_vl, qwen25_vl_processor, spread, tiny_seed, write_directory

TEXT_DIM = 32


def write_tiny(directory: Path, pipeline: str, zero_cond_t: bool, seed: int) -> Path:
    """Write the diffusers directory of a tiny model for this pipeline class; returns the directory.

    ``zero_cond_t``: control pictures are modulated as at time 0, as in the release 2511.
    """
    import diffusers

    # The templates are learnt, so that what the pipelines cut off at their beginning is what they mean to.
    texts = (_template("QwenImagePipeline"), _template("QwenImageEditPlusPipeline"), "Picture 1: ")
    processor = qwen25_vl_processor(texts)
    modules: dict[str, Any] = {
        "tokenizer": processor.tokenizer,
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            use_dynamic_shifting=True,
        ),
    }
    if pipeline != "QwenImagePipeline":
        modules["processor"] = processor
    with tiny_seed(seed):
        modules["text_encoder"] = qwen25_vl(processor.tokenizer, TEXT_DIM)
        # The widths of the published one divided by 24: the same shortcuts, resamplers and attention.
        modules["vae"] = spread(diffusers.AutoencoderKLQwenImage(base_dim=4).eval())
        modules["transformer"] = spread(
            diffusers.QwenImageTransformer2DModel(
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=zero_cond_t,
            ).eval()
        )
    return write_directory(directory, getattr(diffusers, pipeline)(**modules))


def _template(pipeline: str) -> str:
    """The prompt template of a pipeline class, which it sets when it is made."""
    import diffusers

    empty = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"))
    if pipeline == "QwenImagePipeline":
        del empty["processor"]
    return getattr(diffusers, pipeline)(**empty).prompt_template_encode
