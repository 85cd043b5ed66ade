"""HunyuanVideo-1.5 (Tencent Hunyuan 2025, github.com/Tencent-Hunyuan/HunyuanVideo-1.5): text- and image-to-video.

A transformer of double-stream blocks on 32-channel latents of a causal video autoencoder (4 x 16 x 16). It is told
what Qwen2.5-VL makes of the prompt in a template, refined by two blocks of its own; what ByT5 makes of words in
quotation marks, which are to be drawn; and what SigLIP makes of the first frame. 33 channels beside x_t hold that
frame's latents and their mask, zeros in text-to-video. Inputs equal those of diffusers' HunyuanVideo15Pipeline and
HunyuanVideo15ImageToVideoPipeline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config
from kinema.data.batch import Batch, Encoding, Sample
from kinema.errors import ConfigError
from kinema.families.base import Parts, Prepared
from kinema.families.hunyuan_video15_layout import NETWORK
from kinema.families.hunyuan_video15_parts import PARTS, VARIANTS
from kinema.families.latents import LATENTS, encode_pixels, pixels_of
from kinema.families.loading import Found, read_json
from kinema.families.standard import StandardFamily
from kinema.families.text import padded, warn_if_cut

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TIME_SCALE = 1000.0
"""The network takes t in [0, 1000]."""
TEXT_LENGTH = 1000
"""Tokens of text that the pipeline reads, without the template."""
TEMPLATE_TOKENS = 108
"""Tokens of the template before the text."""
PICTURE_TOKENS = 729
"""Tokens that SigLIP makes of a picture. In text-to-video the network is handed as many zeros, and hides them."""


class HunyuanVideo15(StandardFamily):
    """The HunyuanVideo-1.5 models of 8 billion parameters."""

    name = "hunyuan_video15"
    variants = VARIANTS
    parts = PARTS
    network_layout = NETWORK
    block_lists = ("context_embedder.token_refiner.refiner_blocks", "transformer_blocks")
    encoding_version = "hunyuan-video-1.5-1"
    encoded_text = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")

    def detect(self, fitting: Sequence[str], described: Mapping[str, Any], found: Found) -> str | None:
        if described:
            size = {640: "480p", 960: "720p"}.get(described.get("target_size", 0))
            base = f"{size}-{described.get('task_type')}"
            # Of the networks that are distilled from guidance the configuration is the same: the guider's tells.
            guider = found.place.parent / "guider" / "guider_config.json"
            scale = read_json(guider).get("guidance_scale", 6.0) if guider.is_file() else 6.0
            end = "-step-distilled" if described.get("use_meanflow") else "-distilled" if scale <= 1 else ""
            return base + end if base + end in self.variants else None
        # All have the same shapes; Tencent's folders and ComfyUI's files say in their names which they are.
        path = f"{found.place.parent.name}/{found.place.name}".lower()
        match = re.search(r"(480p|720p)[_-](t2v|i2v)", path)
        if match is None:
            return None
        end = "-step-distilled" if "step_distilled" in path else "-distilled" if "distilled" in path else ""
        return f"{match[1]}-{match[2]}{end}"

    @property
    def text_length(self) -> int | None:
        """The pipeline's own: captions are stored and seen without padding, so that a limit would save nothing."""
        return None

    def load(self, part: str, device: str | torch.device, dtype: torch.dtype | None) -> Any:
        loaded = super().load(part, device, dtype)
        if part == "autoencoder":
            loaded.use_slicing = True  # the mask of its attention fits one sample alone
        return loaded

    # -- data ------------------------------------------------------------------------------------------------------

    def encodings(self) -> tuple[Encoding, ...]:
        text = Encoding("text", "caption", ("text_encoder", "tokenizer"))
        glyphs = Encoding("glyphs", "caption", ("text_encoder_2", "tokenizer_2"))
        if not self.from_image:
            return text, glyphs, LATENTS
        first = Encoding("first_frame", "media", ("autoencoder",))
        return text, glyphs, LATENTS, first, Encoding("image", "media", ("image_encoder", "image_processor"))

    def encode(self, encoding: Encoding, parts: Parts, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        import torch

        with torch.no_grad():
            if encoding.name == "text":
                return [{"text": self._text(parts, sample.caption)} for sample in samples]
            if encoding.name == "glyphs":
                return [{"glyphs": self._glyphs(parts, sample.caption)} for sample in samples]
            if encoding.name == "first_frame":
                mean, _ = encode_pixels(parts["autoencoder"], pixels_of(samples)[:, :, :1])
                return [{"first_frame": row} for row in mean]
            if encoding.name == "image":
                return [{"image": self._image(parts, sample)} for sample in samples]
            return self.encode_latents(parts["autoencoder"], samples)

    def _text(self, parts: Parts, caption: str) -> Tensor:
        """Qwen2.5-VL's embeddings [tokens, C] of one caption in its template, without padding."""
        encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
        warn_if_cut(tokenizer, caption, TEXT_LENGTH)
        rows, mask = self.pipeline_class._get_mllm_prompt_embeds(
            encoder,
            tokenizer,
            caption,
            encoder.device,
            tokenizer_max_length=TEXT_LENGTH,
            crop_start=TEMPLATE_TOKENS,
        )
        return rows[0, mask[0].bool()].cpu()

    def _glyphs(self, parts: Parts, caption: str) -> Tensor:
        """ByT5's embeddings [tokens, C] of what a caption has in quotation marks; [0, C] where it has nothing."""
        encoder = parts["text_encoder_2"]
        rows, mask = self.pipeline_class._get_byt5_prompt_embeds(parts["tokenizer_2"], encoder, caption, encoder.device)
        return rows[0, mask[0].bool()].cpu()

    def _image(self, parts: Parts, sample: Sample) -> Tensor:
        """SigLIP's embeddings [tokens, C] of the first frame."""
        from PIL import Image

        assert sample.pixels is not None
        picture = Image.fromarray(sample.pixels[:, 0].permute(1, 2, 0).cpu().numpy())
        encoder = parts["image_encoder"]
        return self.pipeline_class._get_image_embeds(encoder, parts["image_processor"], picture, encoder.device)[
            0
        ].cpu()

    def prepare(self, batch: Batch, networks: Mapping[str, nn.Module] | None = None) -> Prepared:
        import torch

        latents = torch.stack(batch.tensors["latents"])
        conditioning: dict[str, Any] = {}
        for name, end in (("text", ""), ("glyphs", "_2")):
            # Padded to the longest of the batch. The pipeline pads to 1256 tokens and has the network mask them.
            rows, mask = padded(batch.tensors[name], max(len(one) for one in batch.tensors[name]))
            conditioning |= {f"encoder_hidden_states{end}": rows, f"encoder_attention_mask{end}": mask}
        told = latents.new_zeros(len(latents), 1, *latents.shape[2:])
        first = torch.zeros_like(latents)
        if self.from_image:
            told[:, :, 0] = 1
            first[:, :, :1] = torch.stack(batch.tensors["first_frame"])
            conditioning["image_embeds"] = torch.stack(batch.tensors["image"])
        conditioning["channels"] = torch.cat([first, told], dim=1)
        return Prepared(latents, conditioning)

    # -- the network -----------------------------------------------------------------------------------------------

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """``conditioning`` may tell where the step ends as ``t_end`` [B] in [0, 1], to the network that is distilled to
        few steps. Where it does not, the step ends where it begins: there a mean flow (Geng et al. 2025, arXiv
        2505.13447) is the velocity, which training is about."""
        import torch

        dtype = network.get_parameter("x_embedder.proj.weight").dtype
        # The embedding of time computes in the type of what it is given.
        time_type = torch.float32 if torch.is_autocast_enabled(x_t.device.type) else dtype
        inputs = {
            name: value if "mask" in name else value.to(dtype)
            for name, value in conditioning.items()
            if name not in ("channels", "t_end")
        }
        config: Any = network.config
        if "image_embeds" not in inputs:
            inputs["image_embeds"] = x_t.new_zeros(len(x_t), PICTURE_TOKENS, config.image_embed_dim, dtype=dtype)
        if config.use_meanflow:
            inputs["timestep_r"] = (conditioning.get("t_end", t).float() * TIME_SCALE).to(time_type)
        return network(
            hidden_states=torch.cat([x_t, conditioning["channels"].to(x_t.dtype)], dim=1).to(dtype),
            timestep=(t.float() * TIME_SCALE).to(time_type),
            **inputs,
            return_dict=False,
        )[0]

    def adapter_targets(self, part: str = "network") -> tuple[str, ...]:
        """Every linear layer of the double-stream blocks."""
        return (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
            r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)",
            r"transformer_blocks\.\d+\.(norm1|norm1_context)\.linear",
        )

    def validate(self, config: Config) -> None:
        super().validate(config)
        if self.config.text_length is not None:
            raise ConfigError(
                f"model.text_length: HunyuanVideo-1.5 reads up to {TEXT_LENGTH} tokens and sees no padding, so that a "
                "limit saves nothing. Leave the key out."
            )

    # -- sampling --------------------------------------------------------------------------------------------------

    def pipeline(self, parts: Parts) -> Any:
        """With the variant's guidance, which this pipeline keeps in an object of its own."""
        from diffusers import ClassifierFreeGuidance

        from kinema.families.hunyuan_video15_sampling import sized_pipeline

        self._guider = ClassifierFreeGuidance(guidance_scale=self.variant.sampling.guidance)
        kind = sized_pipeline() if self.from_image else self.pipeline_class
        return kind(**self.pipeline_modules(parts), guider=self._guider)

    def sampling_arguments(self, guidance: float, pictures: Sequence[Any], text_length: int | None) -> dict[str, Any]:
        self._guider.guidance_scale = guidance  # 1 turns it off
        return {"image": pictures[0]} if self.from_image else {}

    @classmethod
    def tiny(cls, directory: Path, variant: str, seed: int = 0) -> Path:
        from kinema.families.hunyuan_video15_tiny import write_tiny

        return write_tiny(directory, cls.variants[variant], seed)
