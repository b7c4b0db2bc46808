"""The WebUI: the only file that knows ``modules``. Everything it asks of the host is asked here.

Hosts are told apart by what they have, never by a version string. Nothing global is patched: a
request's own ``p`` and its own sampler carry instance attributes that are taken off again.
"""

from __future__ import annotations

import base64
import copy
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from k_diffusion import sampling as k_sampling
from modules import devices, extra_networks, images, processing, rng, scripts, sd_samplers, sd_samplers_common, shared
from PIL import Image
from torch import Tensor

from .files import whole
from .settings import TITLE, Preferences, parse_preferences


class RefusedError(HTTPException):
    """A request that cannot be done as asked: HTTP 422 in the API, readable text on the page."""

    def __init__(self, message: str) -> None:
        super().__init__(status_code=422, detail=message)

    def __str__(self) -> str:
        return self.detail


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Shadows an attribute on one object, and takes the shadow off again whatever happens."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def prediction_type(model: Any) -> str:
    """``eps``, ``v`` or ``flow`` of the loaded model.

    Forge's and Neo's predictor names it; reForge and Classic have ComfyUI's classes instead, named
    after it; in A1111 only SD3 noises its latents itself, and it is a flow model.
    """
    forge = getattr(model, "forge_objects", None)
    inner = None if forge is None else forge.unet.model
    if hasattr(inner, "predictor"):
        return {"const": "flow", "v_prediction": "v"}.get(inner.predictor.prediction_type, "eps")
    kinds = [kind.__name__ for kind in type(getattr(inner, "model_sampling", None)).__mro__]
    if "CONST" in kinds or hasattr(model, "add_noise_to_latent"):
        return "flow"
    return "v" if "V_PREDICTION" in kinds or getattr(model, "parameterization", "eps") == "v" else "eps"


def selected_script(p: Any) -> str | None:
    """The title of the script chosen in the script list (X/Y/Z plot, loopback, ...) that drives this request.

    The host keeps its number, counted from 1, as the first script argument.
    """
    args = getattr(p, "script_args", None) or [0]
    if not isinstance(args[0], int) or args[0] < 1:
        return None
    script = p.scripts.selectable_scripts[args[0] - 1]
    return None if script is None else script.title()


def refiner(p: Any) -> str | None:
    """The checkpoint that is to take the model's place during the sampling, if one is."""
    name = getattr(p, "refiner_checkpoint", None)
    return None if name in (None, "", "None", "none") or getattr(p, "refiner_switch_at", None) == 1 else name


def _span(p: Any) -> slice:
    """Where this script's arguments are among the request's."""
    script = next(script for script in p.scripts.alwayson_scripts if script.title() == TITLE)
    return slice(script.args_from, script.args_to)


def arguments(p: Any) -> list[Any]:
    """This script's arguments of a request."""
    return list(p.script_args[_span(p)])


def set_arguments(p: Any, args: Sequence[Any]) -> None:
    """Gives this script other arguments in this request alone; the list itself may belong to others too."""
    span, every = _span(p), list(p.script_args)
    every[span] = [*args, *every[span][len(args) :]]
    p.script_args = every


def xyz_plot() -> Any:
    """The module of the X/Y/Z plot, or None where there is none."""
    modules = (data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py")
    return next(modules, None)


PREFERENCE = "batch_unsampler_"
"""Before the names of the extension's preferences among the WebUI's own."""


def add_preferences(components: Mapping[str, tuple[Any, dict[str, Any]]]) -> None:
    """Puts the extension's section into the Settings tab.

    Arguments:
        components: Each preference's gradio component and its arguments, by the preference's name.
    """
    for f in fields(Preferences):
        component, settings = components[f.name]
        folder = f.name.endswith("folder")  # no API client chooses where files go, nor a page that hides folders
        shown = {**settings, **(shared.hide_dirs if folder else {})}
        option = shared.OptionInfo(
            *(f.default, f.metadata["label"], component, shown), section=("batch_unsampler", TITLE), restrict_api=folder
        )
        shared.opts.add_option(PREFERENCE + f.name, option.info(f.metadata["help"]))


def preferences() -> Preferences:
    """What the Settings tab says now.

    Raises:
        SettingsError: naming each preference that is out of its bounds.
    """
    keys = {f.name: PREFERENCE + f.name for f in fields(Preferences)}
    return parse_preferences({name: getattr(shared.opts, k) for name, k in keys.items() if hasattr(shared.opts, k)})


def field_defaults() -> dict[str, Any]:
    """The fields whose default is a preference; one out of its bounds is left for the request to refuse."""
    names = ("duration", "format")
    return {name: getattr(shared.opts, PREFERENCE + name, getattr(Preferences, name)) for name in names}


def output_folder() -> Path:
    """Where img2img's pictures go, and the latents files with them."""
    return Path(shared.opts.outdir_samples or shared.opts.outdir_img2img_samples)


def accounts() -> dict[str, str]:
    """The API's passwords by user name; none where it is open."""
    given = getattr(shared.cmd_opts, "api_auth", None)
    return dict(account.split(":", 1) for account in given.split(",")) if given else {}


def serves_api() -> bool:
    """Whether this WebUI was started with its API."""
    return bool(getattr(shared.cmd_opts, "api", False) or getattr(shared.cmd_opts, "nowebui", False))


def make_sampler(p: Any) -> Any:
    """The sampler that the host will make for this request."""
    return sd_samplers.create_sampler(p.sampler_name, p.sd_model)


def has_sigmas(sampler: Any) -> bool:
    """Whether a sampler walks sigmas (k-diffusion's dialect) rather than timesteps."""
    return hasattr(sampler, "get_sigmas")


def get_sigmas(p: Any, sampler: Any, steps: int) -> Tensor:
    r"""The host's schedule for a sampler, descending, with every setting of the host applied.

    Timestep samplers (DDIM, PLMS, UniPC) have none: their timesteps' noise levels are
    :math:`s = \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}`.
    """
    if has_sigmas(sampler):
        return sampler.get_sigmas(p, steps)
    alphas = p.sd_model.alphas_cumprod
    alpha = alphas[sampler.get_timesteps(p, steps).to(alphas.device)].double()
    sigmas = ((1 - alpha) / alpha).sqrt().flip(0).float().cpu()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
    """(schedule steps, index of the start level) of img2img's own sampling."""
    total, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
    return total, total - t_enc - 1


@contextmanager
def start_at(p: Any, total: int, start: int) -> Iterator[int]:
    """Has img2img's own arithmetic start at another level of a schedule of ``total`` steps.

    Yields the ``steps`` argument for ``sample_img2img``; the denoising strength is the request's
    own again afterwards.

    Raises:
        RefusedError: if the host's arithmetic cannot express that start.
    """
    steps = total - start
    with attribute(p, "denoising_strength", steps / (total + 0.5)):
        if img2img_steps(p, steps) != (total, start):
            raise RefusedError(f"end_at_step: {start} of {total} steps cannot be a start level of this WebUI")
        yield steps


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Leaves the global generators (torch's and the host's NV one) as they were found."""
    devices_used = [devices.device.index or 0] if devices.device.type == "cuda" else []
    had, nv = hasattr(rng, "nv_rng"), getattr(rng, "nv_rng", None)
    with torch.random.fork_rng(devices=devices_used):
        try:
            yield
        finally:
            if had:
                rng.nv_rng = nv
            elif hasattr(rng, "nv_rng"):
                del rng.nv_rng


class HostDraws:
    """The noise draws of one batch, from generators built as the host builds its own.

    Draw 0 is img2img's own noise as the sampler receives it; the later ones continue the same
    seeds' streams, with the request's noise multiplier. None of the sampler's draws is consumed.
    """

    def __init__(self, p: Any, first: Tensor) -> None:
        """``first`` is the noise handed to the sampler, with shape (B, C, H, W)."""
        self._first = first
        self._scale = getattr(p, "initial_noise_multiplier", None)
        self._rng = rng.ImageRNG(
            tuple(first.shape[1:]),
            p.seeds,
            subseeds=p.subseeds,
            subseed_strength=p.subseed_strength,
            seed_resize_from_h=p.seed_resize_from_h,
            seed_resize_from_w=p.seed_resize_from_w,
        )
        self._next = 0

    def __call__(self, j: int) -> Tensor:
        if j == 0:
            return self._first
        with untouched_generators():
            while self._next <= j:
                drawn = self._rng.next()
                self._next += 1
        if self._scale not in (None, 1.0):
            drawn = drawn * self._scale
        return drawn.to(self._first.device)


class Decoded(list):
    """Pictures in [-1, 1] in place of latents: the host decodes nothing."""

    already_decoded = True


def decode(p: Any, latents: Tensor) -> list[Tensor]:
    """Latents of shape (B, C, H, W) to pictures in [-1, 1] of shape (3, H, W), as the host's settings say."""
    with torch.no_grad():
        made = processing.decode_latent_batch(p.sd_model, latents, target_device=devices.cpu, check_for_nans=True)
    return [picture.reshape(-1, *picture.shape[-3:])[0] for picture in made]  # some models have a time axis


DECODER_BYTES = 2178
"""What a VAE needs at its worst for each pixel and byte of its values (ComfyUI's and Forge's estimate)."""

MOST_AT_ONCE = 16


def decodable(latents: Tensor) -> int:
    """How many batches like this one of latents, with shape (B, C, [T,] H, W), a GPU decodes at once; else 1."""
    if devices.device.type != "cuda":
        return 1
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    pixels = 64 * latents.shape[-1] * latents.shape[-2] * len(latents)
    return int(min(MOST_AT_ONCE, max(1, 0.7 * free / (DECODER_BYTES * pixels * devices.dtype_vae.itemsize))))


def free_memory() -> None:
    """Gives back what the GPU keeps for reuse."""
    devices.torch_gc()


def timestep(p: Any, sigma: Tensor) -> float | None:
    """The model's timestep of a noise level; None where it counts none."""
    wrap = getattr(p.sampler, "model_wrap", None)
    if not has_sigmas(p.sampler) or not hasattr(wrap, "sigma_to_t"):
        return None
    return float(wrap.sigma_to_t(sigma.reshape(1).to(devices.device)))


def overlaid(p: Any, picture: Image.Image, index: int) -> Image.Image:
    """A picture of ``only masked`` or masked img2img, put back into its surroundings as the host does."""
    overlays = getattr(p, "overlay_images", None) or []
    if not getattr(shared.opts, "overlay_inpaint", True) or index >= len(overlays):
        return picture
    return processing.apply_overlay(picture, p.paste_to, overlays[index])[0]


def infotext(p: Any, index: int, extra: dict[str, Any]) -> str:
    """The generation parameters of image ``index`` of the present batch, with more keys."""
    with attribute(p, "extra_generation_params", {**p.extra_generation_params, **extra}):
        return processing.create_infotext(
            p, p.prompts, p.seeds, p.subseeds, index=index, all_negative_prompts=p.negative_prompts
        )


def save_picture(p: Any, picture: Image.Image, index: int, text: str, suffix: str) -> tuple[Path, ...]:
    """Saves a picture where and as the host saves its images; returns the file, and its text file if there is one."""
    with attribute(p, "batch_index", index):  # file name patterns read it
        written = images.save_image(
            *(picture, p.outpath_samples, "", p.seeds[index], p.prompts[index], shared.opts.samples_format),
            info=text,
            p=p,
            suffix=suffix,
        )
    return tuple(Path(name) for name in written if name)


def save_file(
    p: Any, made: Path, picture: Image.Image, index: int, text: str, suffix: str, folder: str = ""
) -> Path:
    """Moves a finished file to the name the host would give an image, with its own ending.

    It goes into ``folder``, or where the request's pictures go.

    The host names files only while it saves them, so it saves a picture first, whose name is then
    taken over.
    """
    with attribute(p, "batch_index", index):
        name, _ = images.save_image(
            *(picture, folder or p.outpath_samples, "", p.seeds[index], p.prompts[index], "png"),
            info=text,
            p=p,
            suffix=suffix,
        )
    placeholder = Path(name)
    final = placeholder.with_suffix(made.suffix)
    if final != placeholder and shared.opts.save_images_replace_action != "Replace":
        final = _free(final)
    with whole(final) as part:
        shutil.copyfile(made, part)
    if final != placeholder:
        placeholder.unlink(missing_ok=True)
    made.unlink(missing_ok=True)
    return final


def saved_item(file: Path, text: str) -> Image.Image:
    """A saved picture for the results: the page shows the file itself, its pixels are read when they are asked for."""
    picture = Image.open(file)
    picture.info["parameters"] = text
    picture.already_saved_as = str(file)
    return picture


def _free(path: Path) -> Path:
    """A path at which there is no file yet, numbered as the host numbers its own."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def temporary_file(ending: str) -> Path:
    """A file the WebUI's page may show though nothing is saved; the host cleans its folder up."""
    folder = shared.opts.temp_dir or os.path.join(tempfile.gettempdir(), "gradio")
    os.makedirs(folder, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=ending, dir=folder)
    os.close(handle)
    return Path(name)


def kept_file(file: Path) -> Path:
    """A copy of a temporary file that outlives the request, for the page to show; the host cleans it up."""
    kept = temporary_file(file.suffix)
    os.replace(file, kept)
    return kept


def moving_item(p: Any, file: Path, saved: bool, poster: Image.Image, text: str) -> Any:
    """What stands for an animation in the results: base64 in the API, the moving file on the page.

    The page's gallery plays no MP4: it shows the poster, and a remark names the file.
    """
    if getattr(p, "is_api", False):
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        if not saved:
            file.unlink()
        return data
    picture = poster.copy()
    picture.info["parameters"] = text
    if saved and preferences().animation_folder:
        shutil.copyfile(file, kept := temporary_file(file.suffix))  # the page shows nothing outside its own folders
        file = kept
    if file.suffix == ".mp4":
        comment(p, f"animation {'saved' if saved else 'for now'}: {file.absolute()}")
    else:
        picture.already_saved_as = str(file)
    return picture


def stopped() -> bool:
    """Whether the user pressed Interrupt or Skip."""
    state = shared.state
    return state.interrupted or state.skipped or getattr(state, "stopping_generation", False)


class Progress:
    """The host's progress bar, live preview and buttons, while frames are made."""

    def __init__(self, total: int, own_job: bool, writes: bool = False) -> None:
        """
        Arguments:
            total: Parts of this job: frames, or levels.
            own_job: Whether this is a job of its own, beside the sampling.
            writes: Whether files are written at its end, which is one more part of it.
        """
        self._state = shared.state
        if own_job:
            self._state.nextjob()
            self._state.current_latent = None  # the sampling's last: the host would show it again every few steps
        self._state.sampling_steps = total + writes
        self._state.sampling_step = 0
        self._total = total

    def at(self, number: int, text: str) -> None:
        """``number`` of the job's parts (from 1) are done."""
        self._state.sampling_step = number
        self._state.textinfo = text

    def step(self, number: int, picture: Image.Image | None) -> None:
        """Frame ``number`` (from 1) is done; there may be no picture of it."""
        self.at(number, f"Unsampling: frame {number} of {self._total}")
        if picture is not None and shared.opts.live_previews_enable:
            self._state.assign_current_image(picture)

    def writing(self) -> None:
        """The last frame is made; files are not."""
        self._state.textinfo = "Unsampling: writing files"

    def done(self) -> None:
        self._state.textinfo = None


def add_jobs(count: int) -> None:
    """Tells the progress bar that more jobs than the host's own will run."""
    if shared.state.job_count > 0:
        shared.state.job_count += count


def next_job() -> None:
    """One of the jobs is done: the host's bar begins the next one's part."""
    shared.state.nextjob()


def comment(p: Any, text: str) -> None:
    """A remark for the result's info, on the page and in the API, and for the log."""
    print(f"[Batch Unsampler] {text}")
    request = getattr(p, "batch_unsampler", None)
    if request is not None:
        request.messages.append(text)
    if hasattr(p, "comment"):
        p.comment(text)


def put_first(processed: Any, items: Sequence[Any], texts: Sequence[str], keep_own: bool) -> None:
    """Puts results before the host's own images, or in their place."""
    own = (list(processed.images), list(processed.infotexts)) if keep_own else ([], [])
    processed.images = [*items, *own[0]]
    processed.infotexts = [*texts, *own[1]]
    if items or not keep_own:
        processed.index_of_first_image = 0



@contextmanager
def starting_from(sampler: Any, z: Tensor) -> Iterator[None]:
    """Has a k-diffusion sampler start from z, whatever start state the host computes."""
    function = sampler.func

    @functools.wraps(function)  # the host inspects its signature
    def started(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(model, z.to(x), *args, **kwargs)

    try:
        sampler.func = started
        yield
    finally:
        sampler.func = function


def sampler_function(sampler: Any) -> str:
    """The k-diffusion name of a sampler's function (``euler``, ``dpmpp_2m``, ...)."""
    name = sampler.funcname if isinstance(sampler.funcname, str) else sampler.funcname.__name__
    return name.removeprefix("sample_")


class GuidedModel:
    """The host's guided denoiser as :class:`~.inversion.Model`, for the images of one batch.

    Guidance, prompt editing, networks, ControlNet and other extensions' callbacks are the host's own.
    """

    def __init__(
        self, denoiser: Any, extra_args: dict[str, Any], stride: int, called: Callable[[int], None]
    ) -> None:
        """
        Arguments:
            denoiser: The host's, as its sampler's function gets it.
            extra_args: What the host gives with it at each call.
            stride: How many calls the host counts where the inverted sampler makes one.
            called: Told the number of calls after each.
        """
        self._denoiser = denoiser
        self._extra_args = extra_args
        self._stride = stride
        self._called = called
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        args = self._extra_args if images is None else {k: _picked(v, images) for k, v in self._extra_args.items()}
        self._denoiser.step = call * self._stride  # the host looks prompt editing and guidance minimum up by it
        denoised = self._denoiser(x, sigma, **args)
        self.calls += 1
        self._called(self.calls)
        return denoised


def _picked(conds: Any, images: Tensor) -> Any:
    """The conditions of some images of a batch: tensors, schedules for each image, or composed prompts."""
    if isinstance(conds, Tensor):
        return conds[images.to(conds.device)]
    if isinstance(conds, list):
        return [conds[i] for i in images.tolist()]
    if hasattr(conds, "batch"):
        picked = copy.copy(conds)
        picked.batch = _picked(conds.batch, images)
        picked.shape = (len(picked.batch), *tuple(conds.shape)[1:])
        return picked
    return conds


def k_diffusion_function(name: str) -> Callable[..., Tensor]:
    """The host's own k-diffusion sampler of a name."""
    return getattr(k_sampling, f"sample_{name}")


@contextmanager
def untouched_draws() -> Iterator[None]:
    """Has k-diffusion's functions draw from no generator of the request's: some do so only to throw it away."""
    with attribute(k_sampling, "torch", torch), untouched_generators():
        yield


SOURCE = (
    *("init_images", "image_mask", "nmask", "width", "height", "resize_mode", "inpainting_fill", "inpaint_full_res"),
    *("inpaint_full_res_padding", "inpainting_mask_invert", "mask_blur", "mask_blur_x", "mask_blur_y", "batch_size"),
)
SAMPLING = (
    *("sampler_name", "scheduler", "s_min_uncond", "image_cfg_scale", "distilled_cfg_scale"),
    *("extra_network_data", "disable_extra_networks"),
)


def identity(p: Any, title: str) -> tuple[Any, ...]:
    """What the latents and the model's answers depend on, beside conditions and schedule.

    The source is told by its pictures: the host encodes them with a random draw. Every other script's
    arguments are among it, ours (the script of that title) are not.
    """
    drawn = p.seeds if getattr(p, "image_mask", None) is not None and getattr(p, "inpainting_fill", 0) == 2 else None
    model = (id(p.sd_model), getattr(p.sd_model, "sd_model_hash", None), getattr(p.sd_model, "filename", None))
    ours = next(script for script in p.scripts.alwayson_scripts if script.title() == title)
    args = list(p.script_args)
    del args[ours.args_from : ours.args_to]
    return (*(getattr(p, name, None) for name in SOURCE + SAMPLING), drawn, model, args, shared.opts.data)


def encoded_picture(p: Any, image: int) -> Image.Image | None:
    """The picture that an image's latents were encoded from; None where the host encoded a part of it."""
    if getattr(p, "image_mask", None) is not None or not p.init_images:
        return None
    picture = p.init_images[image % len(p.init_images)].convert("RGB")
    if p.resize_mode == 3:  # the host resizes the latents
        return None
    return images.resize_image(p.resize_mode, picture, p.width, p.height)


def in_sampler(body: Callable[..., Tensor], own: Callable[..., Tensor], p: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Runs ``body(function, model, x, sigmas=, extra_args=, ...)`` where the host would run its sampler's function.

    So the host loads the model, builds the guided denoiser and takes Interrupt and Skip as it does
    for its own sampling: what the body has not finished then, stays so. Inpainting is left out of the
    denoiser, or the host would blend the clean source in at sigma 14.

    Arguments:
        body: Called once: the sampler's k-diffusion function, and the arguments the host calls it with.
        own: The sampler's own ``sample_img2img``, called with ``p``, the other arguments and keywords.

    Returns:
        What the body returned, or the host's last latent if it was interrupted.
    """
    sampler = p.sampler
    function = sampler.func
    raised: list[Exception] = []

    @functools.wraps(function)  # the host inspects its signature
    def run(model: Any, x: Tensor, **options: Any) -> Tensor:
        with attribute(sampler, "func", function), attribute(model, "mask", None):
            try:
                return body(function, model, x, **options)
            except Exception as error:  # raised again when the host has cleaned up
                raised.append(error)
                return x

    with attribute(sampler, "func", run):
        out = own(p, *args, **kwargs)
    if raised:
        raise raised[0]
    return out


@contextmanager
def prompted(
    p: Any, positive: str, negative: str, cfg: float, conds: tuple[Any, Any]
) -> Iterator[tuple[Any, Any]]:
    """The conditions under other prompts, built as the host builds them, and its networks switched.

    Arguments:
        positive: Prompt for every image; empty is the request's own.
        negative: Negative prompt for every image; empty is the request's own.
        cfg: The guidance scale they are for; the request has it within.
        conds: The request's own (positive, negative) conditions.
    """
    with attribute(p, "cfg_scale", cfg):
        if not positive and not negative and (cfg == 1 or conds[1] is not None):
            yield conds
            return
        other = copy.copy(p)
        other.prompts = [positive] * len(p.prompts) if positive else p.prompts
        other.negative_prompts = [negative] * len(p.prompts) if negative else p.negative_prompts
        if positive:
            other.parse_extra_network_prompts()
        with _networks(p, other.extra_network_data):
            other.setup_conds()
            yield other.c, other.uc


@contextmanager
def _networks(p: Any, data: Any) -> Iterator[None]:
    """Other extra networks (LoRA, ...) than the request's, for a while."""
    if p.disable_extra_networks or data == p.extra_network_data:
        yield
        return
    forge = getattr(p.sd_model, "forge_objects", None)
    patched = None if forge is None else forge.shallow_copy()
    try:
        with devices.autocast():
            extra_networks.activate(p, data)
        yield
    finally:
        with devices.autocast():
            extra_networks.activate(p, p.extra_network_data)
        if patched is not None:  # what other extensions had hung on the model for this batch
            p.sd_model.forge_objects = patched
