"""``kinema sample``: prompts in, files out, with an index beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.data.files import absolute
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.sampling.first_picture import FirstPicture, pictures_of, wanted
from kinema.sampling.index import add_to_index, prepare_index, read_index, there_already
from kinema.sampling.jobs import Job, check_sources, job_again, read_order
from kinema.sampling.kernels import Kernels
from kinema.sampling.offload import check_offload, choose_offload, let_go, out_of_memory_advice
from kinema.sampling.planning import Plan, companions
from kinema.sampling.provenance import essence, image_contents, machine_facts
from kinema.sampling.settings import DYNAMIC, read_options
from kinema.sampling.together import Rank, Together, check_together, sequence_attention, together
from kinema.sampling.wording import Wording
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    import torch

    from kinema.sampling.pipeline import OnStep, SampleSettings

DTYPES = ("fp32", "bf16", "fp16")


def sample(
    prompts: Sequence[str] | None = None,
    *,
    prompt_list: Path | str | None = None,
    rows: str | None = None,
    ignore_columns: Sequence[str] | None = None,
    repeat: Path | str | None = None,
    again: bool | None = None,
    run: Path | str | None = None,
    model: str | None = None,
    family: str | None = None,
    variant: str | None = None,
    adapter: Sequence[Path | str] = (),
    negative: str | None = None,
    images: Sequence[Path | str] = (),
    height: int | None = None,
    width: int | None = None,
    resolution: str | None = None,
    aspect_ratio: str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    image_guidance: float | None = None,
    shift: float | None = None,
    condition: str | None = None,
    text_osci: bool | None = None,
    image_osci: bool | None = None,
    temporal_osci: bool | None = None,
    full_steps: int | None = None,
    extend: int | None = None,
    overlap: int | None = None,
    edit: float | None = None,
    motion: float | str | None = None,
    aesthetic: float | None = None,
    tell_fps: bool | None = None,
    refine_prompt: bool = False,
    prompt_url: str | None = None,
    prompt_model: str | None = None,
    seed: int | None = None,
    num_samples: int = 1,
    out: Path | str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    ema: bool | None = None,
    first: FirstPicture | None = None,
    offload: str = "auto",
    tiling: str | None = None,
    tile_size: int | None = None,
    tile_frames: int | None = None,
    crf: int | None = None,
    sp: int = 1,
    sp_attention: str | None = None,
    attention_backend: str | None = None,
    fuse_qkv: bool = False,
) -> list[Path]:
    """Write ``num_samples`` files for each prompt, with the seeds ``seed``, ``seed`` + 1, ...; returns their paths.

    Files are ``OUT/<prompt's words>-<seed>.mp4``, or ``.png`` where ``frames`` is 1, each with its settings inside and
    in a ``.json`` beside it; `index.jsonl` has a line for each. ``resolution`` ("256px", "480p") and ``aspect_ratio``
    ("16:9", "auto") say the size in the place of ``height`` and ``width``. ``condition``, the oscillation of guidance
    and ``extend`` are in `kinema.families.steering.Steering`. ``motion``, ``aesthetic`` and the frame rate are
    written after each prompt as captions have them (see `kinema.sampling.request.told_scores`). What else is None is
    the run's preview setting, or what the variant's authors use.

    ``prompt_list``: a file of prompts in the place of ``prompts``, whose rows may have settings of their own
    (`kinema.sampling.lists`); ``rows`` of it as a slice, ``ignore_columns`` for columns that are not read.
    ``repeat``: a file that was written so: drawn again from its settings and weights, those that are given here in the
    place of its own. A file that is there already with these settings is not drawn, unless ``again``.

    ``refine_prompt``: a chat model at ``prompt_url`` writes the prompts out; with ``motion`` "dynamic" it gives their
    motion scores too.

    ``first``: what draws a picture for every sample without one, which its video then begins with
    (`kinema.sampling.first_picture`). ``offload``: what of the model is on the device only while it works
    (`kinema.sampling.offload`). ``tiling``, ``tile_size``, ``tile_frames``: the autoencoder in tiles
    (`kinema.sampling.tiling`). ``crf``: of the videos' compression, 0 (lossless) to 51.

    Under torchrun the pipeline's calls are shared out over the ranks, and each rank returns the paths of its own. With
    ``sp`` above 1 so many ranks draw each sample together (`kinema.sampling.together`), and the first of them has it;
    ``sp_attention``: "ulysses" or "ring", as ``parallel.attention`` of a training. ``attention_backend``: whose
    attention the network uses, ``fuse_qkv``: whether it computes queries, keys and values at once
    (`kinema.sampling.kernels`).
    UserError, before anything is loaded, for what cannot be made.
    """
    given = locals()
    source: dict[str, Any] = {"run": run if run is None else Path(run), "model": model, "family": family}
    source |= {"variant": variant, "adapters": adapter, "ema": ema}
    pictures = [absolute(str(image)) for image in images]
    rank = Rank.of_environment(sp)
    with rank.one_voice():
        rank.check()
        attention = sequence_attention(sp_attention, sp)
        options = read_options(given)
        options["num_samples"] = None if num_samples == 1 else num_samples
        if dtype is not None and dtype not in DTYPES:
            near = did_you_mean(dtype, DTYPES)
            raise UserError(f"--dtype {dtype}: there is no such type{near} Known: {', '.join(DTYPES)}.")
        check_offload(offload)
        check_sources(prompts or (), prompt_list, repeat, rows, ignore_columns)
        painter = wanted(first, pictures, repeat)
        folder = None if out is None else Path(out)
        if repeat is not None:
            if refine_prompt or options["motion"] == DYNAMIC:
                raise UserError("--from draws with the prompt and the scores of its file: leave --refine-prompt away.")
            order = None
            job = job_again(Path(repeat), prompts or (), pictures, options, source, folder)
        else:
            listed = None if prompt_list is None else (str(prompt_list), rows, ignore_columns or ())
            wording = Wording(refine_prompt, prompt_url, prompt_model)
            order = read_order(prompts or (), listed, pictures, options, source, folder, wording, painter)
            job = order.job()
        check_together(sp, job.plan.weights.family)
        where = _named_device(device or job.device, rank, device)
    _probe(where, rank, device)
    kind = _dtype_for(where, dtype or job.dtype)
    kernels = Kernels(attention_backend or "sdpa", fuse_qkv)
    with rank.one_voice():
        kernels.check(job.plan.weights.family, where, kind, attention if sp > 1 else None)
    if order is not None:  # whoever is asked may cost money: all else is right by now
        with rank.one_voice():
            job = order.worded(job, first=rank.number == 0)
    groups = job.plan.calls[rank.share :: rank.shares]
    with out_of_memory_advice(where), together(sp, where, attention) as others:
        if job.first is not None:
            own = pictures_of(groups, job.plan, job.first.plan)
            said_once = "auto" if where.type == "cpu" else offload
            of_first = Kernels(kernels.attention)
            _write_all(job.first, own, rank, others, where, kind, said_once, of_first, again=bool(again))
            let_go(where)
        return _write_all(job, groups, rank, others, where, kind, offload, kernels, again=bool(again))


# -- drawing ---------------------------------------------------------------------------------------------------------


def _write_all(
    job: Job,
    groups: Sequence[Sequence[int]],
    rank: Rank,
    others: Together,
    device: torch.device,
    dtype: torch.dtype,
    offload: str,
    kernels: Kernels,
    *,
    again: bool,
) -> list[Path]:
    """Load, draw and write these calls of the job's plan; a file and its line in the index are there as soon as its
    sample is drawn. Of ranks that draw together the first writes."""
    from kinema.sampling.pipeline import sample_many
    from kinema.sampling.weights import load_parts
    from kinema.sampling.writing import write_sidecar, write_video

    plan, weights = job.plan, job.plan.weights
    machine = {**machine_facts(device, dtype), **kernels.facts}
    entry_of = _entries(plan, groups, {**job.facts, **machine})
    names = {i: plan.drawings[i].file for group in groups for i in group if plan.drawings[i].file}
    index = {} if again or not rank.writes else read_index(plan.folder)

    def is_there(i: int) -> bool:
        there = not again and (plan.folder / names[i]).is_file()
        return there and there_already(plan.folder, names[i], essence(entry_of(i)), index)

    # the first of those that draw together looks, since it mends what is missing beside a file
    there = others.agreed({i for i in names if is_there(i)} if rank.writes else set())
    groups = tuple(group for group in groups if any(i in names and i not in there for i in group))
    settings = [plan.drawings[i].settings for group in groups for i in group]
    with _progress(settings, rank) as (advance, say):

        def on_step(group: Sequence[int], step: int, steps: int) -> None:
            advance(group, step, steps)
            others.steps.done(step, settings[group[0]].steps)

        for note in (*plan.notes, *_machine_notes(job.stored, machine)):
            say(note)
        if there:
            say(f"{len(there)} of {len(names)} are there already; --again draws them anew.")
        if groups:
            if rank.writes:
                prepare_index(plan.folder, [name for i, name in names.items() if i not in there])
            say(f"Loading {weights.label}")
            kind, note = choose_offload(offload, weights.family, device, dtype)
            if note:
                say(note)
            parts = load_parts(weights, device if kind == "none" else "cpu", dtype)
            others.split(weights.family, parts)
            kernels.install(weights.family, parts)
            pipeline = weights.family.pipeline(parts)
            pipeline.set_progress_bar_config(disable=True)
            samples = sample_many(
                weights.family,
                pipeline,
                settings,
                device,
                on_step,
                groups=_positions(map(len, groups)),
                offload=kind,
            )
            for i, frames in zip([i for group in groups for i in group], samples, strict=True):
                if rank.writes and i in names and i not in there:
                    path, entry = plan.folder / names[i], entry_of(i)
                    write_video(frames, path, plan.drawings[i].fps, entry, plan.drawings[i].crf)
                    write_sidecar(path, entry)
                    add_to_index(plan.folder, {"file": path.name, **entry})
                    say(str(path))
    others.agreed(None)  # they wait for what the first has written
    return [plan.folder / name for name in names.values()] if rank.writes else []


def _entries(plan: Plan, groups: Sequence[Sequence[int]], facts: Mapping[str, Any]) -> Callable[[int], dict[str, Any]]:
    """What the file of a drawing says of itself, by the drawing's position. Pictures are read when they are asked for:
    there may be thousands."""
    known: dict[str, str] = {}
    places = {i: (group, place) for group in groups for place, i in enumerate(group)}

    def entry_of(i: int) -> dict[str, Any]:
        one, (group, place) = plan.drawings[i], places[i]
        contents = {"image_contents": image_contents(one.settings.images, known)}
        members = [plan.drawings[other].settings for other in group]
        return {**one.entry(), **contents, **facts, **companions(members, place)}

    return entry_of


def _positions(sizes: Iterable[int]) -> list[range]:
    """Neighbouring ranges of these lengths, from 0 on."""
    ends = list(accumulate(sizes, initial=0))
    return [range(first, end) for first, end in pairwise(ends)]


def _machine_notes(stored: Mapping[str, Any] | None, machine: Mapping[str, Any]) -> list[str]:
    """How this machine is not the one that a file was drawn on, where it is drawn again."""
    if stored is None:
        return []
    names = ("dtype", "device_name", "threads", "versions", "attention", "fuse_qkv")
    other = [name for name in names if name in stored and stored[name] != machine.get(name)]
    said = "; ".join(f"{name} was {stored[name]}, is {machine.get(name)}" for name in other)
    return [f"Bytes may differ in rounding from the file's: {said}."] if other else []


def _named_device(device: str | None, rank: Rank, option: str | None) -> torch.device:
    """A GPU where there is one, each rank its own. UserError for a name that is none; nothing is tried."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and rank.count > 1:
        device = f"cuda:{rank.local}"
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise _unusable(option or device, error) from error


def _probe(device: torch.device, rank: Rank, option: str | None) -> None:
    """UserError unless this rank can use its device. Each speaks for itself: the others may be able to use theirs."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(option or str(device), error, device, rank) from error


def _unusable(
    option: str, error: BaseException, device: torch.device | None = None, rank: Rank | None = None
) -> UserError:
    import torch

    why = str(error).splitlines()[0]
    if device is None or rank is None or rank.count == 1:
        return UserError(f"--device {option}: cannot be used here ({why}).")
    there, advice = torch.cuda.device_count(), ""
    if device.type == "cuda" and 0 < there <= (device.index or 0):
        advice = f" This machine has {there} GPU(s): start at most as many processes on it (--nproc-per-node {there})."
    return UserError(f"--device {option}: rank {rank.number} cannot use {device} ({why}).{advice}")


def _dtype_for(device: torch.device, dtype: str | None) -> torch.dtype:
    """By default bf16 on GPUs (fp16 on cards without), fp32 on CPUs."""
    import torch

    if dtype is not None:
        return torch_dtype(dtype)
    if device.type == "cpu":
        return torch.float32
    native = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


@contextmanager
def _progress(settings: Sequence[SampleSettings], rank: Rank) -> Iterator[tuple[OnStep, Callable[[str], None]]]:
    """A bar over all denoising steps on a terminal; the lines that are said above it, or alone elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("[bold]sampling"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    silent = not console.is_terminal or rank.number > 0 or not settings
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=silent)
    task = bar.add_task("sampling", total=sum(one.all_steps for one in settings))

    def on_step(group: Sequence[int], _step: int, _steps: int) -> None:
        bar.advance(task, len(group))

    def say(text: str) -> None:
        of_rank = f"rank {rank.number}: " if rank.shares > 1 else ""
        if rank.writes:
            console.print(of_rank + text, highlight=False, markup=False, soft_wrap=True)

    with bar:
        yield on_step, say
