"""Trains the bench's pixel denoiser on the photographs that scikit-image ships; about ten minutes on two CPU cores.

python tests/train_denoiser.py [--steps 12000] [--device cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from skimage import data
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib_unsampler.bench._pixels import DEVIATION, SIDE, WEIGHTS, PixelDenoiser

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
BATCH = 32


def photographs() -> list[Tensor]:
    """Colour photographs in [-1, 1], each (3, H, W), at half and quarter size."""
    found = []
    for name in NAMES:
        pixels = torch.from_numpy(getattr(data, name)()[..., :3].copy()).permute(2, 0, 1)[None] / 127.5 - 1
        found += [torch.nn.functional.interpolate(pixels, scale_factor=f, mode="area")[0] for f in (0.5, 0.25)]
    return found


def batches(generator: torch.Generator) -> Iterator[Tensor]:
    """Endless random crops, half of them mirrored."""
    pictures = photographs()

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    while True:
        crops = []
        for _ in range(BATCH):
            picture = pictures[number(len(pictures))]
            top, left = (number(size - SIDE + 1) for size in picture.shape[1:])
            crop = picture[:, top : top + SIDE, left : left + SIDE]
            crops.append(crop.flip(-1) if number(2) else crop)
        yield torch.stack(crops)


def train(steps: int, device: str, out: Path) -> None:
    """Karras et al.'s weighted loss, Adam with a cosine rate; the weights' running mean is kept."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network, crops = PixelDenoiser().to(device), batches(generator)
    kept = {name: t.clone() for name, t in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began, seen = time.time(), 0.0
    for step in range(1, steps + 1):
        x = next(crops).to(device)
        sigma = (torch.randn(BATCH, generator=generator) * 1.6 - 0.4).exp().clamp(0.01, 80).to(device)
        wide = sigma[:, None, None, None]
        estimate = network(x + wide * torch.randn(x.shape, generator=generator).to(device), sigma)
        loss = ((estimate - x).square() * (wide**2 + DEVIATION**2) / (wide * DEVIATION) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for name, value in network.state_dict().items():
            kept[name].lerp_(value, 0.01)
        seen += 0.01 * (float(loss.detach()) - seen)
        if step % 200 == 0:
            print(f"step {step}: loss {seen:.4f}, {time.time() - began:.0f} s", flush=True)
    save_file({name: t.cpu().half().contiguous() for name, t in kept.items()}, out)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    train(options.steps, options.device, options.out)
