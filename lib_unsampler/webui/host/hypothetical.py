"""A request that is not made: what the loaded model and the host's settings would make of it. No model is loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from modules import processing, sd_models, shared

from .schedule import has_sigmas, make_sampler

TOLD = {
    "scheduler": str,
    **dict.fromkeys(("steps", "width", "height", "batch_size", "n_iter"), int),
    **dict.fromkeys(("denoising_strength", "distilled_cfg_scale"), float),
}
"""What the page tells of a request. Each host's requests have some of it: Forge Classic's no scheduler."""


def loaded_model() -> Any:
    """The model in memory, or None. The host's own ``shared.sd_model`` would load one."""
    model = sd_models.model_data.sd_model
    return None if type(model).__name__ == "FakeInitialModel" else model


def model_name(model: Any) -> str:
    """The loaded checkpoint's name."""
    info = getattr(model, "sd_checkpoint_info", None)
    return str(getattr(info, "name_for_extra", None) or getattr(info, "name", "the loaded model"))


def awaited_model(model: Any) -> str | None:
    """The name of the checkpoint that Generate would load first, if that is another one (Forge, Neo)."""
    waiting = getattr(sd_models.model_data, "forge_loading_parameters", {}).get("checkpoint_info")
    info = getattr(model, "sd_checkpoint_info", None)
    if waiting is None or info is None or waiting.filename == info.filename:
        return None
    return str(getattr(waiting, "name_for_extra", waiting.name))


def request(told: Mapping[str, Any], model: Any) -> tuple[Any, Any]:
    """(request, its sampler) as the page's controls stand.

    Arguments:
        told: ``sampler`` and any of :data:`TOLD`; ``resized``, as WxH, goes before the size there.
        model: The loaded one.

    Raises:
        ValueError: if a control says something that is no request.
    """
    kind = processing.StableDiffusionProcessingImg2Img
    known = {f.name for f in fields(kind)}
    values = {name: read(told[name]) for name, read in TOLD.items() if name in known and name in told}
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", str(told.get("resized", "")))
    if size:
        values |= {"width": int(size[1]), "height": int(size[2])}
    if not 1 <= values.get("steps", 1) <= 10000:
        raise ValueError(f"sampling steps: {values['steps']} are not from 1 to 10000")
    p = kind(sampler_name=str(told["sampler"]), **values)
    p.sd_model, p.init_images, p.extra_generation_params = model, [None], {}
    p.sampler = make_sampler(p)
    _shift(p)
    return p, p.sampler


def _shift(p: Any) -> None:
    """The request's own shift of a flow model's schedule (Neo), on a copy: the model may be sampling."""
    wrap: Any = getattr(p.sampler, "model_wrap", None)
    if not has_sigmas(p.sampler) or not getattr(p.sd_model, "use_shift", False) or not hasattr(wrap, "predictor"):
        return
    wrap.predictor = copy.deepcopy(wrap.predictor)
    wrap.predictor.set_parameters(shift=p.distilled_cfg_scale)


def calls_a_step(sampler: Any) -> int:
    """Model calls for one of a sampler's steps, as the host's progress bar counts them."""
    options = getattr(getattr(sampler, "config", None), "options", {})
    return 2 if options.get("second_order") else 1


def fixes_steps() -> bool:
    """Whether img2img does exactly the asked steps, so that the schedule's length depends on the strength."""
    return bool(shared.opts.img2img_fix_steps)
