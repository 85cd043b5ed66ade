"""Sampling with Open-Sora: text, and frames that are given, to a video of any length.

diffusers has no pipeline for it; this one follows the protocol of its pipelines and computes what the authors' sampler
does (github.com/hpcaitech/Open-Sora, version 2.0; tests/golden/open_sora holds what theirs gives). Differences, each on
purpose: passes of the network that cancel are left out (two instead of three without given frames); frames that are
given are put back into every sample, where theirs does so in the first of a batch, and for pictures alone; pictures are
encoded to the mean of the autoencoder's posterior, so that the same settings give the same sample; time stays in
float32; every sample has noise of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from kinema.errors import UserError
from kinema.families.open_sora_conditions import latent_frames_of
from kinema.families.open_sora_denoise import Text, denoise, predictor
from kinema.families.open_sora_references import given_frames, references_of
from kinema.families.open_sora_request import overlap_of
from kinema.families.open_sora_schedule import Guidance, schedule
from kinema.families.open_sora_strategy import Given, parse_strategy
from kinema.families.open_sora_video import Reference, decode_latents, is_causal
from kinema.families.resolutions import size
from kinema.families.steering import FULL_STEPS
from kinema.families.text import warn_if_cut
from kinema.networks.prompt_pairs import prompt_pairs
from kinema.randomness import derive_seed

TEXT_LENGTH = 512
"""Tokens of T5's text, padding included, that the network was trained with."""


@dataclass
class OpenSoraPipelineOutput(BaseOutput):  # type: ignore[misc]
    frames: Any
    """Videos: "pt" [B, T, 3, H, W] and "np" [B, T, H, W, 3] in [0, 1], "pil" lists, "latent" [B, C, t, h, w]."""


class OpenSoraPipeline(DiffusionPipeline):
    """The parts by the names of a diffusers directory: CLIP and T5 as in Flux.

    ``transformer``: an `kinema.networks.open_sora.OpenSoraTransformer`. ``vae``: AutoencoderKLHunyuanVideo, or a
    `kinema.networks.dc_ae.VideoDCAE`. ``scheduler``: its ``shift`` holds for every size, unless its
    ``use_dynamic_shifting`` says that times shift with the size (the default); nothing else of it is read. Text
    encoders may be None where a call is given embeddings. A network with a guidance embedding is taken as distilled:
    it is told the scale, in one pass a step.

    >>> video = pipeline("a red ball rolls to the left. 24 FPS. 4 motion score.", height=192, width=336, seed=0)
    >>> longer = pipeline.extend(video.frames, stretches=2, prompt="it goes on. 24 FPS. 4 motion score.")
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.video_processor = VideoProcessor()

    # -- text ------------------------------------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        device: torch.device | str | None = None,
        prompt_embeds: list[Text] | None = None,
        negative_prompt_embeds: list[Text] | None = None,
        max_sequence_length: int = TEXT_LENGTH,
    ) -> tuple[list[Text], list[Text] | None]:
        """What the network is told of every prompt, and of its negative text (None without guidance).

        Every text is encoded alone, and padded to ``max_sequence_length`` tokens, which T5 and the network attend to.
        One negative text serves all prompts; none at all is the empty one.
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

    @torch.no_grad()
    def _embed(self, text: str, device: torch.device, length: int) -> Text:
        def run(encoder: Any, tokenizer: Any, most: int) -> Any:
            padded = tokenizer(text, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
            return encoder(padded.input_ids.to(get_module_execution_device(encoder)))

        warn_if_cut(self.tokenizer_2, text, length)  # CLIP sees the first 77 tokens alone, T5 these
        pooled = run(self.text_encoder, self.tokenizer, self.tokenizer.model_max_length).pooler_output
        tokens = run(self.text_encoder_2, self.tokenizer_2, length)[0]
        return Text(tokens[0].to(device), pooled[0].to(device))

    # -- sampling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        references: Reference | Sequence[Reference] | Sequence[Sequence[Reference] | None] | None = None,
        condition: str | Sequence[Given] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 129,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 3.0,
        text_osci: bool = True,
        image_osci: bool = True,
        scale_temporal_osci: bool = True,
        full_steps: int = FULL_STEPS,
        shift: float | bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: list[Text] | None = None,
        negative_prompt_embeds: list[Text] | None = None,
        max_sequence_length: int = TEXT_LENGTH,
        put_back: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw one video for each prompt.

        Args:
            prompt, negative_prompt: texts; one negative text serves all prompts. None: "".
            references: pictures and videos to take frames from: those of every sample, or a list for each prompt
                (None in it: that sample is made from text alone).
            condition: which frames come from them: a name ("t2v", "i2v_head", "i2v_tail", "i2v_loop", "v2v_head",
                "v2v_tail", "v2v_head_easy", "v2v_tail_easy", "v2v_head_9" for 9 frames), a mask strategy in Open-Sora
                1.x's notation (its stretch 0), or `Given`s. Default: "i2v_head" for one reference, "i2v_loop" for two.
            height, width: in pixels, on the grid of autoencoder and patch. Default: 256px at 16:9.
            num_frames: 4 k + 1; any number with a video DC-AE.
            guidance_scale: from the negative text to the prompt; up to 1 the text is not guided. The scale that
                distilled networks are told.
            image_guidance_scale: from no given frames to these.
            text_osci, image_osci, scale_temporal_osci, full_steps: as in `open_sora_schedule.Guidance`. The third acts
                where all that is given are single pictures.
            shift: of the times: None is the scheduler's, True by size, False none.
            generator: for the noise; a list has one for each sample.
            seed: instead of generators: one for each sample, or the first one's, which the others count on from.
            latents: the noise [B, C, t, h, w] to start from.
            prompt_embeds, negative_prompt_embeds: of each text, instead of the texts.
            put_back: whether frames that are given to the end are put into the result as they were given. Default:
                where a latent frame of a picture stands for that picture alone; with a DC-AE it stands for four frames,
                so there videos alone are put back.
            output_type: "pil", "np", "pt" or "latent" (normalised latents).
            callback_on_step_end: called with (pipeline, step, time * 1000, tensors) after each step; may return
                ``latents`` to go on from.

        Returns:
            An OpenSoraPipelineOutput, or a tuple of the videos alone.

        Raises:
            UserError: a size, a condition or references that the model cannot make a video from.
        """
        device = self._execution_device
        default = size("256px")
        height, width = height or default[0], width or default[1]
        shape = self._latent_shape(height, width, num_frames)
        distilled, guided = bool(self.transformer.config.guidance_embed), guidance_scale > 1
        embeds, negatives = self.encode_prompt(
            prompt,
            guided and not distilled,
            negative_prompt,
            device,
            prompt_embeds,
            negative_prompt_embeds,
            max_sequence_length,
        )
        x = self._noise((len(embeds), *shape), generator, seed, latents, device)
        strategies, conditions = given_frames(self.vae, references, condition, (height, width), x)
        if conditions is not None and not self.transformer.config.cond_embed:
            raise UserError("This network was made for text alone (cond_embed = false): leave the references away.")

        pictures_only = all(one.frames == 1 for strategy in strategies for one in strategy)
        guidance = None
        if not distilled:
            text_scale = guidance_scale if guided else None
            grows = scale_temporal_osci and pictures_only
            guidance = Guidance(text_scale, image_guidance_scale, text_osci, image_osci, grows, full_steps)
        predict = predictor(self.transformer, embeds, negatives, guidance_scale if distilled else None)
        tokens = shape[2] * shape[3] // self.transformer.config.patch_size**2
        times = schedule(num_inference_steps, tokens, shape[1], self._shift(shift))
        with self.progress_bar(total=num_inference_steps) as bar:

            def on_step(step: int, t: float, x: Tensor) -> Tensor:
                if callback_on_step_end is not None:
                    tensors = {name: {"latents": x}[name] for name in callback_on_step_end_tensor_inputs}
                    x = callback_on_step_end(self, step, t * 1000, tensors).pop("latents", x)
                bar.update()
                return x

            x = denoise(predict, x, times, guidance, conditions, on_step)
        if conditions is not None:
            whole = (is_causal(self.vae) or not pictures_only) if put_back is None else put_back
            x = conditions.put_back(x) if whole else x
        videos = x if output_type == "latent" else self._decoded(x, num_frames, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=videos) if return_dict else (videos,)

    def extend(
        self,
        video: Tensor,
        stretches: int = 1,
        overlap: int | None = None,
        edit: float = 0.0,
        num_frames: int = 129,
        references: Any = None,
        condition: str = "",
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Longer videos: each further stretch is told the last frames and goes on from them.

        Args:
            video: [B, T, 3, H, W] in [0, 1], as ``output_type="pt"`` gives it.
            stretches: how many to add, each of ``num_frames - overlap`` frames.
            overlap: frames that are told. Default: 33 (32 with a DC-AE), as in "v2v_head", or 1 for shorter stretches.
            edit: how freely they are made anew in the stretch (`Given.edit`); the video keeps its own.
            references, condition: further frames that stretches are given, by a mask strategy in Open-Sora 1.x's
                notation: its stretch 1 is the first that is added.
            generator: as in the call; one noise after another comes from it.
            seed: as in the call. Noise is drawn anew for each stretch, from the seed and the length before it.
            arguments: what else the call takes.

        Returns:
            The whole video [B, T + stretches * (num_frames - overlap), 3, H, W] in [0, 1], float32 on the CPU.

        Raises:
            UserError: an overlap that the autoencoder does not take, or that leaves nothing to be made.
        """
        causal = is_causal(self.vae)
        overlap = overlap_of(overlap, num_frames, video.shape[1], causal)
        end = Given(reference=-1, frames=latent_frames_of(overlap, causal), edit=edit)
        strategies, shown = parse_strategy(condition), references_of(references, len(video))
        whole = video.float().cpu()
        for stretch in range(1, stretches + 1):
            ends = (whole[:, -overlap:].transpose(1, 2) * 2 - 1).unbind()
            noise_of = generator if seed is None else _generators(seed, len(video), "extend", whole.shape[1])
            drawn = self(
                references=[[*own, last] for own, last in zip(shown, ends, strict=True)],
                condition=[*strategies.get(stretch, ()), end],
                height=whole.shape[3],
                width=whole.shape[4],
                num_frames=num_frames,
                generator=noise_of,
                output_type="pt",
                return_dict=False,
                **arguments,
            )[0]
            whole = torch.cat([whole, drawn[:, overlap:].float().cpu()], dim=1)
        return whole

    # -- what a call is made of ------------------------------------------------------------------------------------

    def _latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        config = self.transformer.config
        ratio = self.vae.spatial_compression_ratio
        grid = ratio * config.patch_size
        for name, side in (("height", height), ("width", width)):
            if side < grid or side % grid:
                near = sorted({max(grid, side // grid * grid), (side // grid + 1) * grid})
                raise UserError(
                    f"{name} {side}: this model makes multiples of {grid}; nearest: {' or '.join(map(str, near))}."
                )
        frames = latent_frames_of(num_frames, is_causal(self.vae))
        return config.in_channels // config.patch_size**2, frames, height // ratio, width // ratio

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        seed: int | Sequence[int] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        assert generator is None or seed is None, "give generators or seeds"
        if seed is not None:
            generator = _generators(seed, shape[0])
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        assert latents.shape == shape, f"latents are {tuple(latents.shape)}, not {shape}"
        return latents.to(device, torch.float32)

    def _shift(self, shift: float | bool | None) -> float | bool | None:
        config = self.scheduler.config
        if shift is not None or config.use_dynamic_shifting:
            return shift
        return float(config.shift)

    def _decoded(self, latents: Tensor, num_frames: int, output_type: str) -> Any:
        pixels = decode_latents(self.vae, latents, num_frames)
        return self.video_processor.postprocess_video(pixels, output_type=output_type)


def _generators(seed: int | Sequence[int], count: int, *purpose: int | str) -> list[torch.Generator]:
    """A generator for each sample, on the CPU, so that the device does not matter. With a ``purpose`` its noise is
    another than without."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    assert len(seeds) == count, "one seed for each sample"
    seeds = [derive_seed(one, *purpose) if purpose else one for one in seeds]
    return [torch.Generator("cpu").manual_seed(one) for one in seeds]
