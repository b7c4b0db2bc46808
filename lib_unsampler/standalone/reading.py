"""Picture files as latents of the embedded models, and mask files as weights."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor


def load_picture(path: Path, size: int) -> Tensor:
    """A picture as latents in [-1, 1] with shape (1, 3, H, W), its long side at most ``size``.

    Transparency is laid on white.

    Raises:
        ValueError: if the file is no picture, OSError: if it cannot be read.
    """
    picture = ImageOps.exif_transpose(_open(path)).convert("RGBA")
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    paper = Image.new("RGBA", picture.size, "white")
    pixels = Image.alpha_composite(paper, picture).convert("RGB")
    return _to_tensor(pixels) * 2 - 1


def load_mask(path: Path, height: int, width: int) -> Tensor:
    """A mask as weights in [0, 1] with shape (1, 1, height, width); white is unsampled."""
    return _to_tensor(_open(path).convert("L").resize((width, height), Image.Resampling.BILINEAR))


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
        return picture
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from None


def _to_tensor(picture: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.reshape(1, picture.height, picture.width, -1).permute(0, 3, 1, 2).float() / 255
