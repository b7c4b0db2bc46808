"""Between latents and pictures: the autoencoder of the host, and what it puts around a picture."""

from __future__ import annotations

from typing import Any

import torch
from modules import devices, images, processing, scripts, shared
from PIL import Image
from torch import Tensor


def latent_scale(model: Any) -> tuple[float, float]:
    """(scale, shift) by which the host brings its autoencoder's latents to the model's; zeros where it does not say."""
    forge = getattr(model, "forge_objects", None)
    a1111_sd3 = getattr(getattr(model, "model", None), "latent_format", None)
    if forge is not None:
        codec = getattr(forge.vae, "first_stage_model", None)
        neo = getattr(codec, "latent_format", None)
        scale = getattr(codec, "scaling_factor", getattr(neo, "scale_factor", 0.0))
        shift = getattr(codec, "shift_factor", getattr(neo, "shift_factor", 0.0))
    elif a1111_sd3 is not None:
        scale, shift = a1111_sd3.scale_factor, a1111_sd3.shift_factor
    else:
        scale, shift = getattr(model, "scale_factor", 0.0), 0.0
    return float(scale or 0.0), float(shift or 0.0)


class Decoded(list[Any]):
    """Pictures in [-1, 1] in place of latents: the host decodes nothing."""

    already_decoded = True


def factor() -> int:
    """How many times as long as its latents' a picture's side is, by the loaded model's autoencoder."""
    return int(processing.opt_f)


def decode(p: Any, latents: Tensor) -> list[Tensor]:
    """Latents of shape (B, C, H, W) to pictures in [-1, 1] of shape (3, H, W), as the host's settings say.

    They are left where the host makes them: A1111's on the GPU, where their bytes are made sooner than here.
    """
    place = latents.device if _one_by_one(p.sd_model) else devices.cpu
    with torch.no_grad():
        made = processing.decode_latent_batch(p.sd_model, latents, target_device=place, check_for_nans=True)
    if len(made) != len(latents):
        raise RuntimeError(f"the decoder gave {len(made)} pictures for {len(latents)} latents; see other extensions")
    return [picture.reshape(-1, *picture.shape[-3:])[0] for picture in made]  # some models have a time axis


DECODER_BYTES = 2178
"""What a VAE needs at its worst for each pixel and byte of its values (ComfyUI's and Forge's estimate)."""


MOST_AT_ONCE = 4
"""An H100 gains a tenth by more, and the animation waits for them."""


def _one_by_one(model: Any) -> bool:
    """Whether the host decodes the pictures of a batch one after the other, as A1111 does; Forge takes all at once."""
    return getattr(model, "forge_objects", None) is None


def decodable(p: Any, latents: Tensor) -> int:
    """How many batches like this one of latents, with shape (B, C, [T,] H, W), a GPU decodes at once; else 1."""
    if devices.device.type != "cuda" or _one_by_one(p.sd_model):
        return 1
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    pixels = factor() ** 2 * latents.shape[-1] * latents.shape[-2] * len(latents)
    return int(min(MOST_AT_ONCE, max(1, 0.7 * free / (DECODER_BYTES * pixels * devices.dtype_vae.itemsize))))


def free_memory() -> None:
    """Gives back what the GPU keeps for reuse."""
    devices.torch_gc()


def finished(p: Any, samples: Tensor) -> list[Image.Image]:
    """A batch's pictures as the host makes its own of what was sampled: mask, colours and overlay included.

    What other extensions do to finished pictures is theirs, and is not in these.
    """
    if p.mask is not None:
        blended = samples * p.nmask + p.init_latent * p.mask
        if hasattr(p.scripts, "on_mask_blend"):  # soft inpainting
            told = scripts.MaskBlendArgs(samples, p.nmask, p.init_latent, p.mask, blended)
            p.scripts.on_mask_blend(p, told)
            blended = told.blended_latent
        samples = blended
    pictures = []
    for index, decoded in enumerate(decode(p, samples)):
        values = 255.0 * torch.clamp((decoded.float() + 1.0) / 2.0, min=0.0, max=1.0)
        picture = Image.fromarray(values.permute(1, 2, 0).cpu().numpy().astype("uint8"))  # cut, not rounded
        corrections = getattr(p, "color_corrections", None) or []
        if index < len(corrections):
            picture = processing.apply_color_correction(corrections[index], picture)
        pictures.append(overlaid(p, picture, index))
    return pictures


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
    if p.resize_mode == 3:  # the host resizes the latents
        return None
    background = shared.opts.img2img_background_color
    picture = images.flatten(p.init_images[image % len(p.init_images)], background)
    return images.resize_image(p.resize_mode, picture, p.width, p.height)
