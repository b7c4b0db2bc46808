r"""Embedded models: denoisers with a closed form, called exactly like k-diffusion's.

They stand where a trained network stands in the WebUI, so that every sampler and schedule of
k-diffusion runs with no weights and against an exact truth. Pictures are their own latents, in
[-1, 1]. A denoiser is called ``model(z, sigma)`` with z of shape (B, ...) and sigma of shape (B),
and returns the posterior mean :math:`D(z; s) = E[x \mid z = a x + s n]` (a = 1 in sigma space,
a = 1 - s on flow).

Prompts are labels that choose the prior's mean picture, so that guidance and negative prompts
mean something without a text encoder.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..core.noising import append_dims, signal_scale

Denoiser = Callable[[Tensor, Tensor], Tensor]

LABELS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "": ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    "sea": ((0.1, 0.4, 0.8), (-0.8, -0.3, 0.2)),
    "sunset": ((-0.3, -0.5, 0.1), (0.9, 0.2, -0.6)),
    "forest": ((-0.2, 0.3, -0.4), (-0.7, -0.4, -0.8)),
    "night": ((-0.95, -0.9, -0.7), (-0.8, -0.8, -0.5)),
    "snow": ((0.5, 0.6, 0.8), (0.9, 0.9, 0.95)),
}
"""Each prompt's colours at the picture's top and bottom edge, in [-1, 1]."""


OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
OPPONENT = OPPONENT / OPPONENT.norm(dim=1, keepdim=True)
"""Orthonormal luma and two chroma axes (Ohta et al. 1980), on which a photograph's colours decorrelate."""


class GaussianPrior:
    r"""A Gaussian image prior, :math:`x \sim N(\mu, F^{-1} S F)`.

    F is orthonormal: opponent colours, then the 2-d FFT.

    .. math:: D(z; s) = \mu + F^{-1}\left[\frac{a S}{a^2 S + s^2} F(z - a \mu)\right]
    """

    def __init__(self, mean: Tensor, power: Tensor, prediction: str = "eps") -> None:
        """The prior's moments.

        Arguments:
            mean: The mean picture with shape (3, H, W).
            power: The spectrum S on ``rfft2``'s frequencies, with shape (3, H, W // 2 + 1).
            prediction: ``eps`` (sigma space) or ``flow``.
        """
        self.mean = mean
        self.power = power
        self.prediction = prediction

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        """D(z; sigma)."""
        sigma = append_dims(sigma, z.ndim)
        a = signal_scale(sigma, self.prediction)
        gain = a * self.power / (a**2 * self.power + sigma**2)
        return self.mean + self._filter(z - a * self.mean, gain)

    def solve(self, z: Tensor, sigma: Tensor, to_sigma: Tensor) -> Tensor:
        r"""The probability-flow ODE from level s to level s', exactly.

        .. math:: F(z' - a' \mu) = F(z - a \mu) \sqrt{\frac{a'^2 S + s'^2}{a^2 S + s^2}}

        Arguments:
            z: Latents at level s with shape (B, C, H, W).
            sigma: The level s, with shape ().
            to_sigma: The level s', with shape ().
        """
        a, b = signal_scale(sigma, self.prediction), signal_scale(to_sigma, self.prediction)
        gain = ((b**2 * self.power + to_sigma**2) / (a**2 * self.power + sigma**2)).sqrt()
        return b * self.mean + self._filter(z - a * self.mean, gain)

    @staticmethod
    def _filter(x: Tensor, gain: Tensor) -> Tensor:
        axes = OPPONENT.to(x)
        spectrum = torch.fft.rfft2(torch.einsum("ij,bjhw->bihw", axes, x), norm="ortho") * gain
        return torch.einsum("ji,bjhw->bihw", axes, torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))


class MixturePrior:
    r"""A Gaussian mixture with equal weights, :math:`x \sim \frac1K \sum_k N(m_k, v I)`.

    .. math:: D(z; s) = \sum_k w_k \left( m_k + \frac{v}{v + s^2} (z - m_k) \right), \quad
        w_k \propto \exp \frac{-\|z - m_k\|^2}{2 (v + s^2)}

    In sigma space.
    """

    prediction = "eps"

    def __init__(self, means: Tensor, variance: float) -> None:
        """The prior's components.

        Arguments:
            means: The components' means with shape (K, ...).
            variance: The common variance v.
        """
        self.means = means
        self.variance = variance

    def __call__(self, z: Tensor, sigma: Tensor) -> Tensor:
        """D(z; sigma)."""
        total = append_dims(self.variance + sigma**2, z.ndim)
        gaps = z.unsqueeze(1) - self.means
        squares = gaps.flatten(2).square().sum(-1)
        weights = torch.softmax(-squares / (2 * total.flatten(1)), dim=1)
        mean = torch.tensordot(weights, self.means, dims=1)
        return mean + self.variance / total * (z - mean)


def pink_power(height: int, width: int, variances: tuple[float, float, float] = (0.5, 0.06, 0.01)) -> Tensor:
    r"""A :math:`1 / f^2` power spectrum, the spectrum of natural pictures, finite at frequency 0.

    :math:`S \propto 1 / (1 + f^2)`, f in cycles per picture, scaled so that the
    pixels' variances on the opponent axes are ``variances``.

    Returns:
        S on ``rfft2``'s frequencies, with shape (3, height, width // 2 + 1).
    """
    down = torch.fft.fftfreq(height, 1 / height)[:, None]
    across = torch.fft.fftfreq(width, 1 / width)[None, :]
    power = 1 / (1 + down**2 + across**2)
    power = torch.tensor(variances).reshape(3, 1, 1) * (power / power.mean())
    return power[..., : width // 2 + 1]


def label_picture(label: str, height: int, width: int) -> Tensor:
    """The mean picture of a prompt, a vertical gradient with shape (3, height, width).

    Raises:
        ValueError: if the prompt is none of :data:`LABELS`.
    """
    key = label.strip().lower()
    if key not in LABELS:
        words = ", ".join(repr(k) for k in LABELS if k)
        raise ValueError(f"{label!r} is not a prompt of the embedded models (empty, {words})")
    top, bottom = (torch.tensor(c).reshape(3, 1, 1) for c in LABELS[key])
    ramp = torch.linspace(0, 1, height).reshape(1, height, 1)
    return (top + (bottom - top) * ramp).expand(3, height, width).contiguous()


def make_model(name: str, prompt: str, height: int, width: int) -> GaussianPrior | MixturePrior:
    """The embedded model of a settings' ``model`` name under a prompt, for one picture size.

    The mixture's components are the labels' pictures; a prompt leaves only its own.

    Raises:
        ValueError: for an unknown prompt.
    """
    mean = label_picture(prompt, height, width)
    if name == "mixture":
        labels = [prompt] if prompt.strip() else [k for k in LABELS if k]
        return MixturePrior(torch.stack([label_picture(k, height, width) for k in labels]), 0.3**2)
    return GaussianPrior(mean, pink_power(height, width), "flow" if name == "gaussian-flow" else "eps")


def guided(positive: Denoiser, negative: Denoiser, scale: float) -> Denoiser:
    r"""Classifier-free guidance, :math:`D = D_- + c\,(D_+ - D_-)`; at 1 the negative is not called."""
    if scale == 1:
        return positive

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        away = negative(z, sigma)
        return away + scale * (positive(z, sigma) - away)

    return denoise


def masked(denoiser: Denoiser, source: Tensor, mask: Tensor) -> Denoiser:
    """The denoiser with the source outside the mask, as the WebUI's samplers inpaint."""
    return lambda z, sigma: mask * denoiser(z, sigma) + (1 - mask) * source


def anchor_mixture() -> MixturePrior:
    """DESIGN 4's mixture: d = 16, six components, variance 0.35^2; states have shape (B, 16)."""
    means = np.random.default_rng(0).normal(size=(6, 16))
    return MixturePrior(torch.from_numpy(means), 0.35**2)
