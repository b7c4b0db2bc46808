"""ComfyUI's latent file: what its sampler function would be handed is our z."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lib_unsampler.core.comfy import SCALES, ComfyError, as_latents, save_latent
from lib_unsampler.core.noising import SeededDraws, unsample
from lib_unsampler.core.schedule import levels
from lib_unsampler.core.trajectory import Trajectory

Latent = Callable[..., Tensor]
HANDS = Path(__file__).parent / "comfyui_hands.py"
COMFYUI, PYTHON = os.environ.get("COMFYUI_DIR", ""), os.environ.get("COMFYUI_PYTHON", sys.executable)
"""A checkout of ComfyUI, and a Python in which it runs."""


def made(source: Tensor, prediction: str) -> Trajectory:
    schedule = [0.9, 0.5, 0.2, 0.0] if prediction == "flow" else [9.0, 5.0, 0.5, 0.0]
    plan = levels(torch.tensor(schedule))
    z = unsample(source, plan, SeededDraws((4, 5), source.shape[1:]), "independent", prediction)
    return Trajectory(z, plan.sigmas, plan.schedule, 0, source, prediction, (4, 5))


@pytest.mark.parametrize(("form", "prediction"), [("sd15", "eps"), ("sdxl", "v"), ("sd3", "flow"), ("flux", "flow")])
def test_comfyui_s_own_steps_lead_back_to_z(latent: Latent, tmp_path: Path, form: str, prediction: str) -> None:
    """process_in, then noise_scaling with noise 0, as written in ComfyUI's own files."""
    saved = made(latent(2, 4, 6, 5), prediction)
    path = tmp_path / "levels.latent"
    save_latent(saved, form, path)
    with safe_open(path, "pt") as file:
        held, told = file.get_tensor("latent_tensor"), json.loads(file.metadata()["batch_unsampler"])
        assert file.get_tensor("latent_format_version_0").numel() == 0
    assert held.shape == (6, 4, 6, 5)
    scale, shift = SCALES[form]
    for number, frame in enumerate(held):
        level, image = divmod(number, 2)
        sigma = told["sigmas"][level]
        processed = (frame - shift) * scale
        handed = (1 - sigma) * processed if prediction == "flow" else processed
        z = saved.z[level, image]
        assert (handed - z).abs().max() < 4e-6 * z.abs().max()
    assert told["images"] == 2 and told["sigmas"] == saved.sigmas.tolist()


@pytest.mark.skipif(not COMFYUI, reason="COMFYUI_DIR names no checkout of ComfyUI")
@pytest.mark.parametrize("level", [0, 2], ids=["least noisy", "noisiest"])
@pytest.mark.parametrize(
    ("kind", "prediction"), [("sd15", "eps"), ("sd15-v", "v"), ("sdxl", "eps"), ("sd3", "flow"), ("flux", "flow")]
)
def test_what_comfyui_s_sampler_is_handed_is_z(
    latent: Latent, tmp_path: Path, kind: str, prediction: str, level: int
) -> None:
    """LoadLatent, then SamplerCustom with its noise disabled, to its sampler's function: all ComfyUI's own code."""
    saved = made(latent(2, 16 if prediction == "flow" else 4, 6, 5), prediction)
    path, out, sigma = tmp_path / "levels.latent", tmp_path / "handed.safetensors", float(saved.sigmas[level])
    save_latent(saved, kind.removesuffix("-v"), path)
    command = [PYTHON, str(HANDS), COMFYUI, str(path), kind, str(2 * level), "2", repr(sigma), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    with safe_open(out, "pt") as file:
        handed, version = file.get_tensor("handed"), file.metadata()["version"]
    z = saved.z[level]
    error = float((handed - z).abs().max() / z.abs().max())
    print(f"ComfyUI {version}, {kind}, sigma {sigma:g}: {error:.1e} of the largest value")
    assert error < 4e-7  # three roundings of float32


def test_what_cannot_be_held_is_refused_by_name(latent: Latent) -> None:
    source = latent(1, 4, 2, 2)
    one, sigma = source[None], torch.tensor([1.0])
    with pytest.raises(ComfyError, match="sigma 1 "):
        as_latents(one, sigma, "flow", "flux")
    for unknown in ("flux2", "qwen", "wan21"):
        with pytest.raises(ComfyError, match=f"'{unknown}'"):
            as_latents(one, sigma / 2, "flow", unknown)
    with pytest.raises(ComfyError, match="not pictures"):
        as_latents(one[:, :, :, None], sigma, "eps", "sd15")
