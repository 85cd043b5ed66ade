"""Sampling with OmniGen2: text, and up to five reference pictures, to a picture.

diffusers has no pipeline for it; this one follows the protocol of its pipelines, and computes what the authors' does
(github.com/VectorSpaceLab/OmniGen2, ``omnigen2/pipelines/omnigen2``; tests/golden/omnigen2 holds what theirs gave).
Differences: pictures are encoded to the mean of the autoencoder's posterior, where theirs draws from it without a
generator; time and the noisy latents stay in float32, where theirs have the type of the weights; a size that is asked
for is made, where theirs takes that of a single reference and makes no more than a million pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kinema.errors import UserError
from kinema.networks.prompt_pairs import prompt_pairs

TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant that generates high-quality images based on user instructions."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
)
"""What Qwen2.5-VL reads: its chat format without the beginning of an answer."""
TEXT_LENGTH = 1024
"""Tokens of text, with the template, that the authors sample with at most."""
REFERENCE_PIXELS = 1024 * 1024
"""Pixels to which reference pictures are brought down."""
REFERENCE_SIDE = 1024
"""Their longest side."""
DEFAULT_SIDE = 1024
GRID = 16
SHIFT_BASE = 40.0
"""Side, in latents, of the picture whose times are not shifted."""

Text = tuple[Tensor, Tensor | None]
"""Embeddings [B, L, C], and the mask [B, L] of what is text; None: all is."""
References = list[list[Tensor]] | None
"""Of each sample, latents [C, h, w] of its reference pictures; None: no sample has one."""


def reference_size(
    height: int, width: int, max_pixels: int = REFERENCE_PIXELS, max_side: int = REFERENCE_SIDE
) -> tuple[int, int]:
    """(height, width) at which a reference picture of this size is encoded: never enlarged, whole tokens."""
    ratio = min(math.sqrt(max_pixels / (height * width)), max_side / max(height, width), 1.0)
    new_height, new_width = (max(1, int(side * ratio) // GRID) * GRID for side in (height, width))
    return new_height, new_width


def _padded(rows: list[Tensor], device: torch.device) -> Text:
    """Embeddings [tokens, C] of each text as one batch."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    whole = pad_sequence([row.to(device) for row in rows], batch_first=True)
    return whole, None if bool(mask.all()) else mask.to(device)


class OmniGen2Pipeline(DiffusionPipeline):
    """The parts by the names of the published directory.

    ``processor``: Qwen2.5-VL's, or its tokenizer alone. ``scheduler``: a FlowMatchEulerDiscreteScheduler; where it
    shifts dynamically, by sqrt(h w) / 40 for h x w latents, as the authors do. Parts that a call does not use may be
    None.
    """

    model_cpu_offload_seq = "mllm->transformer->vae"
    text_encoders = ("mllm",)
    """Components that are used before denoising begins, besides those named ``text_encoder*``."""
    _callback_tensor_inputs = ("latents",)

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, mllm: Any, processor: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, mllm=mllm, processor=processor)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 * self.vae_scale_factor, do_convert_rgb=True)

    # -- text and pictures -----------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        max_sequence_length: int = TEXT_LENGTH,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Embeddings [tokens, C] of every prompt and of its negative one (None without guidance), without padding.

        The last hidden states, normalised, of every token of the template around a text; what is beyond
        ``max_sequence_length`` tokens is cut, the template's end first. Every text is encoded alone. One negative text
        serves all prompts.
        """
        place = torch.device(device or self._execution_device)
        return prompt_pairs(
            lambda text: self._embed(text, place, max_sequence_length),
            prompt,
            negative_prompt,
            do_classifier_free_guidance,
            prompt_embeds,
            negative_prompt_embeds,
        )

    def _embed(self, text: str, device: torch.device, length: int) -> Tensor:
        tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        tokens = tokenizer(TEMPLATE.format(text), max_length=length, truncation=True, return_tensors="pt")
        inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        # The model inside, without the logits of its head: they are large and not used.
        return self.mllm.model(**inputs).last_hidden_state[0]

    def encode_references(
        self, pictures: Sequence[Image.Image], max_pixels: int = REFERENCE_PIXELS, max_side: int = REFERENCE_SIDE
    ) -> list[Tensor]:
        """Normalised latents [C, h, w] of each picture, at its `reference_size`."""
        config = self.vae.config
        latents = []
        for picture in pictures:
            height, width = reference_size(picture.height, picture.width, max_pixels, max_side)
            pixels = self.image_processor.preprocess(picture, height, width)
            place = get_module_execution_device(self.vae)
            mean = self.vae.encode(pixels.to(place, self.vae.dtype)).latent_dist.mean[0]
            latents.append((mean - (config.shift_factor or 0.0)) * config.scaling_factor)
        return latents

    # -- sampling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        image_guidance_scale: float = 2.0,
        max_pixels: int = REFERENCE_PIXELS,
        max_input_image_side_length: int = REFERENCE_SIDE,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        max_sequence_length: int = TEXT_LENGTH,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw one picture for each prompt.

        Args:
            prompt, negative_prompt: texts; one negative text serves all prompts. None: "".
            image: the reference pictures of every prompt, five at most.
            height, width: of the result, multiples of 16. Default: those of a single reference, else 1024.
            guidance_scale: how far to go from the negative text to the prompt; up to 1 there is no guidance.
            image_guidance_scale: how far to go, with guidance, from no reference pictures to these.
            max_pixels, max_input_image_side_length: what reference pictures are brought down to.
            latents: the noise [B, C, height / 8, width / 8] to start from.
            prompt_embeds, negative_prompt_embeds: [tokens, C] of each text, instead of the texts.
            max_sequence_length: tokens of text, with the template.
            output_type: "pil", "np", "pt" or "latent" (normalised latents).
            callback_on_step_end: called with (pipeline, step, time * 1000, tensors) after each step; may return
                ``latents`` to go on from.

        Returns:
            An ImagePipelineOutput, or a tuple of the pictures alone.

        Raises:
            UserError: a size, or more text and references, than the model takes.
        """
        pictures = [image] if isinstance(image, Image.Image) else list(image or ())
        device = self._execution_device
        embeds, negative_embeds = self.encode_prompt(
            prompt,
            guidance_scale > 1.0,
            negative_prompt,
            device,
            prompt_embeds,
            negative_prompt_embeds,
            max_sequence_length,
        )
        text = _padded(embeds, device)
        negative = None if negative_embeds is None else _padded(negative_embeds, device)
        count = len(embeds)
        encoded = self.encode_references(pictures, max_pixels, max_input_image_side_length)
        references = [[one.to(device) for one in encoded]] * count if encoded else None
        if len(pictures) == 1 and height is None and width is None:
            height, width = reference_size(
                pictures[0].height, pictures[0].width, max_pixels, max_input_image_side_length
            )
        size = self._latent_size(height or DEFAULT_SIDE, width or DEFAULT_SIDE)
        shape = (count, self.transformer.config.in_channels, *size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = latents.to(device, torch.float32)
        assert x.shape == shape, f"latents are {tuple(x.shape)}, not {shape}"

        self._set_times(num_inference_steps, size, device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, time in enumerate(self.scheduler.timesteps):
                data_share = (1 - self.scheduler.sigmas[i]).to(device).expand(count)
                predicted = self._guided(
                    x, data_share, text, negative, references, guidance_scale, image_guidance_scale
                )
                # The network predicts x_0 - eps, the scheduler integrates eps - x_0.
                x = self.scheduler.step(-predicted, time, x, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {name: {"latents": x}[name] for name in callback_on_step_end_tensor_inputs}
                    x = callback_on_step_end(self, i, time, tensors).pop("latents", x)
                bar.update()
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        if height % GRID or width % GRID or min(height, width) < GRID:
            raise UserError(f"OmniGen2 makes pictures whose sides are multiples of {GRID}, not {height} x {width}.")
        return height // self.vae_scale_factor, width // self.vae_scale_factor

    def _set_times(self, steps: int, size: tuple[int, int], device: torch.device) -> None:
        """Equal steps from 1 to 0, shifted by the size of the latents where the scheduler says so."""
        mu = None
        if self.scheduler.config.use_dynamic_shifting:
            mu = math.log(math.sqrt(size[0] * size[1]) / SHIFT_BASE)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), device=device, mu=mu)
        self.scheduler.set_begin_index(0)

    def _guided(
        self,
        x: Tensor,
        data_share: Tensor,
        text: Text,
        negative: Text | None,
        references: References,
        text_scale: float,
        image_scale: float,
    ) -> Tensor:
        """x_0 - eps after guidance. With n the prediction for the negative text and no references, r for the negative
        text with them, and c for all: n + image_scale (r - n) + text_scale (c - r); n + text_scale (c - n) where there
        are no references or ``image_scale`` is at most 1."""

        dtype = next(p.dtype for name, p in self.transformer.named_parameters() if "x_embedder" in name)

        def predict(told: Text, refs: References) -> Tensor:
            embeds, mask = told
            predicted = self.transformer(
                hidden_states=x.to(dtype),
                timestep=data_share,
                text_hidden_states=embeds.to(dtype),
                text_attention_mask=mask,
                ref_image_hidden_states=refs and [[one.to(dtype) for one in own] for own in refs],
                return_dict=False,
            )[0]
            return predicted.float()

        told_all = predict(text, references)
        if negative is None:
            return told_all
        if references is None or image_scale <= 1.0:
            told_nothing = predict(negative, None)
            return told_nothing + text_scale * (told_all - told_nothing)
        told_pictures = predict(negative, references)
        told_nothing = predict(negative, None)
        return told_nothing + image_scale * (told_pictures - told_nothing) + text_scale * (told_all - told_pictures)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(pixels, output_type=output_type)
