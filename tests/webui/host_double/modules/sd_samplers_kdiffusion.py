import inspect

import torch
from k_diffusion import sampling

from modules import sd_samplers_common, sd_schedulers, shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser, InterruptedException

EXTRA_PARAMS = {
    name: ["s_churn", "s_tmin", "s_tmax", "s_noise"] for name in ("sample_euler", "sample_heun", "sample_dpm_2")
}
SECOND_ORDER = (
    "sample_heun",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_sde",
)


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
        self.funcname = funcname
        self.last_latent = None
        second = {"second_order": True} if funcname in SECOND_ORDER else {}
        brownian = {"brownian": True} if funcname.endswith("sde") else {}
        self.extra_params = EXTRA_PARAMS.get(funcname, [])
        self.config = sd_samplers_common.SamplerData({**second, **brownian})
        self.model_wrap_cfg = CFGDenoiser(self)

    def get_sigmas(self, p, steps):
        p.extra_generation_params["Schedule type"] = "Karras"
        table = ((1 - p.sd_model.alphas_cumprod) / p.sd_model.alphas_cumprod).sqrt()
        return sd_schedulers.schedulers_map[p.scheduler](steps, 0.0291675, 14.614642, table)

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
        extra |= self.initialize(p)
        if "brownian" in self.config.options:
            span = (sigmas[sigmas > 0].min(), sigmas.max())
            extra["noise_sampler"] = sampling.BrownianTreeNoiseSampler(x, *span, seed=list(p.seeds))
        self.model_wrap_cfg.init_latent = x
        self.last_latent = x
        self.sampler_extra_args = {
            "cond": conditioning,
            "image_cond": image_conditioning,
            "uncond": unconditional_conditioning,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": 0.0,
        }
        return self.launch_sampling(
            t_enc + 1,
            lambda: self.func(
                self.model_wrap_cfg,
                xi,
                extra_args=self.sampler_extra_args,
                disable=False,
                callback=self.callback_state,
                **extra,
            ),
        )

    def initialize(self, p):
        self.model_wrap_cfg.p = p
        self.model_wrap_cfg.mask, self.model_wrap_cfg.nmask = p.mask, p.nmask
        self.model_wrap_cfg.step = 0
        options = {name: getattr(shared.opts, name) for name in self.extra_params}
        if "s_tmax" in options:
            options["s_tmax"] = options["s_tmax"] or float("inf")
        return {**options, "eta": p.eta} if "eta" in inspect.signature(self.func).parameters else options

    def callback_state(self, d):
        shared.state.sampling_step = d["i"]

    def launch_sampling(self, steps, func):
        self.model_wrap_cfg.steps = steps
        self.model_wrap_cfg.total_steps = self.config.total_steps(steps)
        shared.state.sampling_steps = steps
        shared.state.sampling_step = 0
        try:
            return func()
        except InterruptedException:
            return self.last_latent
