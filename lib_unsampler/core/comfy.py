r"""Noise levels as ComfyUI's ``.latent`` file, for its *LoadLatent* node.

ComfyUI keeps latents in the autoencoder's scale and changes them twice on their way to a sampler's function, whose
noise is disabled: the latent format's ``process_in``, :math:`(x - shift) \cdot scale`, then the model's
``noise_scaling`` with noise 0, which is the latent itself in sigma space and :math:`(1 - s)` times it on flow. So that
the function is handed z at level s, the file holds

.. math:: x = \frac{z}{scale} + shift \quad\text{(sigma space)}, \qquad
    x = \frac{z / (1 - s)}{scale} + shift \quad\text{(flow)}.

The file is safetensors: ``latent_tensor`` with shape (N, C, H, W) and an empty ``latent_format_version_0``, without
which its loader multiplies by 1 / 0.18215 (ComfyUI, ``nodes.py``, ``SaveLatent`` and ``LoadLatent``).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import whole
from .kept import finite
from .noising import append_dims
from .trajectory import Trajectory

ENDING = ".latent"
SCALES = {"sd15": (0.18215, 0.0), "sdxl": (0.13025, 0.0), "sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}
"""(scale, shift) of ComfyUI's latent formats (``comfy/latent_formats.py``)."""


class ComfyError(ValueError):
    """Noise levels that ComfyUI's latent file cannot hold."""


def form_of(scale: float, shift: float) -> str:
    """The name of the latent format of an autoencoder's scale and shift; empty for one that is not known."""
    known = (name for name, held in SCALES.items() if abs(held[0] - scale) < 1e-6 and abs(held[1] - shift) < 1e-6)
    return next(known, "")


def as_latents(z: Tensor, sigmas: Tensor, prediction: str, form: str) -> Tensor:
    """What the file holds, frame by frame.

    Arguments:
        z: Levels with shape (L, B, C, H, W).
        sigmas: Their sigmas, with shape (L).
        prediction: ``eps``, ``v`` or ``flow``.
        form: A name of :data:`SCALES`.

    Returns:
        Latents in float32 with shape (L * B, C, H, W), level after level.

    Raises:
        ComfyError: for an unknown latent format, a video, or pure noise (sigma 1) on flow, which holds no latent, or
            values that are not finite.
    """
    if form not in SCALES:
        raise ComfyError(f"latent format {form!r} is not one whose scale is known ({', '.join(SCALES)})")
    if z.ndim != 5:
        raise ComfyError(f"z {tuple(z.shape)} are not pictures (levels, images, channels, height, width)")
    if not finite(z):
        raise ComfyError("z holds values that are not finite")
    scale, shift = SCALES[form]
    signal = torch.ones_like(sigmas) if prediction != "flow" else 1 - sigmas
    if (signal <= 0).any():
        raise ComfyError("sigma 1 is pure noise on a flow model, which ComfyUI multiplies by 0; end at a later step")
    wide = z.double() / append_dims(signal.double(), z.ndim)
    return (wide / scale + shift).float().flatten(0, 1).contiguous()


def save_latent(saved: Trajectory, form: str, path: Path) -> None:
    """Writes a trajectory's levels as a ``.latent`` file; it appears under its name only when whole.

    Raises:
        ComfyError: as :func:`as_latents`.
        OSError: if it cannot be written.
    """
    tensors = {
        "latent_tensor": as_latents(saved.z, saved.sigmas, saved.prediction, form),
        "latent_format_version_0": torch.tensor([]),
    }
    told = {"sigmas": saved.sigmas.tolist(), "images": len(saved.source), "seeds": list(saved.seeds)}
    metadata = {"batch_unsampler": json.dumps({**told, "latent_format": form, "prediction": saved.prediction})}
    with whole(path) as part:
        save_file(tensors, part, metadata)
