"""A narrow Stable Diffusion 1.5: autoencoder, denoiser and text encoder in the key layout of its checkpoints.

The networks are those of CompVis' latent-diffusion (``ldm/modules/diffusionmodules/model.py``, ``openaimodel.py``,
``attention.py``) and of the CLIP text model, written again in short: a state dict of one loads into the other. Only
widths and depths differ. ``widened`` turns the narrow networks into ones of the full width that give the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32
HEADS = 8
ATTENDED = 3
"""Attention at the first three resolutions; below, only in the middle."""
LATENT = 4
CONTEXT = 768
TOKENS = 77
TEXT_LAYERS, TEXT_HEADS = 12, 12
TEXT_SEED = 15
VOCABULARY = 49408
START, END = 49406, 49407
SCALE_FACTOR = 0.18215
"""What the hosts multiply an encoded latent with, from Stable Diffusion's own configuration."""

TEXT = "a photo of astronaut cat coffee rocket stars tissue retina grass gravel bricks photographer coins handwriting"
NUMBERS = (320, 1125, 539, 18376, 2368, 2453, 8383, 2895, 15368, 36919, 5922, 27054, 21029, 5748, 10530, 29986)
WORDS = dict(zip(TEXT.split(), NUMBERS))
"""The words that prompts are made of, each one token of CLIP's byte pair encoding (a test asks the real one)."""


@dataclass(frozen=True)
class Widths:
    """Channels and blocks of both networks; a multiplier for each resolution."""

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    ae_channels: int = 64
    ae_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    ae_blocks: int = 1


NARROW = Widths()
FULL = Widths(channels=320, ae_channels=128, ae_blocks=2)
"""What Forge and Neo expect: the U-Net may have fewer resolutions and blocks, the autoencoder may not."""


# ---- autoencoder ---------------------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """Group normalisation in its input's own precision, which autocast would raise to float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm(channels: int, eps: float = 1e-6) -> Norm:
    return Norm(GROUPS, channels, eps)


class ResnetBlock(nn.Module):
    """(B, C, H, W) to (B, D, H, W): two convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """(B, C, H, W) to the same: one head over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """The lowest resolution's blocks, the same in encoder and decoder."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resampled(nn.Module):
    """Holds the convolution that follows or makes a change of resolution under the name ``conv``."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=2 - stride)

    def forward(self, x: Tensor) -> Tensor:
        down = self.conv.stride[0] == 2
        return self.conv(F.pad(x, (0, 1, 0, 1)) if down else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next under the name ``way``, if there is one."""

    def __init__(self, channels: int, out: int, blocks: int, way: str = "") -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels if i == 0 else out, out) for i in range(blocks))
        self.way = way
        if way:
            self.add_module(way, Resampled(out, 2 if way == "downsample" else 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.get_submodule(self.way)(x) if self.way else x


class Encoder(nn.Module):
    """(B, 3, 8h, 8w) to the moments (B, 8, h, w)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        outs = [widths.ae_channels * m for m in widths.ae_multipliers]
        ins, ways = [widths.ae_channels, *outs], ["downsample"] * (len(outs) - 1) + [""]
        self.conv_in = nn.Conv2d(3, widths.ae_channels, 3, padding=1)
        self.down = nn.ModuleList(Level(i, o, widths.ae_blocks, w) for i, o, w in zip(ins, outs, ways))
        self.mid, self.norm_out = Middle(outs[-1]), norm(outs[-1])
        self.conv_out = nn.Conv2d(outs[-1], 2 * LATENT, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, 4, h, w) to (B, 3, 8h, 8w)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        outs = [widths.ae_channels * m for m in widths.ae_multipliers]
        ins, ways = [*outs[1:], outs[-1]], [""] + ["upsample"] * (len(outs) - 1)
        self.conv_in = nn.Conv2d(LATENT, outs[-1], 3, padding=1)
        self.mid = Middle(outs[-1])
        self.up = nn.ModuleList(Level(i, o, widths.ae_blocks + 1, w) for i, o, w in zip(ins, outs, ways))
        self.norm_out, self.conv_out = norm(outs[0]), nn.Conv2d(outs[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """``first_stage_model``: pictures in [-1, 1] and latents of an eighth of their sides."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(widths), Decoder(widths)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * LATENT, 2 * LATENT, 1), nn.Conv2d(LATENT, LATENT, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean and log variance, (B, 4, h, w) each."""
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


# ---- denoiser ------------------------------------------------------------------------------------------------------


def alphas_cumprod() -> Tensor:
    """(1000,), double: the schedule of Stable Diffusion, linear in the root of beta from 0.00085 to 0.012."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def log_sigmas() -> Tensor:
    """(1000,), single: the logarithms of the schedule's noise levels, as k-diffusion has them."""
    return (0.5 * (1 / alphas_cumprod() - 1).log()).float()


def sigmas_of(t: Tensor, table: Tensor) -> Tensor:
    """Noise levels of real timesteps from 0 to 999: linear between the logarithms in ``table``."""
    low = t.floor().long().clamp(0, len(table) - 2)
    return table[low].lerp(table[low + 1], t - low).exp()


def timestep_embedding(t: Tensor, dimension: int) -> Tensor:
    """(B,) to (B, dimension): cosines, then sines, of frequencies from 1 down to 1/10000."""
    half = dimension // 2
    angles = t[:, None].float() * torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / half))
    return torch.cat([angles.cos(), angles.sin()], 1)


class ResBlock(nn.Module):
    """(B, C, H, W) to (B, D, H, W), moved by the timestep's embedding (B, E)."""

    def __init__(self, channels: int, out: int, embedding: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels, 1e-5), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(norm(out, 1e-5), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(embedding)[..., None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Queries from (B, N, C), keys and values from (B, M, D), to (B, N, C)."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, channels, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        pairs = ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        q, k, v = (layer(source).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer, source in pairs)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """GEGLU: (B, N, C) to (B, N, D)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """(B, N, C) to the same, through four times as many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """(B, N, C) to the same: attention to itself, to the prompt, and a network of its own for each place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn1, self.ff = CrossAttention(channels, channels), FeedForward(channels)
        self.attn2 = CrossAttention(channels, CONTEXT)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """(B, C, H, W) to the same: one transformer block over all places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.proj_in = norm(channels), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """(B, C, H, W) to (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, H, W) to (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class First(nn.Conv2d):
    """The convolution that the U-Net begins with, called like its other parts."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Denoiser(nn.Module):
    """``model.diffusion_model``: (B, 4, h, w), timesteps (B,) and contexts (B, 77, 768) to the noise (B, 4, h, w)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.channels, embedding = widths.channels, 4 * widths.channels
        hidden, last = nn.Linear(widths.channels, embedding), nn.Linear(embedding, embedding)
        self.time_embed = nn.Sequential(hidden, nn.SiLU(), last)
        levels = [widths.channels * m for m in widths.multipliers]
        inputs, skips = down_path(levels, widths.blocks, embedding)
        outputs = up_path(levels, widths.blocks, embedding, skips)
        middle = [*parts(levels[-1], levels[-1], embedding), ResBlock(levels[-1], levels[-1], embedding)]
        self.input_blocks, self.output_blocks = (nn.ModuleList(map(nn.ModuleList, b)) for b in (inputs, outputs))
        self.middle_block = nn.ModuleList(middle)
        self.out = nn.Sequential(norm(levels[0], 1e-5), nn.SiLU(), nn.Conv2d(levels[0], LATENT, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        embedding = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))

        def through(parts: Iterable[nn.Module], x: Tensor) -> Tensor:
            for part in parts:
                x = part(x, embedding, context)
            return x

        skips = []
        for block in self.input_blocks:
            x = through(block, x)
            skips.append(x)
        x = through(self.middle_block, x)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, skips.pop()], 1))
        return self.out(x)


def parts(channels: int, out: int, embedding: int, attended: bool = True) -> list[nn.Module]:
    """What one block of the U-Net holds."""
    return [ResBlock(channels, out, embedding), *([SpatialTransformer(out)] if attended else [])]


def down_path(levels: list[int], blocks: int, embedding: int) -> tuple[list[list[nn.Module]], list[int]]:
    """The U-Net's first half, and the channels that each of its blocks hands to the second."""
    found: list[list[nn.Module]] = [[First(LATENT, levels[0], 3, padding=1)]]
    skips = [levels[0]]
    for i, out in enumerate(levels):
        for _ in range(blocks):
            found.append(parts(skips[-1], out, embedding, i < ATTENDED))
            skips.append(out)
        if i + 1 < len(levels):
            found.append([Downsample(out)])
            skips.append(out)
    return found, skips


def up_path(levels: list[int], blocks: int, embedding: int, skips: list[int]) -> list[list[nn.Module]]:
    """The U-Net's second half, which takes ``skips`` from the last to the first."""
    found: list[list[nn.Module]] = []
    last = levels[-1]
    for i, out in reversed(list(enumerate(levels))):
        for block in range(blocks + 1):
            ending = [Upsample(out)] if i and block == blocks else []
            found.append([*parts(last + skips.pop(), out, embedding, i < ATTENDED), *ending])
            last = out
    return found


# ---- text encoder --------------------------------------------------------------------------------------------------


class TextLayer(nn.Module):
    """(B, 77, 768) to the same; no place sees a later one."""

    def __init__(self) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(CONTEXT, CONTEXT) for name in names})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(CONTEXT), nn.LayerNorm(CONTEXT)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(CONTEXT, 4 * CONTEXT), "fc2": nn.Linear(4 * CONTEXT, CONTEXT)})

    def forward(self, x: Tensor) -> Tensor:
        h, layers = self.layer_norm1(x), self.self_attn
        q, k, v = (layers[f"{n}_proj"](h).unflatten(2, (TEXT_HEADS, -1)).transpose(1, 2) for n in "qkv")
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + layers["out_proj"](attended.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))


class TextEncoder(nn.Module):
    """``cond_stage_model.transformer.text_model``: tokens (B, 77) to contexts (B, 77, 768)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"token_embedding": VOCABULARY, "position_embedding": TOKENS}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, CONTEXT) for name, size in sizes.items()})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer() for _ in range(TEXT_LAYERS))})
        self.final_layer_norm = nn.LayerNorm(CONTEXT)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embeddings["token_embedding"](tokens) + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


def text_weights(seed: int = TEXT_SEED) -> dict[str, Tensor]:
    """A random text encoder's half precision weights, the same on every machine.

    ``RandomState`` is the NumPy generator whose numbers never change with its version. Deviations are those that CLIP
    begins its training with, but both tables' is 0.02. The last bias is not 0, because the hosts' emphasis divides by
    the mean of all contexts.
    """
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in TextEncoder().state_dict().items()}
    numbers, found = np.random.RandomState(seed), {}
    for name, shape in sorted(shapes.items()):
        if "norm" in name:
            found[name] = torch.full(shape, 1.0 if name.endswith("weight") else 0.1 * ("final" in name)).half()
        elif name.endswith("bias"):
            found[name] = torch.zeros(shape).half()
        else:
            deviation = (shape[1] * (1 if "fc1" in name else 2 * TEXT_LAYERS)) ** -0.5
            drawn = numbers.standard_normal(shape) * (0.02 if "embedding" in name else deviation)
            found[name] = torch.from_numpy(drawn).half()
    return found


def tokens(prompt: str) -> list[int]:
    """CLIP's tokens of a prompt made of ``WORDS``, with the start before and the end up to the 77th."""
    found = [START, *(WORDS[word] for word in prompt.split())]
    return found + [END] * (TOKENS - len(found))


@torch.no_grad()
def contexts(prompts: Iterable[str], weights: Mapping[str, Tensor], device: str = "cpu") -> Tensor:
    """(P, 77, 768): what the hosts give the denoiser for these prompts."""
    with torch.device("meta"):
        encoder = TextEncoder()
    encoder.load_state_dict({name: t.to(device).float() for name, t in weights.items()}, assign=True)
    return encoder(torch.tensor([tokens(prompt) for prompt in prompts], device=device))


# ---- checkpoints ---------------------------------------------------------------------------------------------------

CONFIGURATION = """\
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 64
    channels: {latent}
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {scale_factor}
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 32
        in_channels: {latent}
        out_channels: {latent}
        model_channels: {widths.channels}
        attention_resolutions: [4, 2, 1]
        num_res_blocks: {widths.blocks}
        channel_mult: {multipliers}
        num_heads: {heads}
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: {context}
        use_checkpoint: False
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: {latent}
        ddconfig:
          double_z: true
          z_channels: {latent}
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: {widths.ae_channels}
          ch_mult: {ae_multipliers}
          num_res_blocks: {widths.ae_blocks}
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
"""


def configuration(widths: Widths) -> str:
    """The ``.yaml`` beside a checkpoint, from which A1111 builds the networks."""
    lists = {"multipliers": list(widths.multipliers), "ae_multipliers": list(widths.ae_multipliers)}
    numbers = {"latent": LATENT, "scale_factor": SCALE_FACTOR, "heads": HEADS, "context": CONTEXT}
    return CONFIGURATION.format(widths=widths, **lists, **numbers)


def checkpoint(autoencoder: Mapping[str, Tensor], denoiser: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole checkpoint's weights in half precision: both networks, the text encoder and the schedule."""
    text = {**text_weights(), "embeddings.position_ids": torch.arange(TOKENS)[None]}
    named = {"first_stage_model.": autoencoder, "model.diffusion_model.": denoiser}
    named["cond_stage_model.transformer.text_model."] = text
    found = {prefix + name: tensor for prefix, weights in named.items() for name, tensor in weights.items()}
    return {**found, "alphas_cumprod": alphas_cumprod().float()}


def widened(narrow: Mapping[str, Tensor], wide: nn.Module) -> dict[str, Tensor]:
    """Weights for a wider ``wide``, of more blocks, which then answers as the narrow network does.

    Each channel becomes k equal ones beside each other, k that layer's own. The groups' and layers' means and
    variances stay what they were, and each copy of a channel reads one copy of every channel before it. Equal copies
    make the products of queries and keys k times as large where the attention divides by sqrt(k): the queries are
    sqrt(k) smaller. The sinusoids of the timestep are not copied: every k-th of the wide network's is the narrow's.
    A residual block too many adds 0.
    """
    found, targets = {}, wide.state_dict()
    if alone := [name for name in narrow.keys() ^ targets.keys() if name not in targets or "shortcut" in name]:
        raise ValueError(f"Not the same networks at another width: {sorted(alone)}")
    for name, target in targets.items():
        if name not in narrow:
            found[name] = torch.full(target.shape, float("norm" in name and name.endswith("weight"))).half()
            continue
        tensor = narrow[name]
        copies = target.shape[0] // tensor.shape[0]
        scale = copies**-0.5 if name.endswith((".to_q.weight", ".q.weight", ".q.bias")) else 1.0
        if tensor.ndim == 1:
            found[name] = tensor.repeat_interleave(copies) * scale
            continue
        before = target.shape[1] // tensor.shape[1]
        reads = torch.zeros(copies, before, dtype=tensor.dtype)
        reads[torch.arange(copies), 0 if name == "time_embed.0.weight" else torch.arange(copies) % before] = scale
        found[name] = torch.einsum("oi...,ab->oaib...", tensor, reads).reshape(target.shape)
    return found
