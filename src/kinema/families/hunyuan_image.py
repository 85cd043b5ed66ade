"""HunyuanImage-2.1 (Tencent Hunyuan 2025, github.com/Tencent-Hunyuan/HunyuanImage-2.1): text-to-image.

A transformer on the latents of a picture autoencoder (32 x 32, 64 channels), each a token: first blocks with weights of
their own for text and picture, then blocks that see both as one sequence. Text is what Qwen2.5-VL makes of a prompt
template, refined by two blocks; words in quotation marks, which are to be drawn, pass ByT5 besides. The distilled
variant is told a guidance scale and, as a mean flow (Geng et al. 2025, arXiv 2505.13447), where the step will end.
Inputs equal those of diffusers' HunyuanImagePipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError, UserError
from kinema.families.base import Parts, Prepared, SamplingDefaults, Variant
from kinema.families.hunyuan_image_layout import NETWORK, autoencoder_from_original, network_from_original
from kinema.families.latents import LATENTS
from kinema.families.loading import Found, PartSpec
from kinema.families.parts import (
    BYT5,
    BYT5_TOKENIZER,
    QWEN25_TOKENIZER,
    QWEN25_VL,
    SCHEDULER,
)
from kinema.families.standard import StandardFamily
from kinema.families.tensors import NETWORK_INSIDE, looks_like, tensor_shapes
from kinema.families.text import padded, warn_if_cut

if TYPE_CHECKING:
    from torch import Tensor, nn

TIME_SCALE = 1000.0
"""The network takes t, the end of a step and the guidance scale times 1000."""
TRAINING_GUIDANCE = 1.0
"""The guidance scale that training tells the distilled network: 1, at which it shows the data, not a guided version."""
OCR_GUIDANCE_START = 38
"""The step from which guidance is projected where words are drawn; 5 elsewhere (Tencent's pipeline)."""

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:HunyuanImageTransformer2DModel",
        to_ours=network_from_original,
        inside=(*NETWORK_INSIDE, "model.model."),
    ),
    "autoencoder": PartSpec(
        "autoencoder (HunyuanImage-2.1)",
        "vae",
        "diffusers:AutoencoderKLHunyuanImage",
        to_ours=autoencoder_from_original,
        inside=("vae.",),
    ),
    "text_encoder": QWEN25_VL,
    "tokenizer": QWEN25_TOKENIZER,
    "text_encoder_2": BYT5,
    "tokenizer_2": BYT5_TOKENIZER,
    "scheduler": SCHEDULER,
}


def _variant(name: str, parameters: int, hub: str, steps: int, guidance: float, shift: float) -> Variant:
    return Variant(
        name,
        "image",
        parameters,
        tuple(PARTS),
        f"hunyuanvideo-community/{hub}",
        SamplingDefaults(height=2048, width=2048, frames=1, steps=steps, guidance=guidance),
        pipeline="HunyuanImagePipeline",
        grid=32,
        patch=(1, 1, 1),
        shift=shift,  # the authors' for sampling, so that training spends its steps on the times that sampling visits
    )


VARIANTS = {
    variant.name: variant
    for variant in (
        _variant("base", 17_425_795_520, "HunyuanImage-2.1-Diffusers", 50, 3.5, 5.0),
        _variant("distilled", 17_453_334_976, "HunyuanImage-2.1-Distilled-Diffusers", 8, 3.25, 4.0),
    )
}


class HunyuanImage(StandardFamily):
    """The HunyuanImage-2.1 models: the base, and the one distilled to eight steps without classifier-free guidance."""

    name = "hunyuan_image"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    encoding_version = "hunyuan-image-1"
    encoded_text = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    options = ("guidance",)
    batched_sampling = False  # the pipeline guides all of a call alike if any of its prompts has words to draw

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if described:
            return super().detect(fitting, described, found)
        names = " ".join(shapes := tensor_shapes(found.files))
        if "byt5_in.fc1." not in names and "context_embedder_2." not in names:
            raise UserError(
                f"{found.key}: {found.place} looks like {looks_like(shapes)}, not the network of HunyuanImage-2.1, "
                "which has a part for ByT5's text. Give the right file, or a diffusers directory."
            )
        return "distilled" if "time_r_in." in names or "timestep_embedder_r." in names else "base"

    @property
    def distilled(self) -> bool:
        """Whether the network is told a guidance scale and the end of the step."""
        return self.variant.name == "distilled"

    @property
    def text_length(self) -> int | None:
        """The pipeline's own: captions are stored and seen without padding, so that a limit would save nothing."""
        return None

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"))
        return (text, Encoding("glyphs", "caption", ("text_encoder_2", "tokenizer_2")), LATENTS)

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            if encoding.name == "glyphs":
                return [{"glyphs": self._glyphs(parts, sample.caption)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """Qwen2.5-VL's embeddings [tokens, C] of one caption, without padding: the network masks it."""
        pipeline = self.text_pipeline(parts)
        encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
        start, length = pipeline.prompt_template_encode_start_idx, pipeline.tokenizer_max_length
        warn_if_cut(tokenizer, caption, length + start, pipeline.prompt_template_encode.format(caption))
        rows, mask = pipeline._get_qwen_prompt_embeds(
            tokenizer,
            encoder,
            caption,
            device=encoder.get_input_embeddings().weight.device,
            tokenizer_max_length=length,
            template=pipeline.prompt_template_encode,
            drop_idx=start,
        )
        return rows[mask.bool()].cpu()

    def _glyphs(self, parts: Parts, caption: str) -> Tensor:
        """ByT5's embeddings [tokens, C] of what a caption has in quotation marks; none where it has nothing."""
        from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

        encoder, tokenizer = parts["text_encoder_2"], parts["tokenizer_2"]
        drawn = extract_glyph_text(caption)
        if drawn is None:
            return encoder.get_input_embeddings().weight.new_zeros(0, encoder.config.d_model, device="cpu")
        pipeline = self.text_pipeline(parts)
        warn_if_cut(tokenizer, caption, pipeline.tokenizer_2_max_length, drawn)
        rows, mask = pipeline._get_byt5_prompt_embeds(
            tokenizer,
            encoder,
            drawn,
            device=encoder.get_input_embeddings().weight.device,
            tokenizer_max_length=pipeline.tokenizer_2_max_length,
        )
        return rows[mask.bool()].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        conditioning: dict[str, Any] = {}
        for name, end in (("text", ""), ("glyphs", "_2")):
            # Padded to the longest of the batch. The pipeline pads to 1128 tokens in all, as many as a picture of 1024
            # pixels a side has, and has the network mask them.
            rows, mask = padded(batch.tensors[name], max(len(one) for one in batch.tensors[name]))
            conditioning |= {f"encoder_hidden_states{end}": rows, f"encoder_attention_mask{end}": mask}
        return Prepared(torch.stack(batch.tensors["latents"]), conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """``conditioning`` may tell where the step ends as ``t_end`` [B] in [0, 1]. Where it does not, it ends where it
        begins: there a mean flow is the velocity, which training is about."""
        import torch

        dtype = network.get_submodule("x_embedder.proj").weight.dtype
        # The embedding of time computes in the type of what it is given.
        time_type = torch.float32 if torch.is_autocast_enabled(x_t.device.type) else dtype
        told: dict[str, Any] = {"timestep": (t.float() * TIME_SCALE).to(time_type)}
        if self.distilled:
            scale = TRAINING_GUIDANCE if self.config.guidance is None else self.config.guidance
            told["guidance"] = torch.full_like(told["timestep"], scale * TIME_SCALE)
            told["timestep_r"] = (conditioning.get("t_end", t).float() * TIME_SCALE).to(time_type)
        for end in ("", "_2"):
            told[f"encoder_hidden_states{end}"] = conditioning[f"encoder_hidden_states{end}"].to(dtype)
            told[f"encoder_attention_mask{end}"] = conditioning[f"encoder_attention_mask{end}"]
        return network(hidden_states=x_t[:, :, 0].to(dtype), **told, return_dict=False)[0][:, :, None]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the blocks."""
        return (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
            r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
            r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if self.config.text_length is not None:
            raise ConfigError(
                "model.text_length: HunyuanImage reads up to 1000 tokens and sees no padding, so that a limit saves "
                "nothing. Leave the key out."
            )
        if self.config.guidance is not None and not self.distilled:
            raise ConfigError(
                f"model.guidance: the network of {self.variant.name} is not told a guidance scale. Leave the key out, "
                "or use the variant distilled."
            )

    # -- sampling --------------------------------------------------------------------------------------------------

    def pipeline(self, parts: Parts) -> Any:
        """With the published guidance, which this pipeline keeps in objects of its own."""
        from diffusers import AdaptiveProjectedMixGuidance

        pipeline = super().pipeline(parts)
        if not self.distilled:
            self._guiders = (
                AdaptiveProjectedMixGuidance(),
                AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=OCR_GUIDANCE_START),
            )
            pipeline.register_modules(guider=self._guiders[0], ocr_guider=self._guiders[1])
        return pipeline

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        if self.distilled:
            return {"distilled_guidance_scale": guidance}
        for guider in self._guiders:
            guider.guidance_scale = guidance
            (guider.enable if guidance > 1 else guider.disable)()
        return {}

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.hunyuan_image_tiny import write_tiny

        shift = cls.variants[variant].shift
        assert shift != "resolution"
        return write_tiny(directory, variant == "distilled", shift, seed)
