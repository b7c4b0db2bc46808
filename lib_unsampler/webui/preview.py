"""What a request would do, asked by the page before it is made: the schedule, what it costs, why it would be refused.

The answer is of the model that is loaded; none is loaded for it. The same rules answer as in the request
itself: :func:`..settings.parse`, :mod:`.refusals`, :func:`..core.schedule.levels`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core import trajectory
from ..core.schedule import Levels
from ..core.trajectory import TrajectoryError
from ..pictures.estimate import estimate
from ..settings import Settings, SettingsError, parse, surface_fields
from . import refusals, saved, shelf
from .host import hypothetical
from .host.page import output_folder, preferences
from .host.schedule import has_sigmas, host_levels, img2img_steps, prediction_type, timesteps

NO_MODEL = "No model is loaded yet, so there is no curve; it comes with the first picture."


Answer = tuple[str, str | None, Path | None]
"""HTML for the page's script; the latents file to choose; the one to download."""


def answer(question: str, folder: Callable[[], Path] = output_folder) -> Answer:
    """What the page's hidden channel gets back: JSON in an attribute, never markup of the asker's.

    Arguments:
        question: JSON: ``id``, and for ``kind`` *ask* what :func:`told_of` takes; *choose* and *fetch* name a latents
            file, the first with the ``step`` it shall end at.
        folder: Where the latents files are now.
    """
    told: dict[str, Any] = {}
    chosen, file = None, None
    try:
        asked = json.loads(question)
        told["id"] = asked["id"]
        if asked["kind"] == "choose":
            chosen = told["name"] = _ended(folder(), asked["name"], asked.get("step"))
        elif asked["kind"] == "fetch":
            file = shelf.find(folder(), asked["name"])
        else:
            told |= told_of(asked)
    except TrajectoryError as error:
        told["error"] = str(error)
    except Exception as error:  # the page must hear something, whatever the question was
        told["error"] = f"{type(error).__name__}: {error}"
    return f'<span data-answer="{html.escape(json.dumps(told), quote=True)}"></span>', chosen, file


def told_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a question as plain values.

    Arguments:
        asked: ``wants``, a list of ``schedule`` and ``check``; ``values``, the fields by name; ``host``, the
            request's own controls as :func:`.host.hypothetical.request` takes them.
    """
    wants, told = set(asked.get("wants", ())), {}
    settings, errors = _settings(asked["values"])
    model = hypothetical.loaded_model()
    if model is None:
        return {"schedule": {"none": NO_MODEL}, "check": {"errors": errors}}
    with torch.no_grad():
        request, sampler = hypothetical.request(asked["host"], model)
        try:
            if "schedule" in wants:
                told["schedule"] = _schedule(request, sampler, settings)
        except Exception as error:  # a sampler of another extension may fail in its own way
            told["schedule"] = {"none": f"No curve: {error}"}
        if "check" in wants:
            told["check"] = _check(request, sampler, settings, errors)
    return told


def _settings(values: Mapping[str, Any]) -> tuple[Settings, list[dict[str, str]]]:
    """The settings, with the default of every field that is wrong, and what is said of those."""
    try:
        return parse(values, "host"), []
    except SettingsError as error:
        told = [_by_field(text) for text in error.errors]
        bad = {entry["field"] for entry in told}
    try:
        return parse({name: value for name, value in values.items() if name not in bad}, "host"), told
    except SettingsError:
        return Settings(), told


def _by_field(text: str) -> dict[str, str]:
    """A refusal with the field it begins with, if it begins with one; the mode stands for what it needs."""
    name, _, rest = text.partition(": ")
    known = {f.name for f in surface_fields("host")}
    if name in ("sampler", "refiner", "eta", "s_noise"):
        return {"field": "mode", "text": text}
    return {"field": name if name in known else "", "text": rest if name in known else text}


def _schedule(p: Any, sampler: Any, settings: Settings) -> dict[str, Any]:
    own, start = img2img_steps(p)
    total, _ = refusals.asked_steps(p, settings, sampler)
    plan, kept = _plan(p, sampler, settings, total)
    model = p.sd_model
    awaited = hypothetical.awaited_model(model)
    return {
        "sigmas": plan.schedule.tolist(),
        "timesteps": timesteps(p, plan.schedule),
        "total": total,
        "own": [own, start],
        "fixed": hypothetical.fixes_steps(),
        "kept": kept,
        "flow": prediction_type(model) == "flow",
        "model": hypothetical.model_name(model),
        "note": "" if awaited is None else f"{awaited} is chosen and loads with the next picture",
        "timesteps_only": not has_sigmas(sampler),
    }


def _plan(p: Any, sampler: Any, settings: Settings, total: int) -> tuple[Levels, list[int] | None]:
    """The levels, and the kept ones where it is not steps that say them: of a latents file, and of a sigma."""
    if settings.trajectory:
        try:
            file = shelf.read(output_folder(), settings.trajectory)
        except TrajectoryError as error:
            raise ValueError(f"trajectory: {error}") from None
        plan = saved.plan(file, total, None).levels
        return plan, list(plan.kept)
    if settings.end_at_sigma > 0:
        plan = refusals.asked_levels(p, settings, sampler)
        return plan, list(plan.kept)
    return host_levels(p, sampler, total, max(0, settings.end_at_step), settings.step_increment), None


def _check(p: Any, sampler: Any, settings: Settings, errors: list[dict[str, str]]) -> dict[str, Any]:
    """What is refused, and what the request costs if nothing stands in the way of knowing it."""
    told: dict[str, Any] = {"errors": errors, "model": hypothetical.model_name(p.sd_model)}
    try:
        refusals.check(p, settings, sampler, preferences().megapixels)
    except ValueError as error:
        told["errors"] = [*errors, _by_field(str(error))]
    total, end = refusals.asked_steps(p, settings, sampler)
    try:
        plan, kept = _plan(p, sampler, settings, total)
    except ValueError:
        return told
    if kept is None:
        plan = host_levels(p, sampler, total, end, settings.step_increment)
    sampled = len(plan.schedule) - 1 - plan.kept[-1] if settings.samples else 0
    cost = estimate(
        *(settings, plan.sigmas.tolist(), len(plan.visited), sampled, p.width, p.height, p.batch_size * p.n_iter),
        hypothetical.calls_a_step(sampler),
        "2m" in str(getattr(sampler, "funcname", "")),
    )
    return {**told, "said": cost.said(settings.format), "warning": cost.warning()}


def _ended(folder: Path, name: str, step: int | None) -> str:
    """The name of the latents file that ends at a step of this one; this one itself, if it ends there."""
    if not name:
        return name
    file = shelf.read(folder, name)
    if step is None or step == file.start:
        return name
    kept = folder / shelf.UPLOADS / f"{Path(name).stem}-from-step-{int(step)}{shelf.ENDING}"
    if not kept.exists():
        trajectory.save(trajectory.cut(file, int(step)), kept)
    return shelf.name_of(folder, kept)
