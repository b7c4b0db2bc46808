"""One request of the host: refusing it, remarks, its scripts and arguments, and what its answer depends on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fastapi import HTTPException
from modules import processing, shared
from torch import Tensor

from ...settings import TITLE


class RefusedError(HTTPException):
    """A request that cannot be done as asked: HTTP 422 in the API, readable text on the page."""

    def __init__(self, message: str) -> None:
        super().__init__(status_code=422, detail=message)

    def __str__(self) -> str:
        return self.detail


def say_more(error: Exception, text: str) -> None:
    """Has an error's text say more."""
    if isinstance(error, RefusedError):
        error.detail = f"{error}; {text}"
    elif isinstance(error, OSError) and error.errno is not None:
        name = "" if error.filename is None else f": {str(error.filename)!r}"
        error.strerror = f"{error.strerror}{name}; {text}"
        if name:
            del error.filename  # it would be said behind all else
    else:
        error.args = (f"{error}; {text}", *error.args[1:])


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


def same_shape(made: Tensor, like: Tensor, called: str) -> Tensor:
    """What was made, if its shape is that of what it was made of.

    Raises:
        RuntimeError: else: another extension has had a hand in it.
    """
    if made.shape != like.shape:
        raise RuntimeError(
            f"{called} has shape {tuple(made.shape)}, not {tuple(like.shape)}; see what other extensions change"
        )
    return made


def running() -> list[Any]:
    """The requests that the host is processing in this thread, the innermost first.

    The call stack tells: there is nothing to be remembered that an error could leave standing.
    """
    found: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "process_images" and frame.f_globals.get("__name__") == processing.__name__:
            found.append(frame.f_locals.get("p"))
        frame = frame.f_back
    return found


def is_inner(p: Any) -> bool:
    """Whether a request is another script's own, made while the host processes the user's.

    ADetailer and loopbacks among the extensions make such, of copies too, and ADetailer calls every script's
    hooks with a copy that is never processed.
    """
    requests = running()
    return getattr(p, "_ad_inner", False) or len(requests) > 1 or (bool(requests) and requests[0] is not p)


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


def comment(p: Any, text: str) -> None:
    """A remark for the result's info, on the page and in the API, and for the log."""
    print(f"[Batch Unsampler] {text}")
    request = getattr(p, "batch_unsampler", None)
    if request is not None:
        request.messages.append(text)
    if hasattr(p, "comment"):
        p.comment(text)


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
