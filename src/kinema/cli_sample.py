"""``kinema sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHAT, MODEL, GIVEN, SIZE = "What to draw", "Model", "Given frames", "Size and length"
STEERING, FIRST, FILES, MEMORY = "Steering", "First picture", "Files", "Memory"
"""Panels of the help."""


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="One video or picture for each.", show_default=False)
    ] = None,
    prompt_list: Annotated[
        str | None,
        typer.Option(
            "--list",
            metavar="FILE",
            help="Prompts from csv, tsv, jsonl, parquet or txt; docs/guides/sampling.md.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="A:B", help="Rows of --list: 10:20, :5, -3: or 7.", rich_help_panel=WHAT)
    ] = None,
    ignore_columns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="Columns of --list to leave unread.", rich_help_panel=WHAT),
    ] = None,
    repeat: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Draw this sample again; other options change single settings.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    again: Annotated[
        bool | None,
        typer.Option("--again", help="Draw also what is there already with the same settings.", rich_help_panel=WHAT),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory: its model with what it trained.", rich_help_panel=MODEL),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Diffusers directory, hub id or checkpoint file.", rich_help_panel=MODEL),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(
            help="Family of --model; needed for a single file. `kinema models` lists them.", rich_help_panel=MODEL
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant of --model; needed for a single file.", rich_help_panel=MODEL)
    ] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="LoRA file; may be repeated.", rich_help_panel=MODEL)
    ] = None,
    negative: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to lead away from.", rich_help_panel=WHAT)
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="First frame of a video, or a picture to edit, as a path or an address; may be repeated. Of a video "
            "the frames that --condition says.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    condition: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|STRATEGY",
            help="Which frames come from --image: i2v_head, i2v_tail, i2v_loop, v2v_head, v2v_tail_9 and others, or a "
            "mask strategy in numbers.",
            rich_help_panel=GIVEN,
        ),
    ] = None,
    extend: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Add so many stretches of --frames to the video.", rich_help_panel=GIVEN),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(min=1, metavar="FRAMES", help="Frames that each is told of those before.", rich_help_panel=GIVEN),
    ] = None,
    edit: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="How freely it makes these anew, 0 to 1.", rich_help_panel=GIVEN),
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=SIZE)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", rich_help_panel=SIZE)] = None,
    resolution: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="256px, 768px, 480p, 720p...: in the place of --height.", rich_help_panel=SIZE
        ),
    ] = None,
    aspect_ratio: Annotated[
        str | None,
        typer.Option(
            metavar="W:H",
            help="16:9, 1:1, 2.39:1...; auto is that of the first picture. Alone it keeps the usual area.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length; 1 makes a picture.", rich_help_panel=SIZE)] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, help="Frames a second of the file.", rich_help_panel=SIZE)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps.", rich_help_panel=STEERING)] = None,
    guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale; 1 turns it off.", rich_help_panel=STEERING)
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Guidance towards the given pictures, of models that have it apart.",
            rich_help_panel=STEERING,
        ),
    ] = None,
    shift: Annotated[
        float | None, typer.Option(min=0, help="Time shift of the sampling schedule.", rich_help_panel=STEERING)
    ] = None,
    text_osci: Annotated[
        bool | None,
        typer.Option(
            "--text-osci/--no-text-osci",
            help="Let --guidance fall to 1 in every other step; default: as the model's authors do.",
            rich_help_panel=STEERING,
        ),
    ] = None,
    image_osci: Annotated[
        bool | None,
        typer.Option("--image-osci/--no-image-osci", help="The same for --image-guidance.", rich_help_panel=STEERING),
    ] = None,
    temporal_osci: Annotated[
        bool | None,
        typer.Option(
            "--temporal-osci/--no-temporal-osci",
            help="Let --image-guidance grow over the frames of the video.",
            rich_help_panel=STEERING,
        ),
    ] = None,
    full_steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Steps before anything oscillates; default 10.", rich_help_panel=STEERING
        ),
    ] = None,
    motion: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="Motion score, written after each PROMPT as captions have it; `dynamic`: see below.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    refine_prompt: Annotated[
        bool, typer.Option("--refine-prompt", help="A chat model writes each PROMPT out.", rich_help_panel=WHAT)
    ] = False,
    prompt_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Its endpoint; default: OPENAI_BASE_URL, or OpenAI.", rich_help_panel=WHAT),
    ] = None,
    prompt_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Its name there; default: OPENAI_MODEL, or the only one.", rich_help_panel=WHAT
        ),
    ] = None,
    aesthetic: Annotated[
        float | None, typer.Option(help="Aesthetic score, written likewise.", rich_help_panel=WHAT)
    ] = None,
    tell_fps: Annotated[
        bool | None,
        typer.Option(
            "--tell-fps/--no-tell-fps",
            help="Write --fps likewise; default: with a score, if captions did.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the first sample, 0 by default; the others count up.", rich_help_panel=WHAT),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples of each prompt.", rich_help_panel=WHAT)] = 1,
    first_model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Draw a picture of each prompt first with this model, as --model; the video begins with it.",
            rich_help_panel=FIRST,
        ),
    ] = None,
    first_run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The same with the model of a run.", rich_help_panel=FIRST),
    ] = None,
    first_family: Annotated[
        str | None, typer.Option(help="Its --family, where it needs one.", rich_help_panel=FIRST)
    ] = None,
    first_variant: Annotated[str | None, typer.Option(help="Its --variant.", rich_help_panel=FIRST)] = None,
    first_adapter: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="LoRA file for it; may be repeated.", rich_help_panel=FIRST),
    ] = None,
    first_steps: Annotated[int | None, typer.Option(min=1, help="Steps of the picture.", rich_help_panel=FIRST)] = None,
    first_guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale of the picture.", rich_help_panel=FIRST)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the files go; default: `samples` in --run or here.", rich_help_panel=FILES
        ),
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=51,
            help="Compression of videos: 0 lossless, 10 by default, 51 smallest.",
            rich_help_panel=FILES,
        ),
    ] = None,
    offload: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="On the device only while it works: parts, or also blocks of the network; none; auto decides by "
            "sizes and free memory.",
            rich_help_panel=MEMORY,
        ),
    ] = "auto",
    tiling: Annotated[
        str | None,
        typer.Option(
            metavar="auto|on|off",
            help="The autoencoder in tiles; auto is what its family does.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(min=1, help="Their height and width in pixels.", rich_help_panel=MEMORY)
    ] = None,
    tile_frames: Annotated[
        int | None,
        typer.Option(min=1, help="Their frames, for autoencoders with tiles in time.", rich_help_panel=MEMORY),
    ] = None,
    sp: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            help="Processes of torchrun that draw each sample together, a part of its sequence each.",
            rich_help_panel=MEMORY,
        ),
    ] = 1,
    sp_attention: Annotated[
        str | None,
        typer.Option(
            metavar="ulysses|ring",
            help="How they attend to the whole sequence: heads are exchanged (the default), or keys and values go "
            "round.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    attention_backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Whose attention: sdpa (torch's choice, the default), cudnn, flash, flash_hub, flash3, flash3_hub, "
            "xformers, sage or sage_hub.",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    fuse_qkv: Annotated[
        bool,
        typer.Option(
            "--fuse-qkv", help="Queries, keys and values by one product, where they can be.", rich_help_panel=MEMORY
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda, cuda:1 or cpu.", rich_help_panel=MEMORY)] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=MEMORY)] = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="The averaged weights of --run, where it has them.", rich_help_panel=MODEL),
    ] = None,
) -> None:
    """Make a video or a picture of each PROMPT, of each row of --list, or of --from once more.

    The weights are those of a run (--run) or of a model (--model, --family). Videos are mp4, pictures png. What is
    there already is not drawn again, so a list goes on where it was stopped.

    With --refine-prompt or --motion dynamic, a chat model is asked first; its key is in OPENAI_API_KEY.

    On several GPUs: torchrun --nproc-per-node N -m kinema sample ... (with --sp N all of them draw each sample).
    """
    options = dict(locals())
    options["adapter"] = adapter or []
    options["images"] = images or []
    from kinema.sampling.command import sample as run_sampling
    from kinema.sampling.first_picture import FirstPicture

    own = {name: options.pop(f"first_{name}") for name in FirstPicture.__dataclass_fields__}
    options["first"] = FirstPicture(**{**own, "adapter": first_adapter or ()})
    run_sampling(**options)
