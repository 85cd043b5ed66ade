"""The tables of the optimiser, of the learning rate over the run, and of the moving average."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from kinema.config.section import Section, refuse, refuse_unread
from kinema.errors import ConfigError
from kinema.plugins import OPTIMIZERS

if TYPE_CHECKING:
    from kinema.config.schema import Config

Options = dict[str, bool | int | float | str | tuple[float, ...]]
Decay = Annotated[float, Field(ge=0, lt=1)]

LIBRARIES = ("pytorch_optimizer", "torch")
"""What classes may be named from, as ``torch.SGD``."""
COMMON = ("type", "lr", "part_lr", "groups", "lora_plus", "weight_decay", "state_on_cpu", "gradient_release")
"""Keys that every type reads."""
ADAM = ("betas", "beta2_half_life", "eps")
SUBSPACE = ("projection", "rank", "refresh_steps")
MATRICES = ("variant", "orthogonalisation")
READS: dict[str, tuple[str, ...]] = {
    "adamw": (*ADAM, "rounding"),
    "adamw8bit": (*ADAM, "rounding"),
    "generic": (*ADAM, "rounding", "first_moment", "second_moment", *SUBSPACE, *MATRICES),
    "muon": (*ADAM, "momentum", "matrix_lr", *MATRICES),
    "automagic": ("min_lr", "max_lr", "lr_bump", "rounding"),
    "lion": ("betas", "options"),
    "adafactor": ("options",),
    "prodigy": (*ADAM, "options"),
    "schedulefree": (*ADAM, "options"),
}
"""What each type reads beside the common keys. A named class of a library reads `options`; an optimiser of another
package may read anything."""
OWN_LR = {"prodigy": 1.0, "automagic": 1e-6}
"""Learning rates of types that another default suits than `lr`'s."""


def library_of(kind: str) -> tuple[str, str] | None:
    """``("torch", "SGD")`` of the type ``torch.SGD``; None for a type that names no class of a library."""
    library, _, name = kind.partition(".")
    return (library, name) if name and library in LIBRARIES else None


class OptimizerGroupConfig(Section):
    pattern: str = Field(min_length=1)
    """A regular expression that is found anywhere in the names of its weights, such as
    `network.blocks.0.attn1.to_q.weight`; the first group whose expression is found counts."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of these weights, `optimizer.lora_plus` left aside. Default: what they have without a
    group."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of these weights; vectors have none here either. Default: `optimizer.weight_decay`."""

    @model_validator(mode="after")
    def _says_something(self) -> OptimizerGroupConfig:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise refuse("pattern", f"'{self.pattern}' is no regular expression: {error}") from None
        if self.lr is None and self.weight_decay is None:
            raise refuse("", "a group gives its weights another lr or weight_decay, and this one gives neither")
        return self


class OptimizerConfig(Section):
    type: str = Field(default="adamw", examples=["adamw", "adamw8bit", "muon", "automagic", "prodigy", "torch.SGD"])
    """`adamw`; `adamw8bit`, whose moments take a byte each; `muon`, which takes the matrices of the blocks and leaves
    the rest to AdamW; `generic`, whose moments can be smaller (`first_moment`, `second_moment`); `automagic`, which
    finds a learning rate for each weight; of the extra `optim` `lion`, `adafactor`, `prodigy` and `schedulefree`. Any
    class by its name: `torch.SGD` or `pytorch_optimizer.CAME`. Other packages may add optimisers."""
    options: Options = {}
    """Arguments of the optimiser's class that have no key here, such as `{ d_coef = 0.5 }` of `prodigy`."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate. `automagic` starts from it, by default at 1e-6; `prodigy` multiplies what it finds by it, by
    default 1."""
    part_lr: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Peak learning rates of parts that have their own, where several train: `part_lr = { text_encoder = 1e-5 }`."""
    groups: tuple[OptimizerGroupConfig, ...] = ()
    """Weights with a learning rate or a weight decay of their own, by their names."""
    lora_plus: float | None = Field(default=None, gt=0)
    """LoRA+: how many times the learning rate the second factors (B) of a `lora` or `dora` have; its authors take
    16."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay rates of the averages of the gradient and of its square."""
    beta2_half_life: float | None = Field(default=None, gt=0)
    """Instead of the second of `betas`: the number of samples after which a squared gradient counts half. It needs a
    batch size that is one number."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the square root of the average of squared gradients."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; vectors (biases, norms) have none."""
    rounding: Literal["none", "stochastic", "kahan"] = "none"
    """How updates reach weights that train in bf16, in which small ones round to nothing: `stochastic` rounds up or
    down by chance, right on average; `kahan` keeps what was rounded off and adds it to the next update."""
    momentum: Decay = 0.95
    """Muon's momentum."""
    matrix_lr: float | None = Field(default=None, gt=0)
    """Learning rate of Muon's matrices, scaled to match AdamW's update size; default: `lr`."""
    min_lr: float = Field(default=1e-7, gt=0)
    """The smallest learning rate that `automagic` gives a weight."""
    max_lr: float = Field(default=1e-3, gt=0)
    """The largest."""
    lr_bump: float = Field(default=1e-6, gt=0)
    """What `automagic` adds to a weight's learning rate where its updates agree in sign, and takes off where not."""
    variant: Literal["muon", "adamuon", "normuon"] | None = None
    """How the blocks' matrices are updated by their orthogonalised momentum: `muon`; `adamuon`, with a second moment of
    each element of it; `normuon`, with one of each of its lines. Default: `muon` for `muon`; `generic` divides by the
    second moment instead."""
    orthogonalisation: Literal["newton_schulz", "polar_express"] = "newton_schulz"
    """The five iterations that orthogonalise: those of Muon's author, or Polar Express, which come nearer."""
    first_moment: Literal["full", "subspace", "none"] = "full"
    """The average of the gradient that `generic` keeps: `full`; of the blocks' matrices only what lies in a `subspace`,
    the rest of each gradient counting as it is; or `none`."""
    second_moment: Literal["full", "subset_norm", "none"] = "full"
    """The average of the gradient's square that `generic` keeps: `full`; one number for each line along the longer side
    of a block's matrix (`subset_norm`); or `none`, without which updates are as large as gradients."""
    projection: Literal["svd", "topk", "uniform", "srht"] = "svd"
    """The subspace: the gradient's first singular vectors (`svd`), its largest lines (`topk`), lines at random
    (`uniform`), or random directions (`srht`, a subsampled randomised Hadamard transform)."""
    rank: int = Field(default=128, gt=0)
    """Dimensions of the subspace. Matrices without more keep a full first moment."""
    refresh_steps: int = Field(default=200, gt=0)
    """After so many steps the subspace is chosen anew, and its average begins at zero."""
    state_on_cpu: bool = False
    """Keep what the optimiser remembers in the host's memory; it comes to the GPU for a few weights at a time."""
    gradient_release: bool = False
    """Update each weight within the backward pass as soon as its gradient is there, and let the gradient go: all of
    them are never in memory at once. It needs `training.clip_norm = "none"` and one micro-batch in a step."""

    @model_validator(mode="after")
    def _known(self) -> OptimizerConfig:
        found = library_of(self.type)
        if found is None:
            try:
                OPTIMIZERS.check(self.type)
            except ConfigError as error:
                known = str(error).removeprefix(f"{OPTIMIZERS.key}: ").rstrip(".")
                raise refuse("type", f"{known}; or a class of a library, such as torch.SGD") from None
        return refuse_unread(self)

    @model_validator(mode="after")
    def _agree(self) -> OptimizerConfig:
        if self.type == "automagic" and not self.min_lr <= self.lr_or_own <= self.max_lr:
            raise refuse("lr", f"automagic starts at {self.lr_or_own}, outside of {self.min_lr} to {self.max_lr}")
        if self.type == "automagic" and self.max_lr - self.min_lr > 32000 * self.lr_bump:
            raise refuse("lr_bump", f"{self.lr_bump} is less than 1/32000 of the way from min_lr to max_lr")
        if self.type == "generic" and self.variant is not None and self.second_moment == "subset_norm":
            raise refuse(
                "second_moment",
                f'"subset_norm" with variant = "{self.variant}": matrices are orthogonalised and divide by none, '
                'vectors have "full". Give "full" or "none", or leave variant out',
            )
        object.__setattr__(self, "lr", self.lr_or_own)
        return self

    @property
    def lr_or_own(self) -> float:
        """`lr`, or the type's own default where none was given."""
        return self.lr if "lr" in self.model_fields_set else OWN_LR.get(self.type, self.lr)

    def unread(self) -> dict[str, str]:
        library = library_of(self.type)
        if library is None and not OPTIMIZERS.is_built_in(self.type):
            return {}
        read = {*COMMON, *(READS[self.type] if library is None else ("options",))}
        reason = f'type = "{self.type}" has no such setting'
        found = {key: reason for key in type(self).model_fields if key not in read}
        if "options" in found:
            found["options"] = f"'{self.type}' comes with kinema and has its own keys; options are for other packages'"
        elif library is not None:
            found |= dict.fromkeys((*ADAM, "momentum"), f"arguments of {self.type} go into options = {{ ... }}")
        if self.type == "generic" and self.first_moment != "subspace":
            found |= dict.fromkeys(SUBSPACE, f'first_moment = "{self.first_moment}" has no subspace')
        if self.type == "generic" and self.variant is None:
            found["orthogonalisation"] = "only variant = ... orthogonalises"
        return found


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


def settle_optimizer(config: Config) -> OptimizerConfig:
    """The optimiser's table with what follows from other tables; refuses what does not go with them."""
    optimizer, training = config.optimizer, config.training
    if optimizer.lora_plus is not None and (config.adapter is None or config.adapter.type not in ("lora", "dora")):
        trained = "no [adapter]" if config.adapter is None else f'an adapter of type "{config.adapter.type}"'
        raise refuse("optimizer.lora_plus", f"it is for the B factors of a lora or dora, and this run has {trained}")
    if optimizer.type == "schedulefree" and training.ema is not None:
        raise refuse("training.ema", 'optimizer.type = "schedulefree" keeps an average of its own; leave one out')
    if optimizer.beta2_half_life is None:
        return optimizer
    if training.batch_size == "auto" or training.batch_sizes or training.token_budget is not None:
        raise refuse(
            "optimizer.beta2_half_life",
            "it counts samples, and batches of this run differ in size; give the second of betas, or one batch_size",
        )
    first, second = optimizer.betas
    from_half_life = 0.5 ** (training.batch_size / optimizer.beta2_half_life)
    if second not in (OptimizerConfig().betas[1], from_half_life):
        raise refuse("optimizer.beta2_half_life", f"it stands in the place of the second of betas, which is {second}")
    return optimizer.model_copy(update={"betas": (first, from_half_life)})
