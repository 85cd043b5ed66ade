"""The shipped weights and the model directory: small, well conditioned, and loadable by diffusers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.shapes import models, world
from kinema.shapes.judge import accuracy, judge


def to_model(clips: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clips.transpose(0, 4, 1, 2, 3).astype(np.float32)) / 127.5 - 1


@pytest.fixture(scope="module")
def combos() -> list[world.Combo]:
    return world.all_combos()[::3]


@pytest.fixture(scope="module")
def clips(combos: list[world.Combo]) -> np.ndarray:
    return np.stack([world.render(combo, (11, i)) for i, combo in enumerate(combos)])


@pytest.fixture(scope="module")
def coded(clips: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Normalised latents [N, C, T, H, W] of the clips, and the clips decoded from them."""
    vae = models.load_autoencoder()
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        z = torch.cat([vae.encode(part).latent_dist.mean for part in to_model(clips).split(16)])
        out = torch.cat([vae.decode(part).sample for part in z.split(16)])
    video = ((out.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return (z - mean) / std, video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_model(tmp_path_factory.mktemp("model"), seed=3, num_layers=2)


def test_the_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in models.WEIGHTS.iterdir()) <= 3_000_000


def test_clips_survive_the_autoencoder(
    clips: np.ndarray, combos: list[world.Combo], coded: tuple[torch.Tensor, np.ndarray]
) -> None:
    video = coded[1]
    error = np.mean((video.astype(np.float32) - clips) ** 2)
    assert 10 * np.log10(255**2 / error) > 26
    scores = accuracy([judge(clip) for clip in video], combos)
    assert min(scores[name] for name in ("colour", "direction", "background")) == 1, scores
    assert scores["shape"] >= 0.99, scores


def test_latents_have_about_unit_scale_and_little_correlation(coded: tuple[torch.Tensor, np.ndarray]) -> None:
    """About: the statistics in the configuration are those of clips that also move on lines further out."""
    z = coded[0]
    assert z.shape[1:] == (models.LATENT_CHANNELS, 5, 8, 8)
    flat = z.transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 0.45
    assert (flat.std(1) - 1).abs().max() < 0.2
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 0.2
    assert flat.abs().max() < 10


def test_the_posterior_is_narrow() -> None:
    vae = models.load_autoencoder()
    with torch.no_grad():
        posterior = vae.encode(to_model(world.render(world.all_combos()[0], 0)[None])).latent_dist
    std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
    torch.testing.assert_close(posterior.std / std, torch.full_like(posterior.std, 0.03), rtol=0.05, atol=0)


def test_each_word_of_the_world_is_one_token_and_others_are_spelled() -> None:
    tokenizer = models.build_tokenizer()
    for combo in world.all_combos()[::17]:
        words = world.caption(combo).split()
        assert tokenizer.tokenize(world.caption(combo)) == [f"▁{word}" for word in words]
        assert len(words) + 1 <= models.TEXT_LENGTH
    strange = tokenizer("an Astronaut, riding 2 horses: é 漢").input_ids
    assert len(strange) > 20 and strange[-1] == tokenizer.eos_token_id


def test_words_of_one_attribute_are_told_apart_by_the_text_encoder() -> None:
    tokenizer, encoder = models.build_tokenizer(), models.load_text_encoder()
    sentences = [f"a {colour} circle moving left on a black background" for colour in world.COLOURS]
    with torch.no_grad():
        states = encoder(**tokenizer(sentences, return_tensors="pt")).last_hidden_state[:, 1]
    unit = torch.nn.functional.normalize(states, dim=-1)
    off = (unit @ unit.T - torch.eye(len(unit))).abs()
    assert off.max() < 0.3
    assert 0.5 < states.std() < 2


def test_the_directory_is_the_same_for_the_same_seed(tmp_path: Path, folder: Path) -> None:
    again = models.write_model(tmp_path / "again", seed=3, num_layers=2)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name
    other = models.random_transformer(4, num_layers=2).state_dict()
    same = models.random_transformer(3, num_layers=2).state_dict()
    assert not torch.equal(other["patch_embedding.weight"], same["patch_embedding.weight"])


def test_diffusers_loads_and_samples_the_directory(folder: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        ["a red circle moving left on a black background", "something else"],
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=models.TEXT_LENGTH,
        output_type="np",
    ).frames
    assert frames.shape == (2, 17, 64, 64, 3)
    assert np.isfinite(frames).all()


def test_an_untrained_network_earns_nothing_from_the_judge(folder: Path) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = world.held_out_prompts(24)
    frames = pipeline(
        [prompt.text for prompt in prompts],
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=models.TEXT_LENGTH,
        output_type="np",
    ).frames
    verdicts = [judge(clip) for clip in (frames * 255).round().astype(np.uint8)]
    scores = accuracy(verdicts, [prompt.combo for prompt in prompts])
    assert scores["colour"] <= 0.35 and scores["shape"] <= 0.45 and scores["direction"] <= 0.45
    assert scores["all"] == 0
