"""The whole configuration as typed models.

Every key that a user may write is a field here, with its documentation under it; ``kinema schema`` and the
reference page of the documentation are made from this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from kinema.config.data import BucketConfig, DataConfig, SourceConfig, settle_source
from kinema.config.layouts import LayoutName, default_layouts, why_not
from kinema.config.memory import Checkpointing, MemoryConfig
from kinema.config.model import AdapterConfig, ModelConfig
from kinema.config.optimizer import EmaConfig, OptimizerConfig, ScheduleConfig, settle_optimizer
from kinema.config.section import (
    Count,
    Dtype,
    Probability,
    Section,
    UserPath,
    refuse,
    refuse_unread,
)
from kinema.errors import ConfigError
from kinema.plugins import OBJECTIVES


class RunConfig(Section):
    dir: UserPath = Path("runs/run")
    """The run directory: everything that the training produces."""
    seed: int = Field(default=42, ge=0)
    """Seed of every random draw (weights of adapters, order, noise, times, dropout)."""
    deterministic: bool = False
    """On GPUs: bitwise repeatable kernels. Slower; on CPUs runs repeat to the bit anyway."""
    threads: int | None = Field(default=None, gt=0)
    """CPU threads for torch. Default: torch's own choice. Bitwise repeatability needs the same number."""


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
        try:
            OBJECTIVES.check(self.type)
        except ConfigError as error:
            raise refuse("type", str(error).removeprefix(f"{OBJECTIVES.key}: ").rstrip(".")) from None
        if self.options and OBJECTIVES.is_built_in(self.type):
            message = f"'{self.type}' comes with kinema and has its own keys; options are for other packages'"
            raise refuse("options", message)
        return self

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> ObjectiveConfig:
        if self.t_min >= self.t_max:
            raise refuse("t_min", f"{self.t_min} is not below t_max = {self.t_max}")
        return self


class BatchSizeConfig(Section):
    size: Count
    """Samples per optimiser step, over all devices."""
    resolution: Count | None = None
    """Buckets of about this side length (the square root of the area, at most 1.4 times away): of several, the nearest
    counts."""
    frames: Count | None = None
    """Buckets of this length. Default: any."""


TrainingAttention = Literal["sdpa", "cudnn", "flash", "flash_hub", "flash3_hub", "xformers"]
SamplingAttention = TrainingAttention | Literal["flash3", "sage", "sage_hub"]
"""The latter have no backward pass."""


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
    activation_checkpointing: Checkpointing = False
    """Compute activations again in the backward pass: of every block (`true`); of every block but for the results of
    attention and of matrix products, which are kept (`"selective"`); of every block, and of its parts once more, one by
    one (`"nested"`: the least memory, and about a fourth more time than `true`); of every n-th block (a number); or of
    a share of the blocks of each list, the first ones (`{ transformer_blocks = 0.4 }`)."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the repeated blocks (torch.compile, one compilation for all blocks of a kind). `auto`: on GPUs with
    Triton and a C compiler, for runs of 500 steps or more or by `epochs`, which win back the minutes that it takes."""
    float8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Compute the products of the blocks' linear layers in float8, forward and backward, where a whole network trains:
    with a scale for each matrix (`tensorwise`, the fastest) or for each row (`rowwise`, the more exact). Needs torchao
    (`pip install 'kinema[quant]'`) and a GPU with float8 (Ada, Hopper or newer), and pays with `compile`."""
    attention: TrainingAttention = "sdpa"
    """Whose attention the blocks use: torch's choice of its own kernels (`sdpa`) or its cuDNN one (`cudnn`),
    FlashAttention 2 as a package (`flash`) or ready-made from the hub (`flash_hub`, needs the package kernels),
    FlashAttention 3 from there (`flash3_hub`), `xformers`. Attention with a mask or in fp32 stays with torch."""
    fuse_qkv: bool = False
    """Compute queries, keys and values by one product where a whole network trains, in families whose attention can
    take them from one. Names and checkpoints stay as they are."""
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
    """Write while training goes on, from copies in the machine's memory: as much as a checkpoint has, counted by
    `kinema plan`."""


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


SequenceAttention = Literal["ulysses", "ring"]


class ParallelConfig(Section):
    auto: bool = False
    """Choose the plan when the run starts, by the forecast of `kinema plan`: the fastest that fits these devices. Sizes
    and `training.activation_checkpointing` that are given stay as they are."""
    dp_replicate: Count | Literal["auto"] = "auto"
    """Copies of the network that share the batch."""
    dp_shard: int = Field(default=1, gt=0)
    """Devices over which each copy's parameters, gradients and optimiser state are sharded (FSDP2)."""
    zero: int = Field(default=3, ge=1, le=3)
    """What `dp_shard` keeps in shards within a step (ZeRO level): parameters and gradients (3), gradients (2), or
    neither (1); the optimiser's state always is."""
    cpu_offload: bool = False
    """Keep shards of parameters, gradients and optimiser state in the host's memory; the optimiser runs there."""
    sp: int = Field(default=1, gt=0)
    """Devices that share the sequence of each sample: activations per device shrink by as much."""
    attention: SequenceAttention = "ulysses"
    """How devices that share a sequence attend to all of it: tokens for heads and back (`ulysses`), or keys and values
    that go round while tokens stay (`ring`)."""
    tp: int = Field(default=1, gt=0)
    """Devices that share each matrix of the blocks (tensor parallel)."""
    pp: int = Field(default=1, gt=0)
    """Devices of the pipeline: each holds some of the blocks, and micro-batches go from one to the next."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero_bubble"] = "1f1b"
    """In which order the pipeline's devices work."""
    stages_per_rank: int = Field(default=1, gt=0)
    """Stages that each device of an `interleaved` pipeline holds, at least 2."""
    partition: str = Field(default="parameters", examples=["parameters", "uniform", "regex:single_transformer"])
    """What the pipeline's stages have alike: `parameters`, blocks (`uniform`), or blocks whose name an expression finds
    (`regex:...`)."""
    split: tuple[Count, ...] = ()
    """How many blocks each stage of the pipeline has, in their order; instead of `partition`."""
    hang_seconds: float | None = Field(default=None, gt=0)
    """A process that does not go on for so long ends the run, with its name and where it stands. Default: five times
    the longest that any was at one place of a step so far, at least 45; half an hour before the first step is done."""

    @model_validator(mode="after")
    def _check_stages(self) -> ParallelConfig:
        if self.pp > 1 and (self.schedule == "interleaved") != (self.stages_per_rank > 1):
            given = "interleaved needs 2 or more" if self.stages_per_rank == 1 else 'above 1, schedule = "interleaved"'
            raise refuse("stages_per_rank", f'{self.stages_per_rank} with schedule = "{self.schedule}": {given}')
        if self.partition not in ("parameters", "uniform") and not self.partition.startswith("regex:"):
            raise refuse("partition", f'"{self.partition}" is none of "parameters", "uniform", "regex:..."')
        if self.partition.startswith("regex:"):
            pattern = self.partition.removeprefix("regex:")
            try:
                re.compile(pattern)
            except re.error as error:
                raise refuse("partition", f"'{pattern}' is no regular expression: {error}") from None
        return refuse_unread(self)

    def unread(self) -> dict[str, str]:
        if self.auto:  # which of them will be read is not known yet
            return {}
        pipeline = ("schedule", "stages_per_rank", "partition", "split") if self.pp == 1 else ()
        unread = dict.fromkeys(pipeline, "pp = 1 is no pipeline")
        if self.sp == 1:
            unread["attention"] = "sp = 1 shares no sequence"
        if self.dp_shard == 1:
            unread["zero"] = "dp_shard = 1 shards nothing"
            unread["cpu_offload"] = (
                "it moves the shards of dp_shard, which is 1. For one device, training.activation_checkpointing, "
                'an [adapter] and model.network.dtype = "bf16" or "fp8" save memory'
            )
        return unread | ({"partition": "split stands in its place"} if self.split and self.pp > 1 else {})


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
    memory: MemoryConfig = MemoryConfig()
    """What waits in the host's memory during a step."""
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
    def _settle_optimizer(self) -> Config:
        object.__setattr__(self, "optimizer", settle_optimizer(self))
        return self

    @model_validator(mode="after")
    def _layouts_hold_what_trains(self) -> Config:
        kind = self.adapter.type if self.adapter else None
        for layout in self.layouts:
            if reason := why_not(kind, layout):
                what = "a whole network" if kind is None else f'an adapter of type "{kind}"'
                raise refuse("export.layouts", f"{layout} cannot hold {what}: {reason}.")
        return self
