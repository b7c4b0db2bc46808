"""How the fields stand on a page, whoever serves it: their rows, sliders, presets.

It goes to ``javascript/batch_unsampler.js`` as JSON (:func:`described`), which knows no field by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .fields import OUTPUTS, allowed, help_on, surface_fields
from .needs import ways

OPEN = (("output",), ("mode", "noise", "solver"), ("steps", "end_at_step", "step_increment", "skip"))
"""What every run needs, as rows of fields."""

MODEL = (("positive", "negative"), ("cfg", "tolerance", "max_calls"), ("report",))
"""How the model walks: only where it does."""

FOLDED = (
    ("Frames", (("view",), ("include_clean", "captions", "panel", "normalize"))),
    (
        "Animation",
        (
            ("format", "timing"),
            ("duration", "hold_first", "hold_last", "loop"),
            ("animation_side", "max_megabytes"),
            ("reverse", "ping_pong"),
        ),
    ),
    ("Guide", (("guide_weight", "guide_strength", "guide_alpha"), ("guide_from", "guide_until"))),
    ("Film and end", (("film", "film_view"), ("end_at_sigma",))),
    ("Reply", (("reply",),)),
)
"""The others, by headings of one panel that opens; the latents file comes last."""

SLIDERS: dict[str, tuple[float, float | str, float]] = {
    "steps": (0, 150, 1),
    "end_at_step": (-1, "last step", 1),
    "step_increment": (1, 20, 1),
    "skip": (0, "last step", 1),
    "duration": (0.02, 1, 0.01),
    "hold_first": (0, 5, 0.1),
    "hold_last": (0, 5, 0.1),
    "loop": (0, 20, 1),
    "animation_side": (0, 2048, 64),
    "max_megabytes": (0, 50, 0.5),
    "cfg": (0, 30, 0.5),
    "guide_strength": (0, 1, 0.01),
    "guide_alpha": (0, 10, 0.1),
    "guide_from": (0, 1, 0.01),
    "guide_until": (0, 1, 0.01),
    "max_calls": (1, 200, 1),
}
"""Where a slider goes from and to, and its step; a number beyond can be typed. The last step is the schedule's."""

PRESETS: dict[str, dict[str, Any]] = {
    "A GIF to post": {"output": ("animation",), "steps": 24, "noise": "path", "timing": "log sigma", "hold_last": 1.0},
    "Dense for study": {
        "output": ("frames", "animation", "contact sheet", "sigma curve", "latents"),
        "steps": 100,
        "captions": True,
        "format": "webp",
        "duration": 0.04,
    },
    "Exact inversion": {"output": ("animation", "latents", "init"), "mode": "invert", "panel": True, "report": True},
    "Edit by replay": {"output": ("latents", "init"), "mode": "replay", "skip": 4},
    "Guided upscale": {"output": ("guide",), "guide_strength": 1.0, "guide_alpha": 3.0},
}
"""Named starts: every other field is its default."""

PRESET_HELP: dict[str, str] = {
    "A GIF to post": "One random walk from picture to noise in 24 levels, played evenly, as a GIF.",
    "Dense for study": "100 captioned levels as frames, WebP, sheet, curve and latents.",
    "Exact inversion": "The noise that gives the picture again; img2img goes on from it, and a report says how near.",
    "Edit by replay": "With an ancestral or SDE sampler: write another prompt, the structure stays.",
    "Guided upscale": "Resize to twice the size, with a denoising strength near 0.8: new detail, the old composition.",
}


def preset(name: str) -> dict[str, Any]:
    """Every field of the WebUI as a preset sets it."""
    return {f.name: PRESETS[name].get(f.name, f.default) for f in surface_fields("host")}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _ways(f: Any, surface: str) -> list[list[list[Any]]]:
    """A field's :func:`.needs.ways` as far as a surface has what they ask for: [field, values, unless] each."""
    known = {other.name for other in surface_fields(surface)}
    there = [
        way
        for way in ways(f)
        if all(n.field in known and (n.field != "output" or set(n.values) & set(OUTPUTS)) for n in way)
    ]
    return [[[need.field, list(need.values), need.unless] for need in way] for way in there]


def _kind(f: Any) -> str:
    if f.metadata["choices"] is OUTPUTS:
        return "several"
    if f.metadata["choices"]:
        return "one"
    return {bool: "tick", str: "text"}.get(type(f.default), "number")


def described(surface: str, defaults: Mapping[str, Any], presets: Sequence[str] = tuple(PRESETS)) -> dict[str, Any]:
    """The form as plain values for a page's script.

    Arguments:
        surface: Whose fields.
        defaults: What fields begin with where that is a preference.
        presets: Those that are offered.
    """
    fields = [
        {
            "name": f.name,
            "kind": _kind(f),
            "label": f.metadata["label"],
            "help": help_on(f, surface),
            "allowed": allowed(f),
            "default": _plain(defaults.get(f.name, f.default)),
            "word": f.metadata["word"],
            "special": f.default if f.metadata["word"] else None,
            "choices": _plain(f.metadata["choices"]),
            "slider": SLIDERS.get(f.name),
            "ways": _ways(f, surface),
        }
        for f in surface_fields(surface)
    ]
    named = [{"name": name, "help": PRESET_HELP[name], "values": PRESETS[name]} for name in presets]
    return {"fields": fields, "presets": named}


def rows() -> list[str]:
    """Every field that has a place on the page."""
    placed = [name for row in (*OPEN, *MODEL) for name in row]
    placed += [name for _, group in FOLDED for row in group for name in row]
    return [*placed, "trajectory"]
