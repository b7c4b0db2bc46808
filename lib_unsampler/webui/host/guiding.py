"""The host's sampling from within: its sampler's function, its guided model, its prompts and networks."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from k_diffusion import sampling as k_sampling
from modules import devices, extra_networks, sd_models
from torch import Tensor

from ...core import rehearsal
from ...core.rehearsal import Forward
from .draws import untouched_draws
from .progress import Mirrored, show_step
from .request import attribute, same_shape


@contextmanager
def running(sampler: Any, run: Callable[..., Tensor]) -> Iterator[None]:
    """Has ``run(function, model, x, **options)`` run in the place of a k-diffusion sampler's function.

    The host computes its own start state and options, and cleans up after its sampling: so what ``run`` raises is
    raised again at the end of the block, and x is what was sampled until then.
    """
    function = sampler.func
    raised: list[Exception] = []

    @functools.wraps(function)  # the host inspects its signature
    def ran(model: Any, x: Tensor, **options: Any) -> Tensor:
        try:
            return run(function, model, x, **options)
        except Exception as error:
            raised.append(error)
            return x

    try:
        sampler.func = ran
        yield
    finally:
        sampler.func = function
    if raised:
        raise raised.pop()


def starting_from(sampler: Any, z: Tensor) -> AbstractContextManager[None]:
    """Has a k-diffusion sampler start from z, whatever start state the host computes; see :func:`running`.

    Its model is held still, as where z was solved for.
    """
    return running(sampler, lambda function, model, x, **options: function(rehearsal.Still(model), z.to(x), **options))


def sampler_function(sampler: Any) -> str:
    """The k-diffusion name of a sampler's function (``euler``, ``dpmpp_2m``, ...)."""
    name = sampler.funcname if isinstance(sampler.funcname, str) else sampler.funcname.__name__
    return name.removeprefix("sample_")


class GuidedModel:
    """The host's guided denoiser as :class:`~.inversion.Model`, for the images of one batch.

    Guidance, prompt editing, networks, ControlNet and other extensions' callbacks are the host's own, and all
    are shown the step and the counters of the forward call that is mirrored.
    """

    def __init__(
        self,
        denoiser: Any,
        extra_args: dict[str, Any],
        counted: Forward,
        per_step: int,
        progress: Mirrored,
        called: Callable[[int], None],
    ) -> None:
        """Wraps the host's denoiser.

        Arguments:
            denoiser: The host's, as its sampler's function gets it.
            extra_args: What the host gives with it at each call.
            counted: The calls of the request's own sampler.
            per_step: How many calls the inverted sampler makes in a step.
            progress: Told the step to show before each call.
            called: Told the number of calls after each.
        """
        self._denoiser = denoiser
        self._extra_args = extra_args
        self._counted = counted
        self._per_step = per_step
        self._progress = progress
        self._called = called
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor, call: int, images: Tensor | None = None) -> Tensor:
        """D(x; sigma) of these images, with the conditions of this call."""
        args = self._extra_args if images is None else {k: _picked(v, images) for k, v in self._extra_args.items()}
        number = self._counted.call(*divmod(call, self._per_step))
        self._denoiser.step = number  # the host looks prompt editing and guidance minimum up by it
        self._progress.show(self._counted.shown[number])
        denoised = same_shape(self._denoiser(x, sigma, **args), x, "the model's answer")
        self.calls += 1
        self._called(self.calls)
        return denoised


class Skipped:
    """The host's counters for a run of its sampler that leaves out the first steps: those of the whole run."""

    def __init__(self, denoiser: Any, counted: Forward, skip: int) -> None:
        """Shows the first step that is left in.

        Arguments:
            denoiser: The host's, as its sampler's function gets it.
            counted: The calls of the whole run.
            skip: The steps that are left out.
        """
        self._skip = skip
        denoiser.step = counted.call(skip, 0)
        show_step(counted.shown[denoiser.step])

    def options(self, options: dict[str, Any]) -> dict[str, Any]:
        """A sampler's options, with the steps that it tells of counted from the whole run's first."""
        told = options["callback"]
        return {**options, "callback": lambda info: told({**info, "i": info["i"] + self._skip})}


def counted_calls(function: Callable[..., Tensor], denoiser: Any, x: Tensor, **options: Any) -> Forward:
    """How the host counts the model calls of its sampler's function, called with these options; none is made."""
    with untouched_draws():
        return rehearsal.forward(function, denoiser, x, **options)


def draws_noise(function: Callable[..., Tensor], denoiser: Any, x: Tensor, **options: Any) -> bool:
    """Whether the host's sampler without a noise sampler adds noise with these options; no call is made."""
    with untouched_draws():
        return rehearsal.draws_noise(function, denoiser, x, **options)


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
        raise raised.pop()  # kept here, it would keep this call and all that is in it
    return out


class Samplings:
    """The samplings of one batch, each announced as the host announces its own: networks active, scripts told.

    The host has announced the first. Hosts promise scripts that they are told before every sampling (of two, with
    high-res fix): what they change or count in one (an attenuated guidance, LoRA block weight's steps) they begin anew.
    The pictures of a strength sweep are one sampling to them.
    """

    def __init__(self, p: Any) -> None:
        self._p = p
        self._announced = True

    def begin(self, x: Tensor, noise: Tensor, conds: tuple[Any, Any], *, goes_on: bool = False) -> None:
        """The next sampling begins: of x, with shape (B, C, [T,] H, W), img2img's noise and (positive, negative).

        With ``goes_on`` what begins next is still of the same.
        """
        p = self._p
        if not self._announced:
            if not p.disable_extra_networks:
                self._activate()
            if hasattr(p.sd_model, "forge_objects"):
                p.sd_model.forge_objects = p.sd_model.forge_objects_after_applying_lora.shallow_copy()
                sd_models.apply_token_merging(p.sd_model, p.get_token_merging_ratio())
            p.scripts.process_before_every_sampling(p, x=x, noise=noise.clone(), c=conds[0], uc=conds[1])
            if getattr(p, "modified_noise", None) is not None:
                p.modified_noise = None  # as at the first
        self._announced = goes_on

    @contextmanager
    def networks(self, data: Any) -> Iterator[None]:
        """Other extra networks (LoRA, ...) than the request's, for a while."""
        p = self._p
        if p.disable_extra_networks or data == p.extra_network_data:
            yield
            return
        self._announced = False
        try:
            with attribute(p, "extra_network_data", data):
                self._activate()
                yield
        finally:
            self._activate()

    def _activate(self) -> None:
        with devices.autocast():
            extra_networks.activate(self._p, self._p.extra_network_data)


@contextmanager
def prompted(
    p: Any, positive: str, negative: str, cfg: float, conds: tuple[Any, Any], samplings: Samplings
) -> Iterator[tuple[Any, Any]]:
    """The conditions under other prompts, built as the host builds them, and its networks switched.

    Arguments:
        positive: Prompt for every image; empty is the request's own.
        negative: Negative prompt for every image; empty is the request's own.
        cfg: The guidance scale they are for; the request has it within.
        conds: The request's own (positive, negative) conditions.
        samplings: Those of the batch.
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
        with samplings.networks(other.extra_network_data):
            with _of_its_picture(p):
                other.setup_conds()
            yield other.c, other.uc


def reference(p: Any) -> Any:
    """The picture that an edit model (Neo's Flux.2-Klein, Kontext, Qwen-Image-Edit) gives to its next conditions."""
    return getattr(p.sd_model, "ini_latent", None)


@contextmanager
def _of_its_picture(p: Any) -> Iterator[None]:
    """Has conditions built within be of the request's picture too, where they are an edit model's.

    Neo gives the picture to the first conditions alone that are built after it was encoded, and shows its model what
    the last ones were of.
    """
    told = getattr(sys.modules.get("backend.args"), "dynamic_args", None)
    if not hasattr(told, "ref_latents"):
        yield
        return
    with attribute(told, "ref_latents", []), attribute(p.sd_model, "ini_latent", p.batch_unsampler.reference):
        yield
