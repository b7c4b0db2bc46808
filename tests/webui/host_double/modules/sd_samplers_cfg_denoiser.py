from types import SimpleNamespace

from modules import extra_networks, prompt_parser, script_callbacks, shared


class InterruptedException(BaseException):
    pass


def mean_of(prompts, x):
    """A prompt's mean latent: another number for each prompt and each loaded network, 0 for the empty prompt."""
    values = [(sum(map(ord, prompt)) % 97 / 97 - 0.5 if prompt else 0.0) for prompt in prompts]
    values = x.new_tensor(values).reshape(-1, *[1] * (x.ndim - 1))
    return values + 0.25 * len(extra_networks.active)


class CFGDenoiser:
    """Guided denoiser of x ~ N(mean of the prompt, 1), with the host's attributes and inpainting blend."""

    def __init__(self, sampler):
        self.mask = self.nmask = self.init_latent = None
        self.steps = self.total_steps = self.p = None
        self.step = 0
        self.sampler = sampler
        self.inner_model = self

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted or shared.state.skipped:
            raise InterruptedException
        state = shared.state
        counters = {"sampling_step": state.sampling_step, "total_sampling_steps": state.sampling_steps}
        params = SimpleNamespace(x=x, sigma=sigma, denoiser=self, **counters)
        script_callbacks.cfg_denoiser_callback(params)
        x = params.x
        gain = 1 / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)
        positive = mean_of(prompt_parser.reconstruct(cond.batch, self.step), x)
        negative = mean_of(prompt_parser.reconstruct(uncond, self.step), x)
        mean = negative + cond_scale * (positive - negative)
        denoised = mean + gain * (x - mean)
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = shared.state.current_latent = denoised
        self.step += 1
        return denoised
