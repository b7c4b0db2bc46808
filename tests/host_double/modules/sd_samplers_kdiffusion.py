import inspect

import torch
from k_diffusion import sampling

from modules import sd_samplers_common, shared


class InterruptedException(BaseException):
    pass


class Hijack:
    """k-diffusion's torch: its randn_like is the request's own generator."""

    def __init__(self, p):
        self.rng = p.rng

    def __getattr__(self, name):
        return (lambda x: self.rng.next()) if name == "randn_like" else getattr(torch, name)


class KDiffusionSampler:
    def __init__(self, funcname, sd_model, options=None):
        self.func = getattr(sampling, funcname)
        self.sd_model = sd_model
        self.last_latent = None
        self.seen = []

    def get_sigmas(self, p, steps):
        p.extra_generation_params["Schedule type"] = "Karras"
        return sampling.get_sigmas_karras(steps, 0.0291675, 14.614642)

    def denoise(self, x, sigma, **_):
        if shared.state.interrupted:
            raise InterruptedException
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        steps, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)
        sigma_sched = sigmas[steps - t_enc - 1 :]
        xi = x + noise * sigma_sched[0]
        if shared.opts.img2img_extra_noise > 0:
            xi += noise * shared.opts.img2img_extra_noise
        sampling.torch = Hijack(p)
        parameters = inspect.signature(self.func).parameters
        extra = {"sigmas": sigma_sched} if "sigmas" in parameters else {}
        if "sigma_min" in parameters:
            extra = {"sigma_min": sigma_sched[-2], "sigma_max": sigma_sched[0]}
        if "n" in parameters:
            extra["n"] = len(sigma_sched) - 1
        self.last_latent = x
        shared.state.sampling_steps = t_enc + 1
        try:
            return self.func(self.denoise, xi, disable=True, **extra)
        except InterruptedException:
            return self.last_latent
