"""Makes the small weights that ship in src/kinema/shapes/weights: the autoencoder and the text encoder.

The autoencoder is trained on clips of all kinds (the world's, and random polygons, ellipses, colours, gradients and
textures), so it favours no combination. Its latents are kept near unit variance and uncorrelated while it trains and
made exactly so at the end; noise added to them before decoding makes them smooth and the decoder forgiving. At last the
decoder alone learns to draw what stands out little from its background as sharply as the rest. The text encoder keeps
its seeded random weights: every word gets its own direction, which is all the world needs.

    python scripts/make_shapes_codec.py [--out DIR] [--after PHASES]

Seeds fix everything but the rounding of sums, which depends on the machine.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.nn import functional

from kinema.shapes import models, world
from kinema.shapes.judge import accuracy, judge

SPREAD_WEIGHT = 0.3


@dataclass(frozen=True)
class Phase:
    """One pass of training: peak learning rates, most noise added to latents (in units of their standard deviation),
    share of clips that are the world's, and (until, clips, frames, pixels) of the batches over its progress."""

    steps: int
    muon_lr: float
    adam_lr: float
    max_noise: float
    world_share: float
    batches: tuple[tuple[float, int, int, int], ...]
    anywhere: float = 0.0
    """Share of the world's clips whose shapes move on any line at any speed, not only on the world's own."""
    decoder_only: bool = False
    """The latents stay as they are, and errors count by how far a clip stands out from its background."""


PHASES = (
    Phase(900, 0.04, 2e-3, 0.5, 0.5, ((0.7, 8, 5, 32), (0.85, 8, 9, 32), (1.0, 2, 17, 64)), anywhere=1.0),
    Phase(800, 0.025, 2e-3, 0.3, 0.75, ((0.85, 4, 9, 48), (1.0, 3, 17, 64)), anywhere=1.0),
    Phase(450, 0.006, 6e-4, 0.4, 0.85, ((0.6, 4, 9, 64), (1.0, 3, 17, 64))),
    Phase(500, 0.01, 1e-3, 0.3, 0.9, ((1.0, 3, 17, 64),), anywhere=0.5, decoder_only=True),
    Phase(600, 0.01, 1e-3, 0.2, 0.95, ((1.0, 4, 17, 64),), anywhere=0.25, decoder_only=True),
)
"""From nothing on small cuts; then, with channels uncorrelated, finer on larger ones; then on the world's own paths;
then the decoder alone, twice."""
POSTERIOR_STD = 0.03
"""Standard deviation of the shipped posterior, in units of a latent channel's own."""


def random_clip(rng: np.random.Generator, frames: int, size: int) -> np.ndarray:
    """A clip outside the world, float [3, T, H, W] in [-1, 1]: up to three turned outlines of any colour, moving
    anyhow over a plain, graded or textured background."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    colour = rng.uniform(-1, 1, 3).astype(np.float32)[:, None, None]
    kind = rng.random()
    if kind < 0.5:
        still = colour * np.ones((3, size, size), np.float32)
    elif kind < 0.75:
        slope = rng.normal(0, 1.5 / size, (3, 2)).astype(np.float32)
        still = colour + slope[:, :1, None] * (x - size / 2) + slope[:, 1:, None] * (y - size / 2)
    else:
        cells = rng.integers(2, 9)
        texture = rng.uniform(-0.6, 0.6, (3, cells, cells)).astype(np.float32)
        smooth = functional.interpolate(torch.from_numpy(texture)[None], size=(size, size), mode="bilinear")
        still = colour + smooth[0].numpy()
    video = np.repeat(still[:, None], frames, 1)
    for _ in range(rng.integers(1, 4)):
        paint = rng.uniform(-1, 1, 3).astype(np.float32)[:, None, None]
        radius, angle = rng.uniform(4, 16), rng.uniform(0, 2 * np.pi) * (rng.random() < 0.7)
        start = rng.uniform(0, size, 2)
        velocity = rng.uniform(-2.5, 2.5, 2) * (rng.random() < 0.9)
        outline = world.OUTLINES[world.SHAPES[rng.integers(len(world.SHAPES))]]
        stretch = rng.uniform(0.6, 1.5)
        sub = 1 / 6 * np.array([-2, 0, 2], np.float32)
        for t in range(frames):
            cx, cy = start + velocity * t
            u = (x[..., None, None] + sub[:, None] - cx) / radius
            v = (y[..., None, None] + sub[None, :] - cy) / radius
            turned_u = (np.cos(angle) * u - np.sin(angle) * v) * stretch
            turned_v = np.sin(angle) * u + np.cos(angle) * v
            cover = outline(turned_u, turned_v).mean((-1, -2), dtype=np.float32)
            video[:, t] += cover * (paint - video[:, t])
    return np.clip(video, -1, 1)


def world_clip(rng: np.random.Generator, frames: int, size: int, phase: Phase) -> np.ndarray:
    """A random cut of a clip of the world, float [3, T, size, size] in [-1, 1]."""
    combos = world.all_combos()
    combo = combos[rng.integers(len(combos))]
    seed = int(rng.integers(2**31))
    if rng.random() < phase.anywhere:
        clip = world.render_motion(combo, motion_anywhere(combo, seed))
    else:
        clip = world.render(combo, seed, roaming=phase.decoder_only)
    t = rng.integers(0, world.FRAMES - frames + 1)
    y, x = rng.integers(0, world.SIZE - size + 1, 2)
    cut = clip[t : t + frames, y : y + size, x : x + size]
    return np.ascontiguousarray(cut.transpose(3, 0, 1, 2)).astype(np.float32) / 127.5 - 1


def motion_anywhere(combo: world.Combo, seed: int) -> world.Motion:
    """A path in the combination's direction on any line near the middle, of any size and speed near the world's."""
    rng = np.random.default_rng(seed)
    radius, travel = rng.uniform(10.5, 12.5), rng.uniform(28, 33)
    middle, across = 32 + rng.uniform(-1.5, 1.5), 32 + rng.uniform(-11, 11)
    along = middle + travel * (np.arange(world.FRAMES) / (world.FRAMES - 1) - 0.5)
    dx, dy = world.DIRECTIONS[combo.direction]
    if dx + dy < 0:
        along = world.SIZE - along
    line = np.full(world.FRAMES, across)
    return world.Motion(np.stack([along, line] if dx else [line, along], 1), radius)


def make_batch(rng: np.random.Generator, phase: Phase, progress: float) -> torch.Tensor:
    """Clips of the world and random ones, [B, 3, T, H, W] in [-1, 1]."""
    count, frames, size = next(shape for until, *shape in phase.batches if progress < until)
    random_from = rng.binomial(count, phase.world_share) if phase.decoder_only else round(count * phase.world_share)
    clips = [
        world_clip(rng, frames, size, phase) if i < random_from else random_clip(rng, frames, size)
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(clips))


def relief(x: torch.Tensor) -> torch.Tensor:
    """What makes errors of faint clips [B, 3, T, H, W] count as those of clear ones: 0.25 over the standard deviation
    of their pixels, [B, 1, 1, 1, 1]."""
    centred = x - x.mean((2, 3, 4), keepdim=True)
    return 0.25 / centred.square().mean((1, 2, 3, 4), keepdim=True).sqrt().clamp(min=0.05)


def spread_penalty(z: torch.Tensor) -> torch.Tensor:
    """How far the latents [B, C, T, H, W] are from mean 0 and covariance I over everything but channels."""
    flat = z.transpose(0, 1).flatten(1)
    mean = flat.mean(1, keepdim=True)
    centred = flat - mean
    covariance = centred @ centred.T / flat.shape[1]
    return mean.square().mean() + (covariance - torch.eye(len(z[0]))).square().mean()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps in fp32; convolutions count as [out, in * kernel]
    matrices. (torch.optim.Muon takes matrices only and iterates in bfloat16, which many CPUs lack.)"""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(average, group["momentum"]).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly the nearest matrix with orthonormal rows or columns (Keller Jordan's coefficients)."""
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def train(vae: AutoencoderKLWan, phase: Phase, seed: int, log_every: int = 50) -> None:
    """Mean absolute and squared error through noisy latents, plus `spread_penalty` of the normalised latents."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not phase.decoder_only)
    trained = [p for p in vae.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1 and p[0].numel() > 1]
    others = [p for p in trained if not (p.ndim > 1 and p[0].numel() > 1)]
    muon = Muon(matrices, phase.muon_lr)
    adam = torch.optim.AdamW(others, phase.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.time()
    for step in range(phase.steps):
        progress = step / phase.steps
        factor = min(1.0, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * progress))
        muon.param_groups[0]["lr"] = phase.muon_lr * factor
        adam.param_groups[0]["lr"] = phase.adam_lr * factor
        x = make_batch(rng, phase, progress)
        with torch.set_grad_enabled(not phase.decoder_only):
            z = vae.encode(x).latent_dist.mean
        noisy = torch.rand(len(x), generator=generator) < 0.6
        level = phase.max_noise * min(1.0, 4 * progress) * noisy * torch.rand(len(x), generator=generator)
        noise = torch.randn(z.shape, generator=generator) * level.view(-1, 1, 1, 1, 1)
        difference = decode_unclamped(vae, z + noise * std) - x
        if phase.decoder_only:
            difference = difference * relief(x)
        loss = difference.abs().mean() + difference.square().mean()
        total = loss if phase.decoder_only else loss + SPREAD_WEIGHT * spread_penalty((z - mean) / std)
        vae.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        muon.step()
        adam.step()
        if step % log_every == 0 or step == phase.steps - 1:
            penalty = (total - loss).item()
            print(f"step {step} loss {loss.item():.4f} spread {penalty:.4f} {time.time() - started:.0f} s", flush=True)


def decode_unclamped(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp, which would stop gradients."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    vae.clear_cache()
    h = vae.post_quant_conv(z)
    chunks = []
    for i in range(h.shape[2]):
        vae._conv_idx = [0]
        chunk = h[:, :, i : i + 1]
        chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), vae.config.patch_size)


@torch.no_grad()
def encode_world(vae: AutoencoderKLWan, seeds: range) -> torch.Tensor:
    """Posterior means [N, C, T, H, W] of clips of the world, one combination after another."""
    combos = world.all_combos()
    means = []
    for start in range(seeds.start, seeds.stop, 16):
        clips = [world.render(combos[i % len(combos)], i) for i in range(start, min(start + 16, seeds.stop))]
        means.append(vae.encode(to_model(np.stack(clips))).latent_dist.mean)
    return torch.cat(means)


def to_model(clips: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(clips.transpose(0, 4, 1, 2, 3).astype(np.float32)) / 127.5 - 1


@torch.no_grad()
def decorrelate(vae: AutoencoderKLWan) -> tuple[list[float], list[float]]:
    """Turns the channels, in the 1x1 convolutions around the latents, so that those of the world are uncorrelated;
    fixes the posterior's variance; returns the mean and standard deviation of every channel."""
    z = encode_world(vae, range(576)).transpose(0, 1).flatten(1).double()
    mean = z.mean(1)
    covariance = torch.cov(z)
    std = covariance.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance)
    turn = std[:, None] * (vectors @ torch.diag(values.rsqrt()) @ vectors.T)
    back = torch.linalg.inv(turn)
    channels = len(std)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight.double(), quant.bias.double()
    weight[:channels] = torch.einsum("ij,jklmn->iklmn", turn, weight[:channels])
    bias[:channels] = turn @ (bias[:channels] - mean) + mean
    weight[channels:] = 0
    bias[channels:] = 2 * torch.log(POSTERIOR_STD * std)
    quant.weight.copy_(weight)
    quant.bias.copy_(bias)
    kernel = post.weight.double()
    shift = mean - back @ mean
    post.bias.copy_(post.bias.double() + kernel[..., 0, 0, 0] @ shift)
    post.weight.copy_(torch.einsum("oiklm,ij->ojklm", kernel, back))
    return mean.tolist(), std.tolist()


@torch.no_grad()
def report(vae: AutoencoderKLWan, mean: list[float], std: list[float]) -> None:
    """Prints how well clips of the world come back, also through noisy latents, and the latents' statistics."""
    combos = world.all_combos()
    clips = np.stack([world.render(combo, 10_000 + i) for i, combo in enumerate(combos)])
    centre, scale = (torch.tensor(v).view(-1, 1, 1, 1) for v in (mean, std))
    z = torch.cat([vae.encode(to_model(part)).latent_dist.mean for part in np.array_split(clips, 18)])
    flat = ((z - centre) / scale).transpose(0, 1).flatten(1)
    off = torch.corrcoef(flat) - torch.eye(len(flat))
    print("latents: mean", flat.mean(1).abs().max().item(), "std", flat.std(1).min().item(), flat.std(1).max().item())
    print("largest correlation", off.abs().max().item(), "largest value", flat.abs().max().item())
    norm = (z - centre) / scale
    rough = (norm[..., 1:] - norm[..., :-1]).square().mean(dim=(0, 2, 3, 4)) / 2
    print("1 - correlation of neighbours, per channel", [round(v, 2) for v in rough.tolist()])
    generator = torch.Generator().manual_seed(0)
    for level in (0.0, 0.1, 0.2, 0.3, 0.5):
        noisy = z + level * scale * torch.randn(z.shape, generator=generator)
        parts = [vae.decode(part).sample for part in noisy.split(16)]
        out = ((torch.cat(parts).permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        psnr = 10 * np.log10(255**2 / np.mean((out.astype(np.float32) - clips) ** 2))
        print(f"latent noise {level}: {psnr:.2f} dB", accuracy([judge(v) for v in out], combos), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=models.WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=int, default=0, help="go on from the shipped autoencoder, after so many phases")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    vae = models.load_autoencoder() if args.after else AutoencoderKLWan(**models.VAE_CONFIG)
    mean, std = vae.config.latents_mean, vae.config.latents_std
    for number, phase in list(enumerate(PHASES))[args.after :]:
        train(vae.train(), phase, args.seed + number)
        if not phase.decoder_only:
            mean, std = decorrelate(vae.eval())
            vae.register_to_config(latents_mean=mean, latents_std=std)
    half = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    vae.load_state_dict({name: value.float() for name, value in half.items()})
    statistics = {"latents_mean": torch.tensor(mean), "latents_std": torch.tensor(std)}
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({**{f"vae.{k}": v for k, v in half.items()}, **statistics}, args.out / "vae.safetensors")
    encoder = models.random_text_encoder(args.seed)
    tensors = {name: value.half().contiguous() for name, value in encoder.state_dict().items()}
    shared = tensors.pop("encoder.embed_tokens.weight", None)
    if shared is not None:
        tensors["shared.weight"] = shared
    save_file(tensors, args.out / "text_encoder.safetensors")
    report(vae, mean, std)


if __name__ == "__main__":
    main()
