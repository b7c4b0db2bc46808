"""What a request would do, asked by the page's script before it is made: the schedule, its cost, what is refused.

Whoever serves the page says what such a request would be (:class:`Prospect`); what is answered is told here, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..core import trajectory
from ..pictures.estimate import Estimate
from ..settings import Settings, SettingsError, parse, surface_fields
from . import shelf

NO_MODEL = "No model is loaded yet, so there is no curve; it comes with the first picture."


class Prospect(Protocol):
    """A request that is not made."""

    @property
    def model(self) -> str:
        """The name of the model whose schedule it is."""

    def curve(self) -> Mapping[str, Any]:
        """The schedule: ``sigmas``, ``timesteps`` (or None), ``total`` steps, whether it is ``flow``.

        And ``own``, img2img's (steps, start); ``fixed``, whether those hang on the denoising strength; ``kept``, the
        kept levels where it is not steps that say them; a ``note``.

        Raises:
            ValueError: if there is none.
        """

    def refused(self) -> list[str]:
        """A sentence for each thing for which it would be refused."""

    def cost(self) -> tuple[Estimate, str] | None:
        """What it costs, with the format of its animation; None where that cannot be known."""


Foresee = Callable[[Mapping[str, Any], Settings], "Prospect | None"]
"""The request that a page's own controls and these settings would make; None where no model is loaded."""


@dataclass(frozen=True)
class Answer:
    """What a question gets.

    Attributes:
        told: Plain values, with the question's ``id``.
        chosen: The name of the latents file to choose, if one is.
        file: The file to download, if one is.
    """

    told: dict[str, Any]
    chosen: str | None = None
    file: Path | None = None


def answer(question: str, folder: Callable[[], Path], foresee: Foresee) -> Answer:
    """The answer to a question; never raises, since the page must hear something.

    Arguments:
        question: JSON: ``id``, and for ``kind`` *ask* what :func:`told_of` takes; *choose* and *fetch* name a latents
            file, the first with the ``step`` it shall end at.
        folder: Where the latents files are now.
        foresee: What a request would be.
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
            told |= told_of(asked, foresee)
    except ValueError as error:
        told["error"] = str(error)
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    return Answer(told, chosen, file)


def told_of(asked: Mapping[str, Any], foresee: Foresee) -> dict[str, Any]:
    """The answer to a question about a request.

    Arguments:
        asked: ``wants``, a list of ``schedule`` and ``check``; ``values``, the fields by name; ``host``, the page's own
            controls.
        foresee: What a request would be.
    """
    wants, told = set(asked.get("wants", ())), {}
    settings, errors = _settings(asked["values"])
    with torch.no_grad():
        prospect = foresee(asked["host"], settings)
        if prospect is None:
            return {"schedule": {"none": NO_MODEL}, "check": {"errors": errors}}
        if "schedule" in wants:
            try:
                told["schedule"] = {**prospect.curve(), "model": prospect.model}
            except Exception as error:  # a sampler of another extension may fail in its own way
                told["schedule"] = {"none": f"No curve: {error}"}
        if "check" in wants:
            more = [by_field(text) for text in prospect.refused()]
            told["check"] = {"errors": errors + [e for e in more if e not in errors], "model": prospect.model}
            cost = prospect.cost()
            if cost is not None:
                estimate, form = cost
                told["check"] |= {"said": estimate.said(form), "warning": estimate.warning()}
    return told


def _settings(values: Mapping[str, Any]) -> tuple[Settings, list[dict[str, str]]]:
    """The settings, with the default of every field that is wrong, and what is said of those."""
    try:
        return parse(values, "host"), []
    except SettingsError as error:
        told = [by_field(text) for text in error.errors]
        bad = {entry["field"] for entry in told}
    try:
        return parse({name: value for name, value in values.items() if name not in bad}, "host"), told
    except SettingsError:
        return Settings(), told


def by_field(text: str) -> dict[str, str]:
    """A refusal with the field it begins with, if it begins with one; the mode stands for what it needs."""
    name, _, rest = text.partition(": ")
    known = {f.name for f in surface_fields("host")}
    if name in ("sampler", "refiner", "eta", "s_noise"):
        return {"field": "mode", "text": text}
    return {"field": name if name in known else "", "text": rest if name in known else text}


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
