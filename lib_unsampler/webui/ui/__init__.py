"""The accordion, made from the settings. The only folder that imports gradio.

Its components alone serve the host: they hold the values, publish their bounds, and are pasted into. What
makes them pleasant (curve, player, help on demand, only what the mode uses) is javascript/batch_unsampler.js;
without it every field and its help is simply there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...settings import Pasted, SettingsError, form, help_on, pasted, surface_fields
from .channel import Answerer, channel, tells_script
from .controls import ELEM_ID, control, file_chooser, preference_components
from .page import stage

__all__ = ["ELEM_ID", "build", "documented", "paste_fields", "preference_components"]


def build(
    accordion: Callable[..., Any],
    title: str,
    defaults: Mapping[str, Any],
    folder: Callable[[], Path],
    answer: Answerer | None = None,
) -> list[Any]:
    """The controls inside a tick-box accordion: enabled first, then the host's fields in order.

    Arguments:
        accordion: The host's ``InputAccordion``, or anything called like it.
        title: The accordion's label.
        defaults: What controls begin with where that is a preference.
        folder: Where the latents files are now.
        answer: Answers the page's script; without it there is no curve.
    """
    by_name = {f.name: f for f in surface_fields("host")}
    made: dict[str, Any] = {}
    with accordion(False, label=title, elem_id=ELEM_ID) as enabled:
        gr.HTML(stage(defaults, answer is not None), elem_id=f"{ELEM_ID}_stage")
        made |= _rows(form.OPEN, by_name, defaults)
        made |= _rows(form.MODEL, by_name, defaults)
        with gr.Column(elem_id=f"{ELEM_ID}_more", elem_classes=["batch-unsampler-more"]):  # the script folds it
            for _, rows in form.FOLDED:
                made |= _rows(rows, by_name, defaults)
            with gr.Row(elem_classes=["batch-unsampler-row"]):
                made["trajectory"] = file_chooser(by_name["trajectory"], folder)
            with gr.Row(elem_classes=["batch-unsampler-row"]):
                rest = [f for name, f in by_name.items() if name not in made]
                made |= {f.name: control(f, defaults) for f in rest}  # a field without a place is there all the same
        if answer is not None:
            channel(answer, made["trajectory"])
    every = [enabled, *(made[name] for name in by_name)]
    for component in every:
        tells_script(component)
    return every


def _rows(rows: Sequence[Sequence[str]], by_name: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The controls of rows of fields, by name."""
    made: dict[str, Any] = {}
    for names in rows:
        with gr.Row(elem_classes=["batch-unsampler-row"]):
            made |= {name: control(by_name[name], defaults) for name in names if name in by_name}
    return made


def documented(info: Any) -> Any:
    """What the host publishes of our arguments (``/sdapi/v1/script-info``), with each one's help."""
    for arg, f in zip(info.args[1:], surface_fields("host")):
        arg.label = f"{f.metadata['label']}: {help_on(f, 'host')}"
    return info


def paste_fields(controls: list[Any]) -> list[tuple[Any, Callable[[Mapping[str, str]], Any]]]:
    """For the host's paste button: each control with how its value is read from generation parameters.

    Parameters of a picture made without the extension untick it and leave the other controls alone. Of ours a value
    that is not allowed is said and leaves its control alone; the others are pasted, and the extension is ticked.
    """

    def reader(f: Any) -> Callable[[Mapping[str, str]], Any]:
        def read(params: Mapping[str, str]) -> Any:
            value = (pasted(params, "host") or {}).get(f.name)
            if isinstance(value, SettingsError):
                gr.Warning(str(value))  # on the page, whose host logs what is raised; in the API it is the answer
                raise value
            return Pasted(value) if isinstance(value, tuple) else value

        return read

    enabled, *fields = controls
    readers = [(control, reader(f)) for control, f in zip(fields, surface_fields("host"))]
    return [(enabled, lambda params: pasted(params, "host") is not None), *readers]
