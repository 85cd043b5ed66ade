"""``kinema sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="One video or picture for each.", show_default=False)
    ] = None,
    prompt_list: Annotated[
        str | None,
        typer.Option(
            "--list", metavar="FILE", help="Prompts from csv, tsv, jsonl, parquet or txt; docs/guides/sampling.md."
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Rows of --list: 10:20, :5, -3: or 7.")] = None,
    ignore_columns: Annotated[
        list[str] | None, typer.Option(metavar="NAME,...", help="Columns of --list to leave unread.")
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Draw this sample again; other options change single settings."),
    ] = None,
    again: Annotated[
        bool | None, typer.Option("--again", help="Draw also what is there already with the same settings.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory: its model with what it trained.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Diffusers directory, hub id or checkpoint file.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Family of --model; needed for a single file. `kinema models` lists them."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of --model; needed for a single file.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="LoRA file; may be repeated.")] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What to lead away from.")] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="First frame of a video, or a picture to edit, as a path or an address; may be repeated.",
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length; 1 makes a picture.")] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames a second of the file.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 turns it off.")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance towards the given pictures, of models that have it apart.")
    ] = None,
    shift: Annotated[float | None, typer.Option(min=0, help="Time shift of the sampling schedule.")] = None,
    motion: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE", help="Motion score, written after each PROMPT as captions have it; `dynamic`: see below."
        ),
    ] = None,
    refine_prompt: Annotated[
        bool, typer.Option("--refine-prompt", help="A chat model writes each PROMPT out.")
    ] = False,
    prompt_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Its endpoint; default: OPENAI_BASE_URL, or OpenAI.")
    ] = None,
    prompt_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name there; default: OPENAI_MODEL, or the only one.")
    ] = None,
    aesthetic: Annotated[float | None, typer.Option(help="Aesthetic score, written likewise.")] = None,
    tell_fps: Annotated[
        bool | None,
        typer.Option("--tell-fps/--no-tell-fps", help="Write --fps likewise; default: with a score, if captions did."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the first sample, 0 by default; the others count up.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the files go; default: `samples` in --run or here."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda, cuda:1 or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="The averaged weights of --run, where it has them.")
    ] = None,
) -> None:
    """Make a video or a picture of each PROMPT, of each row of --list, or of --from once more.

    The weights are those of a run (--run) or of a model (--model, --family). Videos are mp4, pictures png. What is
    there already is not drawn again, so a list goes on where it was stopped.

    With --refine-prompt or --motion dynamic, a chat model is asked first; its key is in OPENAI_API_KEY.

    On several GPUs: torchrun --nproc-per-node N -m kinema sample ...
    """
    options = dict(locals())
    options["adapter"] = adapter or []
    options["images"] = images or []
    from kinema.sampling.command import sample as run_sampling

    run_sampling(**options)
