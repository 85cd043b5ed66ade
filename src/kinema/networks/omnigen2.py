"""OmniGen2's diffusion network: text, reference pictures and the noisy picture in one sequence.

Wu et al. 2025, "OmniGen2: Exploration to Advanced Multimodal Generation", arXiv 2506.18871. The facts are those of
the authors' source (github.com/VectorSpaceLab/OmniGen2), the parameter names those of their checkpoint, so that its
weights load unchanged. The blocks are Lumina-Image 2.0's, which diffusers has. What is particular to OmniGen2:

- Three refiners before the joint layers: text, noisy picture and every reference picture are each refined alone.
  Text knows no time; references do.
- A reference picture is told from the next by a learnt vector for its place in the list (five at most).
- Positions on three axes. Token i of the text is at (i, i, i); a picture's token at (s, row, column), where s begins
  at the length of the text and grows, after each reference, by its longer side; the noisy picture comes last.
- Time runs from noise (0) to data (1), and the prediction is x_0 - eps.

Attention knows order by positions alone, so padding may lie anywhere as long as it is masked. Here the sequence is
[text, padded | references, padded | pictures, padded]: nothing in it has to wait for the device to tell lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.transformer_lumina2 import (
    Lumina2CombinedTimestepCaptionEmbedding,
    Lumina2TransformerBlock,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kinema.errors import UserError

MAX_REFERENCES = 5
"""Rows of ``image_index_embedding`` in the published checkpoint."""
ROPE_THETA = 10_000.0

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each float32 [B, S, head_dim / 2]."""


class OmniGen2AttnProcessor:
    """Grouped-query self-attention with normalised, rotated queries and keys, through diffusers' dispatcher."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor:
        """``hidden_states`` [B, S, D], ``attention_mask`` bool [B, S], True for the keys that are seen; -> [B, S, D].
        ``encoder_hidden_states``: what keys and values are made of, by default the same."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        head_dim = attn.inner_dim // attn.heads
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (-1, head_dim)))
        key = attn.norm_k(attn.to_k(source).unflatten(-1, (-1, head_dim)))
        value = attn.to_v(source).unflatten(-1, (-1, head_dim))
        if image_rotary_emb is not None:
            query, key = rotate(query, image_rotary_emb), rotate(key, image_rotary_emb)
        # Heads of keys and values are repeated by hand: with enable_gqa, SDPA has no kernel that takes a mask and
        # does not write out the whole attention matrix.
        shared_by = query.shape[2] // key.shape[2]
        output = dispatch_attention_fn(
            query.to(value.dtype),
            key.to(value.dtype).repeat_interleave(shared_by, dim=2),
            value.repeat_interleave(shared_by, dim=2),
            attn_mask=None if attention_mask is None else attention_mask[:, None, None, :],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](output.flatten(2)))


class OmniGen2TransformerBlock(Lumina2TransformerBlock):
    """One block of a refiner or of the joint layers.

    Called as ``block(hidden_states [B, S, D], mask bool [B, S] or None, rotary)``, and ``temb`` [B, min(D, 1024)] as
    fourth where it is modulated; returns hidden states [B, S, D]. Modulation starts at zero: gates closed.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        num_kv_heads: int,
        multiple_of: int,
        ffn_dim_multiplier: float | None,
        norm_eps: float,
        modulation: bool = True,
    ) -> None:
        super().__init__(
            dim, num_attention_heads, num_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps, modulation=modulation
        )
        self.attn.set_processor(OmniGen2AttnProcessor())
        for module in (*self.attn.modules(), *self.feed_forward.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        if modulation:
            _zero(self.norm1.linear)


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """OmniGen2's network (the defaults are the published model's: 3,967,161,400 parameters).

    Args:
        patch_size: latent rows and columns that make one token.
        in_channels, out_channels: latent channels; ``out_channels`` None means as many as come in.
        hidden_size: width D of the sequence.
        num_layers: joint layers.
        num_refiner_layers: blocks of each of the three refiners.
        num_attention_heads, num_kv_heads: heads of queries, and of keys and values.
        multiple_of, ffn_dim_multiplier: width of the feed-forward part: 4 D, times the multiplier where there is one,
            rounded up to a multiple.
        norm_eps: of the RMS norms.
        axes_dim_rope: channels of a head that turn with each of the three axes of position.
        axes_lens: positions that the model was made for, by axis.
        text_feat_dim: width of the text embeddings.
        timestep_scale: what time in [0, 1] is multiplied by before its embedding.
    """

    _no_split_modules = ("OmniGen2TransformerBlock",)
    _repeated_blocks = ("OmniGen2TransformerBlock",)
    _skip_layerwise_casting_patterns = ("x_embedder", "ref_image_patch_embedder", "time_caption_embed", "norm")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, int, int] = (40, 40, 40),
        axes_lens: tuple[int, int, int] = (1024, 1664, 1664),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        assert hidden_size == num_attention_heads * sum(axes_dim_rope), "the axes' channels must make up a head"
        assert num_attention_heads % num_kv_heads == 0, "every head of keys serves the same number of queries"
        self.out_channels = out_channels or in_channels
        patch_dim = patch_size * patch_size * in_channels
        block_args = (hidden_size, num_attention_heads, num_kv_heads, multiple_of, ffn_dim_multiplier, norm_eps)

        def blocks(count: int, modulation: bool = True) -> nn.ModuleList:
            return nn.ModuleList(OmniGen2TransformerBlock(*block_args, modulation) for _ in range(count))

        self.x_embedder = nn.Linear(patch_dim, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch_dim, hidden_size)
        self.time_caption_embed = Lumina2CombinedTimestepCaptionEmbedding(hidden_size, text_feat_dim, norm_eps=norm_eps)
        self.time_caption_embed.time_proj.scale = timestep_scale
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.context_refiner = blocks(num_refiner_layers, modulation=False)
        self.layers = blocks(num_layers)
        out_dim = patch_size * patch_size * self.out_channels
        self.norm_out = LuminaLayerNormContinuous(
            hidden_size, min(hidden_size, 1024), elementwise_affine=False, eps=1e-6, out_dim=out_dim
        )
        self.image_index_embedding = nn.Parameter(torch.empty(MAX_REFERENCES, hidden_size))
        self._initialize()

    def _initialize(self) -> None:
        """The authors' initial weights: an untrained network predicts zero."""
        for embedder in (self.x_embedder, self.ref_image_patch_embedder):
            nn.init.xavier_uniform_(embedder.weight)
            nn.init.zeros_(embedder.bias)
        embed = self.time_caption_embed
        for linear in (embed.timestep_embedder.linear_1, embed.timestep_embedder.linear_2, embed.caption_embedder[1]):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        _zero(self.norm_out.linear_1)
        _zero(self.norm_out.linear_2)
        nn.init.normal_(self.image_index_embedding, std=0.02)

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        timestep: Tensor,
        text_hidden_states: Tensor,
        text_attention_mask: Tensor | None = None,
        ref_image_hidden_states: Sequence[Sequence[Tensor] | None] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict x_0 - eps.

        Args:
            hidden_states: noisy latents [B, C, H, W], or one [C, H, W] a sample where sizes differ.
            timestep: [B], the share of data in the noisy latents: 0 is noise, 1 is data.
            text_hidden_states: [B, L, ``text_feat_dim``], padded on the right.
            text_attention_mask: [B, L], nonzero for tokens that are not padding, one at least a sample. None: none is
                padding, which lets attention use its fastest kernels.
            ref_image_hidden_states: for every sample its reference latents [C, H, W], any number from none (or None)
                to five, of any size; None: no sample has one.
            return_dict: whether to return a ``Transformer2DModelOutput`` or its one value in a tuple.

        Returns:
            The prediction in ``sample``, of the shape (or a list of the shapes) of ``hidden_states``.

        Raises:
            UserError: more than five references, or a picture or text too large for the model.
        """
        patch = self.config.patch_size
        pictures = list(hidden_states)
        references = [list(own or ()) for own in ref_image_hidden_states or [None] * len(pictures)]
        assert len(references) == len(text_hidden_states) == len(pictures), "one entry a sample"
        text_mask = None if text_attention_mask is None else text_attention_mask.bool()
        self._check_sizes(pictures, references, text_hidden_states.shape[1] if text_mask is None else 1)
        text_places, ref_places, noise_places = _places(text_hidden_states, text_mask, references, pictures, patch)

        temb, text = self.time_caption_embed(pictures[0], timestep, text_hidden_states)
        text_rotary = self._rotary(text_places)
        for block in self.context_refiner:
            text = block(text, text_mask, text_rotary)

        noise, noise_mask = _pad([patchify(picture, patch) for picture in pictures])
        noise = self.x_embedder(noise)
        noise_rotary = self._rotary(_pad(noise_places)[0])
        for block in self.noise_refiner:
            noise = block(noise, noise_mask, noise_rotary, temb)

        refs, refs_mask, refs_rotary = self._refine_references(references, ref_places, temb, pictures[0])

        parts = [(text, text_mask), (refs, refs_mask), (noise, noise_mask)]
        sequence = torch.cat([tokens for tokens, _ in parts], dim=1)
        mask = _join_masks(parts)
        rotary = tuple(torch.cat(angles, dim=1) for angles in zip(text_rotary, refs_rotary, noise_rotary, strict=True))
        for block in self.layers:
            sequence = block(sequence, mask, rotary, temb)

        predicted = self.norm_out(sequence[:, text.shape[1] + refs.shape[1] :], temb)
        outputs = [unpatchify(t, picture.shape[1:], patch) for t, picture in zip(predicted, pictures, strict=True)]
        sample = torch.stack(outputs) if isinstance(hidden_states, Tensor) else outputs
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _refine_references(
        self, references: list[list[Tensor]], places: list[list[Tensor]], temb: Tensor, like: Tensor
    ) -> tuple[Tensor, Tensor | None, Rotary]:
        """Refine every reference picture alone, and lay those of each sample behind one another.

        Returns tokens [B, R, D], their mask, and their rotary angles. ``like`` is any latent of the batch. Where no
        sample has a reference, a blank token is refined and left out: every rank runs the same blocks on every batch,
        which sharded parameters rely on, and every parameter gets a gradient, of zero.
        """
        patch = self.config.patch_size
        pictures = [patchify(picture, patch) for own in references for picture in own]
        owners = [i for i, own in enumerate(references) for _ in own] or [0]
        indices = [j for own in references for j, _ in enumerate(own)] or [0]
        flat = [place for own in places for place in own]
        if not pictures:
            pictures = [patchify(like.new_zeros(like.shape[0], patch, patch), patch)]
            flat = [torch.zeros(1, 3, dtype=torch.int64, device=like.device)]

        tokens, mask = _pad(pictures)
        index = torch.stack([self.image_index_embedding[j] for j in indices])
        tokens = self.ref_image_patch_embedder(tokens) + index[:, None]
        rotary, temb = self._rotary(_pad(flat)[0]), torch.stack([temb[i] for i in owners])
        for block in self.ref_image_refiner:
            tokens = block(tokens, mask, rotary, temb)

        refined = iter(tokens)
        by_sample = [[tokens[0, :0], *(next(refined)[: len(place)] for place in own)] for own in places]
        refs, refs_mask = _pad([torch.cat(own) for own in by_sample])
        ref_places, _ = _pad([torch.cat([flat[0][:0], *own]) for own in places])
        return refs, refs_mask, self._rotary(ref_places)

    def _rotary(self, positions: Tensor) -> Rotary:
        return rotary_angles(positions, self.config.axes_dim_rope)

    def _check_sizes(self, pictures: list[Tensor], references: list[list[Tensor]], text_length: int) -> None:
        """UserError if a sample needs positions, or more references, than the model has. ``text_length``: a lower
        bound, as padded texts tell their length on the device alone."""
        patch, (longest, *tallest_widest) = self.config.patch_size, self.config.axes_lens
        for picture, own in zip(pictures, references, strict=True):
            if len(own) > MAX_REFERENCES:
                raise UserError(f"a sample has {len(own)} reference pictures: leave out all but {MAX_REFERENCES}.")
            for latent in (*own, picture):
                grid = _grid(latent, patch)
                assert latent.shape[1:] == (grid[0] * patch, grid[1] * patch), "sides are multiples of the patch"
                if any(side > limit for side, limit in zip(grid, tallest_widest, strict=True)):
                    raise UserError(
                        f"a picture of {latent.shape[1]} x {latent.shape[2]} latents (height x width) is larger than "
                        f"the {' x '.join(str(limit * patch) for limit in tallest_widest)} that the network has "
                        "positions for. Make it smaller."
                    )
            last = text_length + sum(max(_grid(latent, patch)) for latent in own)
            if last >= longest:
                raise UserError(
                    f"text ({text_length} tokens) and {len(own)} reference pictures need {last + 1} positions, but the "
                    f"network has {longest}. Shorten the text, or make the references smaller or fewer."
                )


def patchify(picture: Tensor, patch: int) -> Tensor:
    """[C, H, W] -> tokens [H/p * W/p, p * p * C], row by row."""
    rows, columns = _grid(picture, patch)
    patches = picture.reshape(-1, rows, patch, columns, patch).permute(1, 3, 2, 4, 0)
    return patches.reshape(rows * columns, -1)


def unpatchify(tokens: Tensor, size: Sequence[int], patch: int) -> Tensor:
    """The inverse, to [C, *size]; tokens beyond the picture's are padding and dropped."""
    rows, columns = size[0] // patch, size[1] // patch
    patches = tokens[: rows * columns].reshape(rows, columns, patch, patch, -1).permute(4, 0, 2, 1, 3)
    return patches.reshape(-1, *size)


def picture_positions(start: Tensor, rows: int, columns: int) -> Tensor:
    """Positions (``start``, row, column) of a picture's tokens, int64 [rows * columns, 3]. ``start``: a scalar."""
    row, column = (torch.arange(n, device=start.device) for n in (rows, columns))
    return torch.cat([start.expand(rows * columns, 1), torch.cartesian_prod(row, column)], dim=1)


def _places(
    text: Tensor, text_mask: Tensor | None, references: list[list[Tensor]], pictures: list[Tensor], patch: int
) -> tuple[Tensor, list[list[Tensor]], list[Tensor]]:
    """Positions of tokens: of texts [B, L, 3], of each reference of each sample and of each picture, [n, 3]."""
    batch, length = text.shape[:2]
    lengths = torch.full((batch,), length, device=text.device) if text_mask is None else text_mask.sum(dim=1)
    of_references: list[list[Tensor]] = [[] for _ in references]
    of_pictures = []
    for text_end, own, picture, places in zip(lengths, references, pictures, of_references, strict=True):
        start = text_end
        for reference in own:
            places.append(picture_positions(start, *_grid(reference, patch)))
            start = start + max(_grid(reference, patch))
        of_pictures.append(picture_positions(start, *_grid(picture, patch)))
    of_text = torch.arange(length, device=text.device)[None, :, None].expand(batch, -1, 3)
    return of_text, of_references, of_pictures


def rotary_angles(positions: Tensor, axes_dim: Sequence[int]) -> Rotary:
    """Cosines and sines, float32 [B, S, sum(axes_dim) / 2], at positions [B, S, 3].

    The axes share the channels of a head out among themselves; on an axis of d channels pair k turns by
    position * theta^(-2 k / d) (RoFormer, Su et al. 2021, section 3.2.2).
    """
    # Angles reach a thousand radians: float64 keeps them exact where the device has it.
    real = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = []
    for axis, dim in enumerate(axes_dim):
        pairs = torch.arange(0, dim, 2, dtype=real, device=positions.device)
        angles.append(positions[..., axis, None] * ROPE_THETA ** (-pairs / dim))
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn neighbouring channels of ``x`` [B, S, heads, head_dim] as pairs (real, imaginary), in float32."""
    cos, sin = (part.unsqueeze(2) for part in rotary)
    real, imaginary = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _grid(picture: Tensor, patch: int) -> tuple[int, int]:
    """Rows and columns of tokens in [C, H, W]."""
    return picture.shape[1] // patch, picture.shape[2] // patch


def _pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Sequences [n_i, ...] -> [N, max n_i, ...] with zeros behind, and the mask of what is real; None: all is."""
    padded = pad_sequence(list(sequences), batch_first=True)
    lengths = [len(sequence) for sequence in sequences]
    if min(lengths) == max(lengths):
        return padded, None
    real = [padded.new_ones(length, dtype=torch.bool) for length in lengths]
    return padded, pad_sequence(real, batch_first=True)


def _join_masks(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """The mask of several parts [B, n, D] behind one another, from the mask of each."""
    if all(mask is None for _, mask in parts):
        return None
    whole = [tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if m is None else m for tokens, m in parts]
    return torch.cat(whole, dim=1)


def _zero(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
