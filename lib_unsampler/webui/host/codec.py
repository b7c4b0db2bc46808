"""Between latents and pictures: the autoencoder of the host, and what it puts around a picture."""

from __future__ import annotations

from typing import Any

import torch
from modules import devices, images, processing, shared
from PIL import Image
from torch import Tensor


class Decoded(list[Any]):
    """Pictures in [-1, 1] in place of latents: the host decodes nothing."""

    already_decoded = True


def decode(p: Any, latents: Tensor) -> list[Tensor]:
    """Latents of shape (B, C, H, W) to pictures in [-1, 1] of shape (3, H, W), as the host's settings say."""
    with torch.no_grad():
        made = processing.decode_latent_batch(p.sd_model, latents, target_device=devices.cpu, check_for_nans=True)
    return [picture.reshape(-1, *picture.shape[-3:])[0] for picture in made]  # some models have a time axis


DECODER_BYTES = 2178
"""What a VAE needs at its worst for each pixel and byte of its values (ComfyUI's and Forge's estimate)."""


MOST_AT_ONCE = 16


def decodable(latents: Tensor) -> int:
    """How many batches like this one of latents, with shape (B, C, [T,] H, W), a GPU decodes at once; else 1."""
    if devices.device.type != "cuda":
        return 1
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    pixels = 64 * latents.shape[-1] * latents.shape[-2] * len(latents)
    return int(min(MOST_AT_ONCE, max(1, 0.7 * free / (DECODER_BYTES * pixels * devices.dtype_vae.itemsize))))


def free_memory() -> None:
    """Gives back what the GPU keeps for reuse."""
    devices.torch_gc()


def overlaid(p: Any, picture: Image.Image, index: int) -> Image.Image:
    """A picture of ``only masked`` or masked img2img, put back into its surroundings as the host does."""
    overlays = getattr(p, "overlay_images", None) or []
    if not getattr(shared.opts, "overlay_inpaint", True) or index >= len(overlays):
        return picture
    return processing.apply_overlay(picture, p.paste_to, overlays[index])[0]


def encoded_picture(p: Any, image: int) -> Image.Image | None:
    """The picture that an image's latents were encoded from; None where the host encoded a part of it."""
    if getattr(p, "image_mask", None) is not None or not p.init_images:
        return None
    picture = p.init_images[image % len(p.init_images)].convert("RGB")
    if p.resize_mode == 3:  # the host resizes the latents
        return None
    return images.resize_image(p.resize_mode, picture, p.width, p.height)
