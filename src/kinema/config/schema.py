"""The whole configuration as typed models.

Every key that a user may write is a field here, with its documentation under it; ``kinema schema`` and the
reference page of the documentation are made from this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kinema.config.data import BucketConfig, DataConfig, SourceConfig, settle_source
from kinema.config.layouts import AdapterType, LayoutName, default_layouts, why_not
from kinema.config.section import (
    Count,
    Dtype,
    PathOrHub,
    Probability,
    Section,
    Storage,
    UserPath,
    refuse,
    refuse_unread,
)
from kinema.errors import ConfigError
from kinema.plugins import OBJECTIVES, OPTIMIZERS, Catalog


def _check_name(catalog: Catalog, name: str, options: dict[str, Any]) -> None:
    """Refuse a name that nothing has, and options for what is built in, whose keys are those of its table."""
    try:
        catalog.check(name)
    except ConfigError as error:
        raise refuse("type", str(error).removeprefix(f"{catalog.key}: ").rstrip(".")) from None
    if options and catalog.is_built_in(name):
        raise refuse("options", f"'{name}' comes with kinema and has its own keys; options are for other packages'")


class RunConfig(Section):
    dir: UserPath = Path("runs/run")
    """The run directory: everything that the training produces."""
    seed: int = Field(default=42, ge=0)
    """Seed of every random draw (weights of adapters, order, noise, times, dropout)."""
    deterministic: bool = False
    """On GPUs: bitwise repeatable kernels. Slower; on CPUs runs repeat to the bit anyway."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads for torch. Default: torch's own choice. Bitwise repeatability needs the same number."""


class PartConfig(Section):
    path: PathOrHub | None = None
    """Where this part comes from, if not `model.path`: a diffusers directory, a hub id, or a single file."""
    dtype: Storage | None = None
    """Type of its weights. Default: fp32 if it trains whole or encodes pixels, else `training.precision`. `fp8`, for
    parts that do not train (an adapter's base is one): linear layers are stored in float8 and used in the type of
    the computation."""


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
    both (`i2v_head`, `i2v_tail`, `i2v_loop`), the first or last 33 (`v2v_head`, `v2v_tail`) or 65 (`v2v_head_easy`,
    `v2v_tail_easy`). Default: the family's, which is none where the network cannot be told any."""
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


class ObjectiveConfig(Section):
    type: str = Field(default="flow", examples=["flow"])
    """What is minimised: `flow` regresses the network's native prediction. Other packages may add objectives."""
    options: dict[str, bool | int | float | str | tuple[float, ...]] = {}
    """Arguments of an objective from another package."""
    time: Literal["uniform", "logit_normal", "native"] | None = None
    """Distribution of t before the shift; `native`: the law that the family was trained with. Default: the
    family's, which is `logit_normal` for flow models and `native` for older ones."""
    time_scale: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit of t for `logit_normal`."""
    shift: Annotated[float, Field(gt=0)] | Literal["resolution"] | None = None
    """t <- shift t / (1 + (shift - 1) t); `resolution`: grows with the tokens. Default: the family's."""
    t_min: float = Field(default=0.0, ge=0, lt=1)
    """Lower end of the time range that is trained."""
    t_max: float = Field(default=1.0, gt=0, le=1)
    """Upper end of the time range that is trained."""
    weighting: Literal["none", "min_snr", "debiased", "edm"] | None = None
    """Weight of the loss over t: `min_snr` (see `min_snr_gamma`), `debiased` (1 / sqrt of the signal-to-noise ratio)
    or `edm` (for networks that predict the data). Default: the family's."""
    min_snr_gamma: float = Field(default=5.0, gt=0)
    """Signal-to-noise ratio above which `min_snr` stops to grow."""
    loss: Literal["mse", "huber"] = "mse"
    """Error measure; `huber` is the pseudo-Huber loss."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where pseudo-Huber turns from quadratic to linear."""

    @model_validator(mode="after")
    def _known(self) -> ObjectiveConfig:
        _check_name(OBJECTIVES, self.type, self.options)
        return self

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> ObjectiveConfig:
        if self.t_min >= self.t_max:
            raise refuse("t_min", f"{self.t_min} is not below t_max = {self.t_max}")
        return self


class OptimizerConfig(Section):
    type: str = Field(default="adamw", examples=["adamw", "muon"])
    """`adamw`, or `muon`, which takes the matrices of the blocks and leaves the rest to AdamW. Other packages may add
    optimisers."""
    options: dict[str, bool | int | float | str | tuple[float, ...]] = {}
    """Arguments of an optimiser from another package."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    part_lr: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Peak learning rates of parts that have their own, where several train: `part_lr = { text_encoder = 1e-5 }`."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW's decay rates."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; vectors (biases, norms) have none."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum."""
    matrix_lr: float | None = Field(default=None, gt=0)
    """Learning rate of Muon's matrices, scaled to match AdamW's update size; default: `lr`."""

    @model_validator(mode="after")
    def _known(self) -> OptimizerConfig:
        _check_name(OPTIMIZERS, self.type, self.options)
        return self

    @model_validator(mode="after")
    def _matrix_lr_is_muons(self) -> OptimizerConfig:
        if self.matrix_lr is not None and self.type != "muon":
            raise refuse("matrix_lr", f'only type = "muon" has it, and type is "{self.type}"')
        return self


class ScheduleConfig(Section):
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, down to `final_fraction` of the peak at the last step of the run."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """What is left of the peak at the end."""


class EmaConfig(Section):
    decay: float = Field(default=0.9999, gt=0, lt=1)
    """Decay per step; early steps use min(decay, (1 + n) / (10 + n))."""


class BatchSizeConfig(Section):
    size: Count
    """Samples per optimiser step, over all devices."""
    resolution: Count | None = None
    """Buckets of about this side length (the square root of the area, at most 1.4 times away): of several, the nearest
    counts."""
    frames: Count | None = None
    """Buckets of this length. Default: any."""


class TrainingConfig(Section):
    steps: int | None = Field(default=None, gt=0)
    """Length of the run in optimiser steps. Give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the data."""
    batch_size: Count | Literal["auto"] = 1
    """Samples per optimiser step, over all devices. `auto`: for each bucket, the most that fit the devices' memory,
    found by trial before the first step and kept for the whole run."""
    batch_sizes: tuple[BatchSizeConfig, ...] = ()
    """Other sizes of the batch for some buckets; the rest take `batch_size`."""
    token_budget: int | None = Field(default=None, gt=0)
    """Instead of `batch_size`: each bucket's batch is as large as fits into so many latent tokens on one device, and at
    least 1."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Samples per forward pass on one device; the rest is accumulated. Default: all of a device's share."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type. `auto`: bf16 where the hardware computes in it, else fp32. fp16 scales the loss."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    compile: bool = False
    """Compile the repeated blocks (torch.compile, one compilation for all blocks of a kind)."""
    caption_dropout: Probability | dict[str, Probability] = 0.0
    """Share of samples that train with the empty caption. A table gives text encoders shares of their own, which are
    drawn independently: `caption_dropout = { text_encoder = 0.3, text_encoder_2 = 0.3 }`."""
    ema: EmaConfig | None = None
    """Keep an exponential moving average of the weights; previews, evaluation and exports use it."""

    @model_validator(mode="after")
    def _agree(self) -> TrainingConfig:
        if self.steps is None and self.epochs is None:
            raise refuse("", "how long? Give training.steps or training.epochs")
        if self.steps is not None and self.epochs is not None:
            way_out = "on the command line, the value none sets one aside: --training.steps none"
            raise refuse("epochs", f"give either training.steps or training.epochs, not both; {way_out}")
        if self.batch_size != "auto" and self.token_budget is None:
            largest = max(self.batch_size, *(one.size for one in self.batch_sizes), 0)
            if self.micro_batch_size is not None and self.micro_batch_size > largest:
                raise refuse("micro_batch_size", f"{self.micro_batch_size} is above batch_size = {largest}")
        if self.batch_size == "auto" and self.token_budget is None and self.micro_batch_size is not None:
            raise refuse("micro_batch_size", 'batch_size = "auto" finds how many samples fit at once; leave one out')
        return refuse_unread(self)

    def unread(self) -> dict[str, str]:
        return {} if self.token_budget is None else {"batch_size": "token_budget stands in its place"}


class Every(Section):
    """When something happens. Several may be given; each counts on its own."""

    every_steps: int | None = Field(default=None, gt=0)
    """Every so many optimiser steps."""
    every_epochs: float | None = Field(default=None, gt=0)
    """Every so many passes over the data."""
    every_examples: int | None = Field(default=None, gt=0)
    """Every so many samples."""


class CheckpointConfig(Every):
    every_minutes: float | None = Field(default=30.0, gt=0)
    """Every so many minutes."""
    keep: int = Field(default=2, gt=0)
    """Newest checkpoints to keep."""
    asynchronous: bool = True
    """Write while training goes on."""


class ExportConfig(Every):
    """Weights in the layouts that other tools read; the last step always exports."""

    dtype: Dtype = "bf16"
    """Type of the saved weights."""
    layouts: tuple[LayoutName, ...] | None = Field(default=None, min_length=1)
    """`diffusers`: an adapter that its pipelines load, or a diffusers directory of a whole network. `comfyui`: one file
    with the names that ComfyUI reads. Of adapters also `kohya` (names of Kohya's and LyCORIS' tools, with alpha) and
    `peft` (a directory for PEFT). Default: the first two; `peft` for `ia3`, which they cannot hold."""
    keep: int | None = Field(default=None, gt=0)
    """Newest exports to keep; default: all."""


class EvaluationSetConfig(Section):
    name: str = Field(min_length=1)
    """Name in the metrics: `{name}/loss_quantile_0.10`."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Held-out sources."""


class EvaluationConfig(Every):
    sets: tuple[EvaluationSetConfig, ...] = ()
    """Held-out sets."""
    before_first_step: bool = True
    """Evaluate the weights that the run starts from."""
    batch_size: int = Field(default=1, gt=0)
    """Samples per forward pass on one device."""

    @model_validator(mode="after")
    def _names_differ(self) -> EvaluationConfig:
        names = [one.name for one in self.sets]
        for name in names:
            if names.count(name) > 1:
                raise refuse("sets", f"two sets are called '{name}', their metrics would be mixed up")
        return self


class PreviewConfig(Every):
    prompts: tuple[str, ...] = ()
    """One video or picture is made of each."""
    images: tuple[UserPath, ...] = ()
    """Pictures to start from or to edit, as many for each prompt as the variant needs, in the order of the prompts."""
    before_first_step: bool = True
    """Preview the weights that the run starts from."""
    negative_prompt: str = ""
    """What the guidance leads away from."""
    height: int | None = Field(default=None, gt=0)
    """Default: the first bucket's."""
    width: int | None = Field(default=None, gt=0)
    """Default: the first bucket's."""
    frames: int | None = Field(default=None, gt=0)
    """Default: the longest bucket's."""
    fps: float | None = Field(default=None, gt=0)
    """Frame rate of the files. Default: `data.buckets.fps`."""
    steps: int = Field(default=30, gt=0)
    """Sampling steps."""
    guidance: float | None = Field(default=None, ge=0)
    """Guidance scale; 1 turns classifier-free guidance off. Default: what the variant's authors sample with."""
    image_guidance: float | None = Field(default=None, ge=0)
    """Guidance towards the control pictures, of models that have a scale for it. Default: their authors'."""
    seed: int = Field(default=0, ge=0)
    """Seed of the first preview; the others count up."""


class ParallelConfig(Section):
    dp_replicate: Count | Literal["auto"] = "auto"
    """Copies of the network that share the batch."""
    dp_shard: int = Field(default=1, gt=0)
    """Devices over which each copy's parameters, gradients and optimiser state are sharded (FSDP2)."""


class MonitoringConfig(Section):
    every_steps: int = Field(default=1, gt=0)
    """How often a line is written to `metrics.jsonl`."""
    tensorboard: bool = True
    """Write TensorBoard events to the run directory."""
    wandb: str | None = None
    """Weights & Biases project; needs the extra `wandb` and WANDB_API_KEY in the environment."""


class Config(Section):
    """One TOML file."""

    run: RunConfig = RunConfig()
    """Where the run is kept and what makes it repeatable."""
    model: ModelConfig
    """The model that is trained, and where its parts come from."""
    data: DataConfig
    """What it is trained on."""
    adapter: AdapterConfig | None = None
    """Train an adapter; without this table the whole network trains."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimised."""
    training: TrainingConfig
    """Length, batch, precision and memory of the training."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How weights are updated."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Training state, to resume from."""
    export: ExportConfig = ExportConfig()
    """Weights in the layouts that other tools read; the last step always exports."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Loss on held-out data."""
    preview: PreviewConfig = PreviewConfig()
    """Samples that are made while training goes on."""
    parallel: ParallelConfig = ParallelConfig()
    """How the run is laid over devices; start several with torchrun."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """What is written while training goes on."""

    @property
    def layouts(self) -> tuple[LayoutName, ...]:
        """The layouts of the exports: `export.layouts`, or the default for what is trained."""
        return self.export.layouts or default_layouts(self.adapter.type if self.adapter else None)

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Those of the training and of the held-out sets."""
        return (*self.data.sources, *(source for one in self.evaluation.sets for source in one.sources))

    @property
    def bucket_settings(self) -> tuple[BucketConfig, ...]:
        """The bucket settings of all sources, each once."""
        found = [source.buckets for source in self.all_sources if source.buckets is not None]
        return tuple(one for number, one in enumerate(found) if one not in found[:number])

    @model_validator(mode="after")
    def _settle_evaluation(self) -> Config:
        """Held-out sources get whole tables of captions and buckets too."""
        for one in self.evaluation.sets:
            object.__setattr__(one, "sources", tuple(settle_source(source, self.data) for source in one.sources))
        return self

    @model_validator(mode="after")
    def _layouts_hold_what_trains(self) -> Config:
        kind = self.adapter.type if self.adapter else None
        for layout in self.layouts:
            if reason := why_not(kind, layout):
                what = "a whole network" if kind is None else f'an adapter of type "{kind}"'
                raise refuse("export.layouts", f"{layout} cannot hold {what}: {reason}.")
        return self
