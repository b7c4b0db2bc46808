import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from modules import extra_networks, images, prompt_parser, rng, scripts, sd_samplers, shared

opt_f = 8


class Model:
    """A codec in place of a VAE: the latent is the picture at 1/opt_f size, with a fourth channel."""

    parameterization = "eps"

    def __init__(self):
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def encode(picture):
    small = torch.nn.functional.avg_pool2d(picture, opt_f)
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


def decode_latent_batch(model, batch, target_device=None, check_for_nans=False):
    if check_for_nans and torch.isnan(batch).any():
        raise RuntimeError("NaN in the latents")
    return [torch.nn.functional.interpolate(z[None, :3], scale_factor=opt_f)[0] for z in batch]


def uncrop(image, dest_size, paste_loc):
    x, y, w, h = paste_loc
    base_image = Image.new("RGBA", dest_size)
    base_image.paste(image.resize((w, h)), (x, y))
    return base_image


def apply_overlay(image, paste_loc, overlay):
    if overlay is None:
        return image, image.copy()
    if paste_loc is not None:
        image = uncrop(image, (overlay.width, overlay.height), paste_loc)
    original = image.copy()
    image = image.convert("RGBA")
    image.alpha_composite(overlay)
    return image.convert("RGB"), original


def create_infotext(
    p,
    all_prompts,
    all_seeds,
    all_subseeds,
    comments=None,
    iteration=0,
    position_in_batch=0,
    use_main_prompt=False,
    index=None,
    all_negative_prompts=None,
):
    index = position_in_batch if index is None else index
    params = {"Steps": p.steps, "Sampler": p.sampler_name, "Seed": all_seeds[index], **p.extra_generation_params}
    return f"{all_prompts[index]}\n" + ", ".join(f"{k}: {v}" for k, v in params.items())


class Processed:
    def __init__(self, p, images_list, info="", index_of_first_image=0, infotexts=None):
        self.images, self.infotexts, self.info = images_list, infotexts or [info], info
        self.extra_generation_params = p.extra_generation_params
        self.index_of_first_image = index_of_first_image

    def js(self):
        return json.dumps({"infotexts": self.infotexts, "extra_generation_params": self.extra_generation_params})


@dataclass
class StableDiffusionProcessingImg2Img:
    sd_model: Any = None
    outpath_samples: str = None
    prompt: str = "a cat"
    negative_prompt: str = ""
    cfg_scale: float = 7.0
    seed: int = 5
    subseed: int = 9
    subseed_strength: float = 0
    seed_resize_from_h: int = 0
    seed_resize_from_w: int = 0
    sampler_name: str = "Euler"
    scheduler: str = "Automatic"
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 8
    width: int = 64
    height: int = 64
    denoising_strength: float = 0.6
    initial_noise_multiplier: float = 1.0
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    init_images: list = None
    image_mask: Any = None
    mask_round: bool = True
    inpainting_fill: int = 1
    inpaint_full_res: bool = False
    resize_mode: int = 0
    disable_extra_networks: bool = False
    eta: float = 1.0
    refiner_checkpoint: str = None
    refiner_switch_at: float = None
    nmask: Any = None
    mask: Any = None
    overlay_images: list = None
    batch_index: int = field(default=None, init=False)
    paste_to: tuple = None
    is_api: bool = False
    scripts: Any = None
    script_args: tuple = ()
    extra_generation_params: dict = field(default_factory=dict)
    comments: list = field(default_factory=list)

    def __post_init__(self):
        if self.scripts is not None:
            self.scripts.setup_scrips(self)

    def close(self):
        self.sampler = self.c = self.uc = None

    def comment(self, text):
        self.comments.append(text)

    def init(self, all_prompts, all_seeds, all_subseeds):
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        flat = [images.flatten(i, shared.opts.img2img_background_color) for i in self.init_images]
        pictures = [np.asarray(i.resize((self.width, self.height))) for i in flat]
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if len(pictures) == 1:
            batch = batch.repeat(self.batch_size, 1, 1, 1)
        elif len(pictures) <= self.batch_size:
            self.batch_size = len(pictures)
        else:
            raise RuntimeError(f"bad number of images passed: {len(pictures)}; expecting {self.batch_size} or less")
        self.init_latent = encode(batch)
        self.image_conditioning = None

    def sample(self, conditioning, unconditional_conditioning, seeds, subseeds, subseed_strength, prompts):
        x = self.rng.next()
        if self.initial_noise_multiplier != 1.0:
            x *= self.initial_noise_multiplier
        if self.scripts is not None:
            told = {"x": self.init_latent, "noise": x, "c": conditioning, "uc": unconditional_conditioning}
            self.scripts.process_before_every_sampling(self, **told)
        samples = self.sampler.sample_img2img(
            self, self.init_latent, x, conditioning, unconditional_conditioning, image_conditioning=None
        )
        if self.mask is not None:
            samples = samples * self.nmask + self.init_latent * self.mask
        return samples

    def parse_extra_network_prompts(self):
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def setup_conds(self):
        steps = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        total = steps.config.total_steps(self.steps) if hasattr(steps, "config") else self.steps
        self.c = prompt_parser.get_multicond_learned_conditioning(self.sd_model, self.prompts, total)
        self.uc = prompt_parser.get_learned_conditioning(self.sd_model, self.negative_prompts, total)

    def save_samples(self):
        stopped = shared.state.interrupted or shared.state.skipped
        return (
            shared.opts.samples_save
            and not self.do_not_save_samples
            and (shared.opts.save_incomplete_images or not stopped)
        )


def process_images(p):
    """The host's order: process, init, and per batch rng, sample, decode, save."""
    if p.scripts is not None:
        p.scripts.before_process(p)
    count = p.batch_size * p.n_iter
    p.all_prompts, p.all_seeds = [p.prompt] * count, [p.seed + i for i in range(count)]
    p.all_subseeds = [p.subseed + i for i in range(count)]
    p.sd_model_name = "double"
    if p.scripts is not None:
        p.scripts.process(p)
    output, texts = [], []
    with torch.no_grad():
        p.init(p.all_prompts, p.all_seeds, p.all_subseeds)
        if shared.state.job_count == -1:
            shared.state.job_count = p.n_iter
        for n in range(p.n_iter):
            p.iteration = n
            if shared.state.interrupted or shared.state.stopping_generation:
                break
            part = slice(n * p.batch_size, (n + 1) * p.batch_size)
            p.prompts, p.seeds, p.subseeds = p.all_prompts[part], p.all_seeds[part], p.all_subseeds[part]
            p.negative_prompts = [p.negative_prompt] * len(p.prompts)
            shape = p.init_latent.shape[1:]
            p.rng = rng.ImageRNG(shape, p.seeds, subseeds=p.subseeds, subseed_strength=p.subseed_strength)
            p.parse_extra_network_prompts()
            if not p.disable_extra_networks:
                extra_networks.activate(p, p.extra_network_data)
            p.setup_conds()
            samples = p.sample(p.c, p.uc, p.seeds, p.subseeds, p.subseed_strength, p.prompts)
            done = getattr(samples, "already_decoded", False)
            decoded = samples if done else decode_latent_batch(p.sd_model, samples)
            p.latest_samples = samples
            shared.state.nextjob()
            save = p.save_samples()
            pp = scripts.PostprocessBatchListArgs(list(((torch.stack(list(decoded)) + 1) / 2).clamp(0, 1)))
            if p.scripts is not None:
                p.scripts.postprocess_batch_list(p, pp, batch_number=n)
            for i, picture in enumerate(pp.images):
                p.batch_index = i
                array = (255.0 * picture).byte().permute(1, 2, 0).numpy()
                image, text = Image.fromarray(array), create_infotext(p, p.prompts, p.seeds, p.subseeds, index=i)
                if p.scripts is not None:
                    pp = scripts.PostprocessImageArgs(image)
                    p.scripts.postprocess_image(p, pp)
                    image = pp.image
                    pp = scripts.PostprocessImageArgs(image)
                    p.scripts.postprocess_image_after_composite(p, pp)
                    image = pp.image
                if save:
                    images.save_image(image, p.outpath_samples, "", p.seeds[i], p.prompts[i], info=text, p=p)
                output.append(image)
                texts.append(text)
    grid = shared.opts.return_grid and not p.do_not_save_grid and len(output) > 1
    if grid:
        output, texts = [Image.new("RGB", (8, 8)), *output], [texts[0], *texts]
    res = Processed(p, output, info=texts[0] if texts else "", index_of_first_image=int(grid), infotexts=texts)
    if p.scripts is not None:
        p.scripts.postprocess(p, res)
    return res
