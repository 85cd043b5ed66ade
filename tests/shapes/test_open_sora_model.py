"""The parts of the world's Open-Sora model, each against something that does not come from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kinema.config.schema import ModelConfig
from kinema.data.batch import Sample
from kinema.families.latents import LATENTS
from kinema.families.open_sora_video import decode_latents, encode_pixels
from kinema.families.registry import open_family
from kinema.shapes import models, open_sora
from kinema.shapes.world import (
    Combo,
    all_combos,
    caption,
    draw_motion,
    is_held_out,
    parse_caption,
    render,
    write_pictures,
)


@pytest.fixture(scope="module")
def clips() -> np.ndarray:
    """Eight clips of the world that roam, uint8 [8, 17, 64, 64, 3]."""
    combos = all_combos()[5::36]
    return np.stack([render(combo, (4, i), roaming=True) for i, combo in enumerate(combos)])


def to_model(clips: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clips.transpose(0, 4, 1, 2, 3).astype(np.float32)) / 127.5 - 1


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float32) - b) ** 2)))


@torch.no_grad()
def test_the_network_stands_on_the_worlds_own_autoencoder(tmp_path: Path, clips: np.ndarray) -> None:
    """Latents of unit scale, the same in training and in sampling, and back to the pixels: HunyuanVideo's class is not
    the only one that the family takes."""
    open_sora.write_model(tmp_path / "model", depth=1, depth_single_blocks=1)
    family = open_family(ModelConfig(family="open_sora", path=str(tmp_path / "model")))
    vae = family.load("autoencoder", "cpu", torch.float32)
    assert type(vae).__name__ == "AutoencoderKLWan"
    pixels = to_model(clips)
    samples = [Sample("", torch.from_numpy(clip.transpose(3, 0, 1, 2).copy())) for clip in clips]
    trained = torch.stack([one["latents"] for one in family.encode(LATENTS, {"autoencoder": vae}, samples)])
    teacher = models.load_autoencoder()
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (teacher.config.latents_mean, teacher.config.latents_std))
    known = (teacher.encode(pixels).latent_dist.mean - mean) / std
    assert (trained - known).abs().max() < 1e-5 and 0.7 < known.std() < 1.3
    sampled = torch.stack([encode_pixels(vae, one) for one in pixels])
    assert (sampled - known).abs().max() < 1e-5
    back = ((decode_latents(vae, sampled, 17).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()
    assert psnr(back, clips) > 24


@torch.no_grad()
def test_t5_reads_as_the_text_encoder_whose_weights_it_has() -> None:
    tokenizer = models.build_tokenizer()
    ids = tokenizer([caption(all_combos()[7]), ""], padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(open_sora.load_t5()(ids)[0], models.load_text_encoder()(ids)[0])


@torch.no_grad()
def test_clip_adds_up_words() -> None:
    tokenizer = open_sora.build_clip_tokenizer()
    encoder = open_sora.words_added_up(tokenizer)

    def pooled(text: str) -> torch.Tensor:
        padded = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
        return encoder(padded.input_ids).pooler_output[0]

    text = caption(Combo("red", "cross", "left", "gray"))
    words = text.split()
    assert len(tokenizer(text).input_ids) == len(words) + 2, "a token each, a beginning and an end"
    assert torch.allclose(pooled(text), pooled(" ".join(reversed(words))), atol=1e-4), "in any order"
    nearer = torch.cosine_similarity(pooled(text), pooled(text.replace("red", "blue")), dim=0)
    farther = torch.cosine_similarity(pooled(text), pooled("a blue circle moving up on a white background"), dim=0)
    assert 0.99 > nearer > farther + 0.05


def test_the_model_is_one_of_the_family(tmp_path: Path) -> None:
    open_sora.write_model(tmp_path / "model", depth=1, depth_single_blocks=1)
    family = open_family(ModelConfig(family="open_sora", path=str(tmp_path / "model"), cond_embed=True))
    assert family.variant.name == "v2"
    assert family.load("network", "cpu", None).cond_in is not None
    assert family.load("autoencoder", "cpu", None).config.z_dim == models.LATENT_CHANNELS


def test_roaming_clips_begin_sooner_or_later_on_the_same_lines() -> None:
    combo = Combo("red", "circle", "left", "black")
    starts, lines = set(), set()
    for seed in range(60):
        motion = draw_motion(combo, np.random.default_rng(seed), roaming=True)
        assert np.array_equal(np.diff(motion.centres[:, 0]), np.full(16, -2.0))
        starts.add(float(64 - motion.centres[0, 0]))
        lines.add(float(motion.centres[0, 1]))
        usual = draw_motion(combo, np.random.default_rng(seed))
        assert usual.centres[0, 0] == 48 and usual.centres[0, 1] == motion.centres[0, 1]
    assert starts == {8.0, 16.0, 24.0} and lines == {24.0, 32.0, 40.0}


def test_pictures_are_of_training_combinations_at_whole_cells(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 24)
    assert [path.name for path in paths[:2]] == ["00000.png", "00001.png"]
    places = set()
    for path in paths:
        combo = parse_caption(path.with_suffix(".txt").read_text())
        assert combo is not None and not is_held_out(combo)
        pixels = np.asarray(Image.open(path)).astype(np.float32)
        assert pixels.shape == (64, 64, 3)
        cover = np.abs(pixels - pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)).sum(-1)
        axis = 1 if combo.direction in ("left", "right") else 0
        places.add(round(float((cover.sum(1 - axis) @ (np.arange(64) + 0.5)) / cover.sum()) / 4))
    assert len(places) > 4
