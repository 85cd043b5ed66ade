"""From a configuration to a trained model: checks first, then what is cheap, then what is expensive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.config.schema import Config, ParallelConfig
from kinema.dtypes import torch_dtype
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.plugins import OBJECTIVES
from kinema.training.memory_checks import check_memory, settle_offload
from kinema.training.networks import (
    FamilyDenoiser,
    block_matrices,
    check_networks,
    evaluating,
    load_networks,
    pipeline_over,
    take_weights,
)
from kinema.training.optimizer_checks import check_optimizer
from kinema.training.preflight import (
    check_compute,
    check_pipeline,
    check_shares,
    keep_within,
    make_writable,
    repeat_exactly,
    resolve,
)
from kinema.training.progress import Progress, due
from kinema.training.resume import ResumeOptions, check_data, set_aside_exports
from kinema.training.start import Start, find_start, settle_bases

if TYPE_CHECKING:
    from kinema.parallel.mesh import World
    from kinema.parallel.watch import Watch
    from kinema.training.display import TrainingDisplay
    from kinema.training.loop import StepResult, Trainer, Work
    from kinema.training.run_data import RunData


def train(config: Config, options: ResumeOptions | None = None) -> Path:
    """Run a training to its end (or to a request to quit); returns the run directory."""
    from kinema.parallel.mesh import start, stop
    from kinema.parallel.watch import Watch

    family = open_family(config.model, config.run.seed)
    family.validate(config)
    options = options or ResumeOptions()
    repeat_exactly(config)
    world = start(ParallelConfig() if config.parallel.auto else config.parallel)
    said: tuple[str, ...] = ()
    config = resolve(config, world.device)
    if config.parallel.auto or config.memory.budget is not None:
        from kinema.training.auto_plan import lay_out_by_itself

        keep_within(config.memory.budget, world.device)
        config, world, said = lay_out_by_itself(config, world, options.resume)
    config, more = settle_offload(config, family, world, options.resume)
    said += more
    with Watch(world, config.parallel.hang_seconds) as watch:
        run = Run(config, options, family, world, watch)
        for line in said:
            run.say(line)
        run.train()
    stop()
    return config.run.dir


class Run:
    """One training: its parts in the order in which they are made, then the loop and what happens between steps."""

    def __init__(self, config: Config, options: ResumeOptions, family: Family, world: World, watch: Watch) -> None:
        from kinema.training.display import TrainingDisplay

        self.config, self.options, self.family, self.world, self.watch = config, options, family, world, watch
        self.directory = config.run.dir
        self.display: TrainingDisplay = TrainingDisplay(0, 0, world.device, world.is_main)
        self.say = self.display.say

    def prepare(self) -> None:
        """Everything before the first step: checks, data, networks, what an earlier process left."""
        from kinema.training.metrics import check_monitoring
        from kinema.training.previews import Previewer

        self.config, self.family = settle_bases(self.config, self.family, self.options, self.world, self.say)
        self.previewer = Previewer(self.config, self.family, self.world)  # refuses what cannot be previewed
        check_monitoring(self.config.monitoring)
        check_shares(self.config, self.world)
        plans = check_networks(self.config, self.family)
        check_optimizer(self.config, self.family, self.world.sizes, plans)
        check_pipeline(self.config, self.family, self.world.sizes)
        check_memory(self.config, self.family, self.world.sizes, self.world.device)
        check_compute(self.config, self.family, self.world)
        self.config, start = find_start(self.config, self.options, self.world, self.say)
        make_writable(self.directory)
        self._open_data(start.meta)
        self._build(start)
        self._describe_run(start)

    def train(self) -> None:
        """The whole run."""
        from kinema.memory.compile import telling_when
        from kinema.training.display import TrainingDisplay
        from kinema.training.loop import run_steps
        from kinema.training.requests import Requests

        self.prepare()
        trainer = self.trainer
        display = TrainingDisplay(trainer.total_steps, trainer.progress.step, self.world.device, self.world.is_main)
        self.display, self.say = display, display.say
        try:
            minutes = self.config.checkpoint.every_minutes
            with (
                display,
                Requests(self.directory, minutes) as self.requests,
                self.batches() as batches,
                telling_when(self.watch.compiles, bool(self.config.training.compile) and self.world.size > 1),
                self._ending_patiently(),
            ):
                if trainer.progress.step == 0:
                    self._before_first_step()
                run_steps(trainer, batches, self.requests, self.after_step)
            self._finish()
        finally:
            self.close()

    @contextmanager
    def _ending_patiently(self) -> Iterator[None]:
        """After an error what is being written is finished before the others hear of it, which may take its time."""
        try:
            yield
        except BaseException as error:
            self.watch.at(f"the end after {type(error).__name__}", patient=True)
            raise

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.checkpointer.close()
        finally:
            self.metrics.close()

    # -- data --------------------------------------------------------------------------------------------------------

    def _open_data(self, meta: dict[str, Any] | None) -> None:
        from kinema.training.run_data import RunData

        options = self.options
        recorded = None if meta is None or options.reset_data else meta["batch_sizes"]
        self.data: RunData = RunData(
            self.config, self.family, self.world, self.say, recorded=recorded, regenerate=options.regenerate
        )
        if meta is not None:
            check_data(meta["dataset"], self.data.training.fingerprint, options)
        self.data.hold_out()

    @contextmanager
    def batches(self) -> Iterator[Iterator[Work]]:
        """This rank's work from the current step on, built ahead in the background."""
        from kinema.data.prefetch import Prefetcher

        progress = self.trainer.progress

        def build(step: int) -> Work:
            return self.data.work(step - progress.data_start)

        with Prefetcher(build, progress.step, self.trainer.total_steps) as self.prefetcher:
            yield iter(self.prefetcher)

    # -- networks ----------------------------------------------------------------------------------------------------

    def _build(self, start: Start) -> None:
        """Load, adapt, lay out and restore everything that a step touches."""
        from kinema.optim.ema import Ema
        from kinema.optim.host_state import on_host
        from kinema.optim.optimizers import build_optimizers
        from kinema.optim.release import GradientRelease
        from kinema.optim.scale import LossScale
        from kinema.parallel.data import accumulate
        from kinema.runs.trained import named_trainables
        from kinema.training.checkpoint import Checkpointer
        from kinema.training.loop import Trainer
        from kinema.training.state import load_training_state

        config, training = self.config, self.config.training
        self.networks = load_networks(config, self.family, self.world)
        self.checkpointer = Checkpointer(
            self.directory / "checkpoints", config.checkpoint.keep, config.checkpoint.asynchronous, self.world
        )
        if start.weights is not None:
            self.say(take_weights(self.checkpointer, start.weights, self.networks))
        parameters = named_trainables(self.networks)
        matrices = block_matrices(self.networks, self.family)
        optimizers = build_optimizers(parameters, matrices, config.optimizer, config.run.seed)
        if config.optimizer.state_on_cpu:
            optimizers = on_host(optimizers, self.world.device)
        release = None
        if config.optimizer.gradient_release:
            release = GradientRelease(optimizers, hooks=self.world.sizes.dp * self.world.sizes.sp == 1)
        self.ema = None if training.ema is None else Ema(parameters.items(), training.ema.decay)
        scale = LossScale() if training.precision == "fp16" else None

        progress = Progress()
        if (meta := start.meta) is not None:
            assert start.checkpoint is not None
            kept_optimizers = [] if self.options.reset_optimizer else optimizers
            load_training_state(self.checkpointer, start.checkpoint, self.networks, kept_optimizers, self.ema)
            progress = Progress(**meta["progress"])
            if scale is not None and meta["loss_scale"] is not None:
                scale.load_state_dict(meta["loss_scale"])

        @contextmanager
        def accumulating(last: bool) -> Iterator[None]:
            with ExitStack() as stack:
                for network in self.networks.values():
                    stack.enter_context(accumulate(network, last, None if release is None else release.update))
                yield

        self.trainer: Trainer = Trainer(
            config=config,
            world=self.world,
            networks={"student": FamilyDenoiser(self.family, self.networks)},
            parameters=parameters,
            objective=OBJECTIVES.load(config.objective.type)(config.objective, self.family),
            optimizers=optimizers,
            compute_dtype=torch_dtype(training.precision),
            progress=self._reset(progress),
            ema=self.ema,
            scale=scale,
            release=release,
            pipeline=pipeline_over(self.networks, config, self.world),
            accumulating=accumulating,
            at=self.watch.at,
            before_update=self.checkpointer.wait_for_staging,
        )
        self.data.settle(self.trainer, self.networks)
        self.trainer.total_steps = self._total_steps()

    def _reset(self, progress: Progress) -> Progress:
        """Begin the data order and the schedule afresh, where that is asked for."""
        if self.options.reset_data:
            progress = replace(progress, data_start=progress.step, epochs=0.0)
        if self.options.reset_lr:
            progress = replace(progress, lr_start=progress.step)
        return progress

    def _total_steps(self) -> int:
        """Length of the run."""
        training = self.config.training
        if training.steps is not None:
            return training.steps
        assert training.epochs is not None
        steps = self.data.training.order.steps_for(training.epochs)
        return self.trainer.progress.data_start + max(1, steps)

    # -- between steps -----------------------------------------------------------------------------------------------

    def _describe_run(self, start: Start) -> None:
        """The run directory's description, metrics and preview maker; what will be trained is printed."""
        from kinema.training.metrics import Metrics
        from kinema.training.rundir import environment, write_description

        config, world, progress = self.config, self.world, self.trainer.progress
        if world.is_main:
            facts = environment(self.data.training.fingerprint, str(world.device), world.size)
            write_description(self.directory, config, facts)
            self.data.record(self.directory)
            if start.branches and (aside := set_aside_exports(self.directory, progress.step)):
                self.say(f"Exports of later steps were moved to {aside}: the run takes another way from here")
        self.metrics = Metrics(
            self.directory, config.monitoring, progress.step, config.model_dump(mode="json"), world.is_main
        )
        count = sum(p.numel() for p in self.trainer.parameters.values())
        if self.trainer.pipeline is not None:
            count = self.trainer.pipeline.count_trained(self.trainer.parameters.values())
            self.say(self.trainer.pipeline.describe(config.training.micro_batch_size))
        self.say(
            f"Training {count / 1e6:.2f}M parameters in {config.training.precision} on {world.size} x "
            f"{world.device.type}: {self.data.steps_in_words(self.trainer.total_steps)}, from step {progress.step}. "
            f"Run directory: {self.directory}"
        )

    def _before_first_step(self) -> None:
        self.watch.at("before the first step", patient=True)
        if self.config.evaluation.sets and self.config.evaluation.before_first_step:
            self.metrics.log(0, self._evaluate())
        if self.config.preview.prompts and self.config.preview.before_first_step:
            self._preview()

    def after_step(self, before: Progress, result: StepResult, seconds: float) -> None:
        """Log, evaluate, preview, export and, last, save: what a resumed run repeats after the checkpoint's step."""
        from kinema.training.loop import describe
        from kinema.training.requests import SAVE

        self.watch.step_done()
        config, progress = self.config, self.trainer.progress
        self.display.step(progress.step, result.loss, seconds)
        row: dict[str, float] = {}
        if progress.step % config.monitoring.every_steps == 0 or progress.step == self.trainer.total_steps:
            extra = {
                "examples": progress.examples,
                "epoch": progress.epochs,
                "wait_share": self.prefetcher.wait_share,
            }
            row = describe(result, seconds, extra)
        if config.evaluation.sets and due(config.evaluation, before, progress):
            row |= self._evaluate()
        if row:
            self.metrics.log(progress.step, row)
        if config.preview.prompts and due(config.preview, before, progress):
            self._preview()
        last = progress.step == self.trainer.total_steps
        if due(config.export, before, progress) or last:
            self._export()
        if due(config.checkpoint, before, progress) or last or result.asked & SAVE:
            self._save()

    def _save(self) -> None:
        from kinema.training.state import averages_in_use, optimizer_numbers, training_state, what_trains

        self.watch.at("checkpoint", patient=True)
        scale = self.trainer.scale
        meta = {
            "config": self.config.model_dump(mode="json"),
            "progress": self.trainer.progress.to_dict(),
            "dataset": self.data.training.fingerprint,
            "batch_sizes": self.data.kept(),
            "loss_scale": None if scale is None else scale.state_dict(),
            "optimizer_numbers": optimizer_numbers(self.networks, self.trainer.optimizers),
            "trained": what_trains(self.config, self.family, self.networks),
        }
        tensors = training_state(self.networks, self.trainer.optimizers, self.ema)
        tensors |= averages_in_use(self.networks, self.trainer.optimizers)
        self.checkpointer.save(self.trainer.progress.step, tensors, meta)
        self.requests.saved()

    def _averaged(self) -> Any:
        """Inside, the networks hold the average if there is one, of ours or of a schedule-free optimiser."""
        from kinema.optim.library import averaged_weights

        return averaged_weights(self.trainer.optimizers) if self.ema is None else self.ema.swapped()

    def _evaluate(self) -> dict[str, float]:
        import torch

        from kinema.training.evaluation import evaluate
        from kinema.training.loop import keeps_casts

        self.watch.at("evaluation", patient=True)
        t, size, world = self.trainer, self.config.evaluation.batch_size, self.world
        losses: dict[str, float] = {}
        cached, enabled = keeps_casts(self.config, world), t.compute_dtype != torch.float32
        autocast = torch.autocast(world.device.type, t.compute_dtype, enabled=enabled, cache_enabled=cached)
        with self._averaged(), evaluating(self.networks.values()), autocast:
            for name, data in self.data.held_out.items():
                batches = data.ordered_batches(size, world.dp_rank, world.dp_size)
                losses |= evaluate(name, batches, t.objective, t.networks, self.config.run.seed, world)
        self.say("  ".join(f"{name} {value:.4f}" for name, value in losses.items() if "quantile" not in name))
        return losses

    def _preview(self) -> None:
        self.watch.at("previews", patient=True)
        with self._averaged(), evaluating(self.networks.values()):
            self.previewer.preview(self.trainer.progress.step, self.networks)

    def _export(self) -> None:
        from kinema.training.export import export_weights

        self.watch.at("export", patient=True)
        step = self.trainer.progress.step
        with self._averaged():
            export_weights(self.directory / "exports", step, self.family, self.networks, self.config, self.world)

    def _finish(self) -> None:
        from kinema.ui.report import write_report

        self.checkpointer.wait()
        if self.world.is_main:
            self.say(f"Report: {write_report(self.directory)}")
