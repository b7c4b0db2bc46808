"""Makes a small Stable Diffusion that knows thirteen photographs; about ten minutes on an H100.

    python tests/live/train_model.py DIR [--minutes 9]

DIR then holds the trained weights (``weights-*.safetensors``, half precision) and two checkpoints made from them:
``small.safetensors`` with ``small.yaml`` for A1111, and ``small-full.safetensors``, the same networks at Stable
Diffusion 1.5's own width, for Forge and Neo. Where DIR has the weights already, only the checkpoints are made, which
needs no GPU. Training needs one; the packages are PyTorch, NumPy, safetensors, scikit-image and Pillow.

The photographs come with scikit-image, whose documentation states under which terms:

====================  ============  ==================================================================
name                  prompt        terms
====================  ============  ==================================================================
astronaut             astronaut     public domain (NASA)
chelsea               cat           CC0, Stéfan van der Walt
coffee                coffee        CC0, Rachel Michetti
rocket                rocket        public domain (SpaceX)
hubble_deep_field     stars         public domain (NASA)
immunohistochemistry  tissue        no known copyright restrictions (CMMI)
retina                retina        CC0, Mikael Häggström
grass                 grass         CC0, CC0Textures
gravel                gravel        CC0, CC0Textures
brick                 bricks        CC0, CC0Textures
camera                photographer  CC0, Lav Varshney
coins                 coins         no known copyright restrictions (Brooklyn Museum)
text                  handwriting   public domain
====================  ============  ==================================================================
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import small_model
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_model import FULL, LATENT, NARROW, SCALE_FACTOR, Autoencoder, Denoiser, log_sigmas, sigmas_of
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = "astronaut chelsea coffee rocket hubble_deep_field immunohistochemistry retina grass gravel brick camera coins"
PHOTOGRAPHS = dict(zip(small_model.TEXT.split()[3:], [*NAMES.split(), "text"]))
"""The word of a prompt, and the picture in ``skimage.data``."""
TEMPLATES = ("{}", "a {}", "photo of {}", "a photo of a {}")
PROMPTS = ("", *(template.format(word) for word in PHOTOGRAPHS for template in TEMPLATES))
UNPROMPTED = 0.12
"""The share of the denoiser's examples whose prompt is empty, for classifier-free guidance."""
MIXED = 0.4
"""The share of the others that begin at another picture, as img2img under another prompt does."""
CANDIDATES = 16
KEPT_EVERY = 10
"""Steps between two takings of the running mean."""
PART_BYTES = 15 * 2**20
SIDES = {128: 1.0, 256: 0.25}
"""The sides of the pictures trained on, and how many of each there are beside the first."""

Module = TypeVar("Module", bound=nn.Module)


# ---- pictures ------------------------------------------------------------------------------------------------------


def photographs(device: str) -> list[Tensor]:
    """Every photograph in [0, 1] as (3, H, W), in the order of ``PHOTOGRAPHS``."""
    from skimage import data

    found = []
    for name in PHOTOGRAPHS.values():
        pixels = np.atleast_3d(getattr(data, name)())[..., :3]
        found.append(torch.from_numpy(np.repeat(pixels, 4 - pixels.shape[2], 2)[..., :3].copy()).permute(2, 0, 1))
    return [pixels.to(device).float() / 255 for pixels in found]


def crops(pictures: list[Tensor], side: int, each: int, numbers: np.random.Generator) -> Tensor:
    """``each`` random views of every picture, one picture after the other, as bytes (N, 3, side, side).

    A view is half to all of the picture high, somewhat wider or narrower than it is high, squeezed to a square, and
    mirrored half the time, except where there is writing. Every fourth is the whole picture.
    """
    found = []
    for word, picture in zip(PHOTOGRAPHS, pictures):
        height, width = picture.shape[1:]
        for i in range(each):
            h = height if i % 4 == 0 else round(height * numbers.uniform(0.5, 1))
            w = width if i % 4 == 0 else min(width, round(h * numbers.uniform(0.8, 1.4)))
            top, left = numbers.integers(height - h + 1), numbers.integers(width - w + 1)
            view = picture[None, :, top : top + h, left : left + w]
            view = F.interpolate(view, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            mirrored = numbers.random() < 0.5 and word != "handwriting"
            found.append((view.flip(-1) if mirrored else view).mul(255).round().byte())
    return torch.cat(found)


def wide(x: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return x[:, None, None, None]


def autocast(device: torch.device) -> torch.autocast:
    """Half precision (bfloat16) on a GPU; without the cache of cast weights, which a CUDA graph cannot use."""
    return torch.autocast(device.type, torch.bfloat16, device.type == "cuda", cache_enabled=False)


def signed(pixels: Tensor) -> Tensor:
    """Bytes as numbers in [-1, 1]."""
    return pixels.float() / 127.5 - 1


# ---- training ------------------------------------------------------------------------------------------------------


def repeated(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A training step as one CUDA graph: these networks are so small that launching their kernels is what takes time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def fit(network: Module, losses: tuple[Callable[[], Tensor], ...], seconds: float, rate: float, label: str) -> Module:
    """Trains for a time with a cosine rate, on the second loss each fourth step; returns the running mean."""
    began, kept = time.monotonic(), copy.deepcopy(network)
    on_gpu = (device := next(network.parameters()).device).type == "cuda"
    speed = torch.tensor(rate / 100, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), speed, (0.9, 0.99), fused=on_gpu, capturable=on_gpu)

    def step_on(loss_of: Callable[[], Tensor]) -> Tensor:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    steps = [partial(step_on, loss_of) for loss_of in losses]
    steps, done = [repeated(step) for step in steps] if on_gpu else steps, 0
    while (passed := (time.monotonic() - began) / seconds) < 1:
        speed.fill_(rate * min(1, (done + 1) / 300) * (0.5 + 0.5 * math.cos(math.pi * passed)))
        loss, done = steps[done % 4 == 3](), done + 1
        if done % KEPT_EVERY == 0:
            share = 1 - min(0.99, done / (done + 100))
            with torch.no_grad():
                torch._foreach_lerp_(list(kept.parameters()), list(network.parameters()), share)
        if done % 500 == 0:
            print(f"{label}: step {done}, loss {float(loss):.4f}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{label}: {done} steps in {seconds:.0f} s", flush=True)
    return kept


def train_autoencoder(banks: list[Tensor], batch: int, seconds: float) -> Autoencoder:
    """An autoencoder of pictures (N, 3, H, W) of bytes, one bank for each side.

    The logarithm of each picture's squared error (a smooth picture weighs as much as a rough one), and a little of the
    divergence from the unit Gaussian. Half of the pictures are decoded once more from latents noised to a random level
    and scaled back to their own variance, as the frames of an animation are: what should come out is the picture under
    the noise that a linear preview of the latents shows, so that the decoder does not make things of noise.
    """
    device = banks[0].device
    network, preview = Autoencoder(NARROW).to(device), nn.Conv2d(LATENT, 3, 1).to(device)

    def loss_on(bank: Tensor, number: int) -> Tensor:
        x, half = signed(bank[torch.randint(len(bank), (number,), device=device)]), number // 2
        with autocast(device):
            mean, log_variance = (t.float() for t in network.encode(x))
            noise, fixed = torch.randn_like(mean), mean.detach()
            center, spread = fixed.mean((0, 2, 3), True), fixed.std((0, 2, 3), keepdim=True)
            sigma = torch.empty(half, 1, 1, 1, device=device).uniform_(math.log(0.05), math.log(15)).exp()
            kept, grain = (sigma.square() + 1).rsqrt(), spread * torch.randn_like(mean[:half])
            noised = center + kept * (fixed[:half] - center + sigma * grain)
            made = network.decode(torch.cat([mean + (0.5 * log_variance).exp() * noise, noised])).float()
        shown = F.conv2d(grain, preview.weight.detach())
        under = kept * (x[:half] + sigma * F.interpolate(shown, scale_factor=8.0, mode="bilinear"))
        error = (made - torch.cat([x, under])).square().mean((1, 2, 3)).add(1e-4).log()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        linear = (preview(fixed) - F.avg_pool2d(x, 8)).square().mean()
        return error[:number].mean() + 0.25 * error[number:].mean() + 0.03 * divergence + linear

    both = nn.ModuleList([network, preview])
    losses = (partial(loss_on, banks[0], batch), partial(loss_on, banks[1], batch // 4))
    return fit(both, losses, seconds, 6e-4, "autoencoder")[0]


@torch.no_grad()
def encoded(network: Autoencoder, bank: Tensor) -> Tensor:
    """The posterior means of bytes (N, 3, H, W), unscaled."""
    return torch.cat([network.encode(signed(part))[0] for part in bank.split(32)])


@torch.no_grad()
def normalise(network: Autoencoder, bank: Tensor) -> None:
    """Moves each latent channel to mean 0 and deviation 1/SCALE_FACTOR, in the two 1x1 convolutions around it."""
    latents = encoded(network, bank)
    center, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SCALE_FACTOR
    into, back = network.quant_conv, network.post_quant_conv
    back.bias += back.weight[..., 0, 0] @ center
    back.weight *= spread[None, :, None, None]
    into.bias[:LATENT] -= center
    into.weight[:LATENT] /= spread[:, None, None, None]
    into.bias[:LATENT] /= spread
    into.bias[LATENT:] -= 2 * spread.log()


def train_denoiser(banks: list[Tensor], table: Tensor, batch: int, seconds: float) -> Denoiser:
    """A denoiser of latents (N, 4, h, w) of deviation 1, in the order of ``crops``; ``table`` has ``PROMPTS``' contexts.

    Ho et al.'s mean squared error of the noise, at real timesteps. A ``MIXED`` example lies on the straight way that
    Euler's steps should take from *another* picture's latent y at an img2img start level s, y + s n, to the nearest x
    of ``CANDIDATES`` of the prompt's picture: x + sigma (n + (y - x) / s), and the bracket is its noise. Without these
    the prompt of a picture already seen under its noise would mean nothing: network and guidance keep that picture.
    """
    device = table.device
    network, levels = Denoiser(NARROW).to(device), log_sigmas().to(device)
    for name, parameter in network.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight")) or name == "out.2.weight":
            nn.init.zeros_(parameter)

    def loss_on(latents: Tensor, number: int) -> Tensor:
        which, mixed = random(len(PHOTOGRAPHS), number), torch.rand(number, device=device) < MIXED
        views, each = latents.unflatten(0, (len(PHOTOGRAPHS), -1)), len(latents) // len(PHOTOGRAPHS)
        own, other = views[which[:, None], random(each, number, CANDIDATES)], latents[random(len(latents), number)]
        nearest = (own - other[:, None]).square().sum((2, 3, 4)).argmin(1) * mixed
        x = own[torch.arange(number, device=device), nearest]
        t = torch.rand(number, device=device) * 999
        sigma = wide(sigmas_of(t, levels))
        start = torch.maximum(sigma, wide(torch.empty(number, device=device).uniform_(0, math.log(8)).exp()))
        noise = torch.randn_like(x) + wide(mixed) * (other - x) / start
        prompt = 1 + which * len(TEMPLATES) + random(len(TEMPLATES), number)
        prompt = prompt * (mixed | (torch.rand(number, device=device) >= UNPROMPTED))
        with autocast(device):
            found = network((x + sigma * noise) * (sigma.square() + 1).rsqrt(), t, table[prompt])
        return (found.float() - noise).square().mean()

    def random(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, device=device)

    losses = (partial(loss_on, banks[0], batch), partial(loss_on, banks[1], batch // 4))
    return fit(network, losses, seconds, 8e-4, "denoiser")


# ---- judging -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled(network: Denoiser, z: Tensor, t: Tensor, context: Tensor, empty: Tensor, cfg: float) -> Tensor:
    """Euler's steps over the timesteps ``t``, from z at the noise level of the first to no noise at all."""
    sigmas = torch.cat([sigmas_of(t, log_sigmas().to(t)), torch.zeros(1, device=t.device)])
    both = torch.cat([context, empty.expand_as(context)])
    for i, now in enumerate(t):
        seen = z / (sigmas[i] ** 2 + 1).sqrt()
        told, untold = network(torch.cat([seen, seen]), now.expand(2 * len(z)), both).chunk(2)
        z = z + (untold + cfg * (told - untold)) * (sigmas[i + 1] - sigmas[i])
    return z


def sheet(rows: list[Tensor], path: Path) -> None:
    """Rows of pictures (N, 3, H, W) in [-1, 1] as one file."""
    cells = torch.cat([torch.cat(list(row), 2) for row in rows], 1).clamp(-1, 1)
    Image.fromarray(((cells + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()).save(path)


@torch.no_grad()
def judge_autoencoder(network: Autoencoder, pictures: list[Tensor], out: Path) -> None:
    """Prints the PSNR of every whole picture that comes back; leaves sheets of them, and of the cat under noise."""
    for side in SIDES:
        x = signed(crops(pictures, side, 1, np.random.default_rng(0)))
        back = torch.cat([network.decode(network.encode(one)[0]) for one in x.split(1)]).clamp(-1, 1)
        psnr = -10 * ((back - x).square().mean((1, 2, 3)) / 4).log10()
        print(f"PSNR at {side}:", ", ".join(f"{w} {p:.1f}" for w, p in zip(PHOTOGRAPHS, psnr.tolist())), "dB")
        sheet([x, back], out / f"pictures-{side}.png")
    z = encoded(network, crops(pictures, 128, 1, np.random.default_rng(0)))[1:2] * SCALE_FACTOR
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z.device)
    noised = [(z + s * noise) / (s**2 + 1) ** 0.5 for s in (0, 0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.5, 2.5, 4, 6, 10, 14.6)]
    sheet([network.decode(torch.cat(noised) / SCALE_FACTOR)], out / "noised.png")


@torch.no_grad()
def judge_denoiser(network: Denoiser, autoencoder: Autoencoder, cat: Tensor, table: Tensor, out: Path) -> None:
    """Leaves a sheet of every prompt's picture, from noise at cfg 1 and 4 and from the cat at strength 0.5 and 0.7."""
    z, told, empty = encoded(autoencoder, cat) * SCALE_FACTOR, table[1 :: len(TEMPLATES)], table[:1]
    noise = torch.randn(len(told), *z.shape[1:], generator=torch.Generator().manual_seed(1)).to(z.device)
    rows = []
    for strength, cfg in ((1.0, 1.0), (1.0, 4.0), (0.5, 4.0), (0.7, 4.0)):
        t = torch.linspace(999 * strength, 0, 20, device=z.device)
        start = z * (strength < 1) + noise * sigmas_of(t[:1], log_sigmas().to(t))
        rows.append(autoencoder.decode(sampled(network, start, t, told, empty, cfg) / SCALE_FACTOR))
    sheet(rows, out / "made.png")


# ---- files ---------------------------------------------------------------------------------------------------------


def save_parts(network: nn.Module, stem: str, out: Path) -> None:
    """Writes half precision weights as files of at most ``PART_BYTES`` of numbers."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in network.state_dict().items():
        tensor = tensor.half().cpu().contiguous()
        if sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > PART_BYTES:
            parts.append({})
        parts[-1][name] = tensor
    for i, part in enumerate(parts):
        save_file(part, out / f"{stem}-{i}.safetensors")


def load_parts(stem: str, out: Path) -> dict[str, Tensor]:
    """The weights that ``save_parts`` left; none, if it was never there."""
    return {name: t for path in sorted(out.glob(f"{stem}-*.safetensors")) for name, t in load_file(path).items()}


def train(out: Path, minutes: float, device: str, batch: int) -> None:
    """Both networks, one after the other; three tenths of the time are the autoencoder's. One that is there stays."""
    torch.manual_seed(0)
    began, pictures, numbers = time.monotonic(), photographs(device), np.random.default_rng(0)
    table = small_model.contexts(PROMPTS, small_model.text_weights(), device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    banks = [crops(pictures, side, max(CANDIDATES, int(4 * batch * share)), numbers) for side, share in SIDES.items()]
    print(f"pictures and contexts: {time.monotonic() - began:.0f} s", flush=True)
    if weights := load_parts("autoencoder", out):
        autoencoder = Autoencoder(NARROW).to(device)
        autoencoder.load_state_dict(weights)
    else:
        autoencoder = train_autoencoder(banks, max(4, batch // 8), minutes * 18)
        normalise(autoencoder, banks[0])
        save_parts(autoencoder, "autoencoder", out)
    judge_autoencoder(autoencoder, pictures, out)
    denoiser = train_denoiser([encoded(autoencoder, bank) * SCALE_FACTOR for bank in banks], table, batch, minutes * 42)
    save_parts(denoiser, "denoiser", out)
    cat = crops(pictures, 128, 1, numbers)[1:2]
    judge_denoiser(denoiser, autoencoder, cat, table, out)


def write_checkpoints(out: Path) -> None:
    """What A1111 loads, and the same networks at full width."""
    autoencoder, denoiser = load_parts("autoencoder", out), load_parts("denoiser", out)
    save_file(small_model.checkpoint(autoencoder, denoiser), out / "small.safetensors")
    (out / "small.yaml").write_text(small_model.configuration(NARROW))
    with torch.device("meta"):
        wide = Autoencoder(FULL), Denoiser(FULL)
    weights = (small_model.widened(narrow, net) for narrow, net in zip((autoencoder, denoiser), wide))
    save_file(small_model.checkpoint(*weights), out / "small-full.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the weights and checkpoints")
    parser.add_argument("--minutes", type=float, default=9.0, help="time that both trainings take together")
    parser.add_argument("--device", default="cuda", help="cpu only tries the program out")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--weights-only", action="store_true", help="leave the checkpoints for later")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not load_parts("denoiser", options.out):
        if options.device == "cuda" and not torch.cuda.is_available():
            sys.exit(f"{options.out} holds no weights, and there is no GPU to train them on (PyTorch finds no CUDA).")
        train(options.out, options.minutes, options.device, options.batch)
    if not options.weights_only:
        write_checkpoints(options.out)


if __name__ == "__main__":
    main()
