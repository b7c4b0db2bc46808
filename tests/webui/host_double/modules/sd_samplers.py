import torch

from modules import sd_samplers_kdiffusion

FUNCTIONS = {
    "Euler": "sample_euler",
    "Euler a": "sample_euler_ancestral",
    "Heun": "sample_heun",
    "DPM++ 2M": "sample_dpmpp_2m",
    "DPM++ 2S a": "sample_dpmpp_2s_ancestral",
    "DPM2": "sample_dpm_2",
    "DPM++ SDE": "sample_dpmpp_sde",
    "DPM2 a": "sample_dpm_2_ancestral",
    "DPM++ 2M SDE": "sample_dpmpp_2m_sde",
    "DPM fast": "sample_dpm_fast",
    "DPM adaptive": "sample_dpm_adaptive",
    "LMS": "sample_lms",
}


class CompVisSampler:
    """A timestep sampler: it has no sigmas."""

    def __init__(self, funcname, sd_model):
        self.sd_model = sd_model

    def get_timesteps(self, p, steps):
        return torch.clip(torch.asarray(list(range(0, 1000, 1000 // steps))) + 1, 0, 999)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        return x


def create_sampler(name, model):
    if name == "DDIM":
        return CompVisSampler("ddim", model)
    return sd_samplers_kdiffusion.KDiffusionSampler(FUNCTIONS[name], model)
