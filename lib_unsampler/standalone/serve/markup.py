"""The page's HTML: img2img's controls as far as the embedded models have them, and the form by its one description.

The form's script finds each field by its id; style.css knows the classes and attributes of the WebUI's own markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...settings import OUTPUTS, TITLE, form, help_on, surface_fields
from ..embedded import LABELS
from .asked import BOUNDS
from .work import EXAMPLES

RESULTS = "/results/"
PICTURES = "/examples/"
"""Where results and example pictures are served."""

MOST_PICTURE = 32 * 2**20
"""Bytes of a picture file."""

PREFIX = "batch_unsampler"
PRESETS = tuple(name for name in form.PRESETS if name != "Guided upscale")
"""Pictures are never enlarged here."""

CHOICES = {f.name: f for f in surface_fields("cli") if f.name in ("model", "sampler", "scheduler")}
NUMBERS: dict[str, tuple[str, float, float, float, float]] = {
    "steps": ("Sampling steps", *BOUNDS["steps"], 1, 20),
    "cfg_scale": ("CFG scale", 0, 100, 0.5, 1),
    "denoising_strength": ("Denoising strength", *BOUNDS["denoising_strength"], 0.01, 0.75),
    "seed": ("Seed", 0, 2**53 - 1, 1, 0),
    "size": ("Longest side", *BOUNDS["size"], 8, 256),
}
"""Label, least, most, step and first value of the page's own numbers; a seed as far as a page counts exactly."""

HOST = {name: f"#own_{name}" for name in (*CHOICES, *NUMBERS, "positive", "negative", "width", "height")}
PLACES = {"player": "#gallery", "latents": RESULTS, "source": "#shown"}


def tag(name: str, /, *children: str, **attributes: Any) -> str:
    """An element; its children are markup already. True is an attribute without a value, ``_`` a hyphen."""
    told = ""
    for key, value in attributes.items():
        if value is not False:
            shown = "" if value is True else f'="{html.escape(str(value))}"'
            told += f" {key.rstrip('_').replace('_', '-')}{shown}"
    return f"<{name}{told}>" + ("" if name in ("input", "meta", "link", "img") else f"{''.join(children)}</{name}>")


def page() -> str:
    """The whole page."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", TITLE),
        tag("link", rel="icon", href="data:,"),
        *(tag("link", rel="stylesheet", href=file) for file in ("/style.css", "/page.css")),
        *(tag("script", src=file, defer=True) for file in ("/page.js", "/batch_unsampler.js")),
    )
    work = tag("form", _picture(), _own(), _form(), _generate(), id="request", autocomplete="off")
    shown = tag("section", tag("div", id="gallery"), id="results", aria_label="Results")
    body = tag("body", tag("h1", TITLE), tag("main", work, shown), tag("noscript", "This page needs its script."))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en")


# What stands where img2img's own controls stand


def _picture() -> str:
    examples = [
        tag(
            "label",
            tag("input", type="radio", name="picture", value=name, checked=number == 0),
            tag("img", src=PICTURES + name, alt=name, width=64, height=64),
        )
        for number, name in enumerate(EXAMPLES)
    ]
    own = tag(
        "label",
        "Your own",
        tag("input", type="file", id="own_picture", accept="image/*", data_most=MOST_PICTURE),
        class_="own-picture",
    )
    shown = tag("img", id="shown", src=PICTURES + EXAMPLES[0], alt="The chosen picture")
    chosen = tag("fieldset", tag("legend", "Picture"), *examples, own)
    return tag("div", chosen, shown, class_="picture")


def _own() -> str:
    words = {name: name or "(empty)" for name in LABELS}
    made = [
        _select("positive", "Prompt", words, "", "What the embedded model makes of the noise again"),
        _select("negative", "Negative prompt", words, "", "What the guidance moves away from"),
        *(
            _select(name, f.metadata["label"], {c: c for c in f.metadata["choices"]}, f.default, help_on(f, "cli"))
            for name, f in CHOICES.items()
        ),
        *(
            _own_label(label, tag("input", type="number", id=f"own_{n}", min=low, max=high, step=step, value=value))
            for n, (label, low, high, step, value) in NUMBERS.items()
        ),
        *(tag("input", type="number", id=f"own_{side}", hidden=True, value=256) for side in ("width", "height")),
    ]
    return tag("div", *made, class_="own")


def _select(name: str, label: str, choices: Mapping[str, str], chosen: str, help: str) -> str:
    options = [tag("option", text, value=value, selected=value == chosen) for value, text in choices.items()]
    return _own_label(label, tag("select", *options, id=f"own_{name}", title=help))


def _own_label(label: str, control: str) -> str:
    return tag("label", tag("span", label), control)


def _generate() -> str:
    return tag(
        "div",
        tag("button", "Generate", type="submit", id="generate"),
        tag("button", "Interrupt", type="button", id="interrupt", disabled=True),
        tag("progress", id="progress", hidden=True, aria_label="Progress"),
        tag("div", id="says", role="status"),
        class_="generate",
    )


# The form


def _form() -> str:
    fields = {f.name: f for f in surface_fields("host")}
    told = {**form.described("host", {}, PRESETS), "host": HOST, "places": PLACES, "answers": True, "url": "/ask"}
    rows = [_row(names, fields) for names in (*form.OPEN, *form.MODEL)]
    folded = [_row(names, fields) for _, group in form.FOLDED for names in group]
    last = [name for name in fields if name not in form.rows()] + ["trajectory"]
    more = tag("div", *folded, _row(last, fields), id=f"{PREFIX}_more", class_="batch-unsampler-more")
    stage = tag("div", class_="batch-unsampler-stage", data_form=json.dumps(told))
    return tag("div", tag("div", stage, id=f"{PREFIX}_stage"), *rows, more, id=PREFIX, class_="gap")


def _row(names: Sequence[str], fields: Mapping[str, Any]) -> str:
    return tag("div", *(_field(fields[name]) for name in names), class_="batch-unsampler-row")


def _field(f: Any) -> str:
    name, choices = f.name, f.metadata["choices"]
    title = tag("span", f.metadata["label"], data_testid="block-info", id=f"{PREFIX}_{name}_label")
    more: dict[str, Any] = {}
    if choices:
        kind = "checkbox" if choices is OUTPUTS else "radio"
        chosen = f.default if choices is OUTPUTS else (f.default,)
        ticks = [tag("input", type=kind, name=name, value=c, checked=c in chosen) for c in choices]
        inputs = [tag("label", tick, tag("span", c)) for tick, c in zip(ticks, choices)]
        inner = title + tag("div", *inputs, class_="wrap")
        role = "group" if choices is OUTPUTS else "radiogroup"
        more = {"role": role, "aria_labelledby": f"{PREFIX}_{name}_label"}
    elif isinstance(f.default, bool):
        inner = tag("label", tag("input", type="checkbox", name=name, checked=f.default), title)
    elif isinstance(f.default, str):
        known = {"list": f"{PREFIX}_files"} if name == "trajectory" else {}
        inner = tag("label", title, tag("input", type="text", name=name, value=f.default, **known))
        inner += tag("datalist", id=f"{PREFIX}_files") if known else ""
    else:
        bounds = {"min": f.metadata["minimum"], "max": f.metadata["maximum"], "step": "any"}
        inner = tag("label", title, tag("input", type="number", name=name, value=f.default, **bounds))
    return tag("div", inner, id=f"{PREFIX}_{name}", class_="batch-unsampler-field", **more)
