"""The tables of the model and of the adapter that trains on it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kinema.config.layouts import AdapterType
from kinema.config.section import (
    Count,
    Dtype,
    PathOrHub,
    Section,
    Storage,
    UserPath,
    refuse,
)


class PartConfig(Section):
    path: PathOrHub | None = None
    """Where this part comes from, if not `model.path`: a diffusers directory, a hub id, a single file, or a run or an
    export of kinema's that trained it whole (of a run what is newest, averaged where it keeps an average)."""
    dtype: Storage | None = None
    """Type of its weights. Default: fp32 if it trains whole or encodes pixels, else `training.precision`. Four more are
    for parts that do not train (an adapter's base is one), whose linear layers are stored in fewer bits and used in the
    type of the computation: `fp8` (float8 e4m3, a scale for each row), `fp8_block` (a scale for 64 weights), `int8` (a
    scale for each row), `nf4` (4 bits, a scale for 64 weights). Layers of norms, modulation and embeddings take 8 bits
    in each of them. docs/guides/memory.md says how much each loses."""


class ModelConfig(Section):
    family: str
    """The kind of model. `kinema models` lists them."""
    variant: str | None = None
    """Variant of the family, such as `t2v-1.3b`. Needed if `path` is a single file, else read from it."""
    path: PathOrHub | None = None
    """A diffusers directory, a hub id, or a single checkpoint file in the original or ComfyUI layout."""
    revision: str | None = None
    """Revision of a hub id (branch, tag or commit)."""
    train: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Parts that train, such as `["network"]`, or `["network", "text_encoder"]` where the family can train its text
    encoders. Default: the network, or both where a model has two that share the noise levels."""
    network: PartConfig = PartConfig()
    """The diffusion network; of two experts, the one for high noise."""
    network_2: PartConfig = PartConfig()
    """The second expert, for low noise, of models that have one."""
    autoencoder: PartConfig = PartConfig()
    """The autoencoder between pixels and latents."""
    text_encoder: PartConfig = PartConfig()
    """The text encoder; its tokenizer is looked for beside it."""
    text_encoder_2: PartConfig = PartConfig()
    """The second text encoder, of models that have several."""
    text_encoder_3: PartConfig = PartConfig()
    """The third text encoder."""
    text_encoder_4: PartConfig = PartConfig()
    """The fourth text encoder."""
    image_encoder: PartConfig = PartConfig()
    """The picture encoder of image-to-video variants."""
    tokenizer: PartConfig = PartConfig()
    """The tokenizer, where it is not beside the text encoder."""
    tokenizer_2: PartConfig = PartConfig()
    """The tokenizer of the second text encoder."""
    tokenizer_3: PartConfig = PartConfig()
    """The tokenizer of the third text encoder."""
    tokenizer_4: PartConfig = PartConfig()
    """The tokenizer of the fourth text encoder."""
    text_length: int | None = Field(default=None, gt=0)
    """Tokens of text that the network sees. Default: the family's."""
    posterior: Literal["sample", "mean"] = "sample"
    """Latents are drawn from the autoencoder's posterior at every use, or its mean is taken."""
    first_frame_p: float | None = Field(default=None, ge=0, le=1)
    """Share of the clips whose first frame is given, clean and out of the loss, in families that see a time for each
    frame. Default: 0 for text-to-video, 1 for image-to-video."""
    conditions: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Which frames of a clip are given in training, in families whose network is told them, by weights such as
    `{ t2v = 1, i2v_head = 5, i2v_loop = 1, i2v_tail = 1 }`, drawn for each sample: none (`t2v`), the first, the last or
    both (`i2v_head`, `i2v_tail`, `i2v_loop`), the first or last 33 (`v2v_head`, `v2v_tail`), 65 (`v2v_head_easy`,
    `v2v_tail_easy`) or any number of frames (`v2v_head_9`, `v2v_tail_9`). Default: the family's, which is none where
    the network cannot be told any."""
    cond_embed: bool | None = None
    """Whether the network has the layer that tells it of given frames, in families where it may be left out. `true`
    adds one that changes nothing yet to weights without it, `false` leaves it out. Default: as the weights have it."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale that networks with a guidance embedding are told in training. Default: the family's, which is 1
    unless its authors train with another."""
    bypass_guidance: bool = False
    """Leave out what the guidance embedding adds, in training and in samples, as networks want it whose distillation
    has been undone."""
    random_weights: bool = False
    """Start the network from random weights (its configuration is still read from `path`)."""


class AdapterConfig(Section):
    type: AdapterType = "lora"
    """`lora`; `dora`, a LoRA that trains the size of each output apart; `lokr`, a Kronecker product with fewer weights;
    `ia3`, one factor for each output."""
    rank: int = Field(default=32, gt=0)
    """Rank of the two factors; of `lokr`, of the larger matrix."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale numerator: the update is multiplied by alpha / rank. Default: the rank of each layer."""
    rank_patterns: dict[str, Count] = {}
    """Ranks of the layers that a pattern (see `targets`) matches, such as `{ "to_k|to_v" = 8 }`; the first that matches
    counts."""
    alpha_patterns: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alphas likewise."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input, of `lora` and `dora`. Its draws, unlike all others, depend on the number of
    processes and on `training.micro_batch_size`."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the outputs that get no update in a step, of `lokr`. Drawn like `dropout`."""
    decompose_factor: int | None = Field(default=None, gt=0)
    """Size of the smaller matrix of `lokr`, where it divides a layer's sizes. Default: near their square roots."""
    decompose_both: bool = False
    """Write the smaller matrix of `lokr` as a product of two factors too, where it is large enough."""
    input_targets: tuple[str, ...] = ()
    """Patterns of the layers whose inputs `ia3` multiplies, instead of their outputs (its authors do so for the second
    layer of each feed-forward network)."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Layers that are adapted, as patterns: regular expressions that match names from their end, at a dot, so that
    `to_q` and `attn1.to_[qkv]` match `blocks.0.attn1.to_q`. Default: the family's."""
    exclude: tuple[str, ...] = ()
    """Patterns of layers among them that are left as they are."""
    dtype: Dtype = "fp32"
    """Storage type of the adapter's weights while it trains."""
    init_from: UserPath | None = None
    """Start from this adapter: a file or directory of any layout that kinema reads."""

    def unread(self) -> dict[str, str]:
        one_vector = "ia3 trains one factor for each output and has no rank"
        other_kinds = {
            "lora": ("rank_dropout", "decompose_factor", "decompose_both", "input_targets"),
            "dora": ("rank_dropout", "decompose_factor", "decompose_both", "input_targets"),
            "lokr": ("dropout", "input_targets"),
            "ia3": ("dropout", "rank_dropout", "decompose_factor", "decompose_both"),
        }
        reasons = dict.fromkeys(("rank_dropout", "decompose_factor", "decompose_both"), "only lokr has it")
        reasons |= {"dropout": "only lora and dora have it", "input_targets": "only ia3 has it"}
        if self.type == "lokr":
            reasons["dropout"] = "a Kronecker product has no inner input to drop; rank_dropout drops rows of the update"
        found = {key: reasons[key] for key in other_kinds[self.type]}
        if self.type == "ia3":
            found |= dict.fromkeys(("rank", "alpha", "rank_patterns", "alpha_patterns"), one_vector)
        return found

    @model_validator(mode="after")
    def _agree(self) -> AdapterConfig:
        patterns = {"targets": self.targets or (), "exclude": self.exclude, "input_targets": self.input_targets}
        patterns |= {"rank_patterns": tuple(self.rank_patterns), "alpha_patterns": tuple(self.alpha_patterns)}
        for key, values in patterns.items():
            for pattern in values:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise refuse(key, f"'{pattern}' is no regular expression: {error}") from None
        for key, reason in self.unread().items():
            if key in self.model_fields_set:
                raise refuse(key, f'type = "{self.type}" does not read it: {reason}. Leave it out.')
        return self
