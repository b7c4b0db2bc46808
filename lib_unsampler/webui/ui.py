"""The accordion's controls, made from settings.py. The only file that imports gradio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.trajectory import TrajectoryError
from ..settings import OUTPUTS, Pasted, Preferences, pasted, surface_fields
from . import shelf

ELEM_ID = "batch_unsampler"
OPEN = (("output",), ("mode", "noise"), ("steps", "end_at_step", "step_increment"))
"""What every run needs, as rows of fields."""

FOLDED = (
    ("How the frames look", (("view", "normalize"), ("include_clean", "captions", "panel"))),
    (
        "How the animation plays",
        (("format", "timing"), ("duration", "hold_first", "hold_last", "loop"), ("reverse", "ping_pong")),
    ),
    (
        "How the model walks (modes invert and replay)",
        (("positive", "negative", "cfg"), ("solver", "tolerance", "max_calls"), ("skip", "report")),
    ),
)
"""The others, under headings that open."""


def build(
    accordion: Callable[..., Any], title: str, defaults: Mapping[str, Any], folder: Callable[[], Path]
) -> list[Any]:
    """The controls inside a tick-box accordion: enabled first, then the host's fields in order.

    Arguments:
        accordion: The host's ``InputAccordion``, or anything called like it.
        title: The accordion's label.
        defaults: What controls begin with where that is a preference.
        folder: Where the latents files are now.
    """
    by_name = {f.name: f for f in surface_fields("host")}
    made: dict[str, Any] = {}
    with accordion(False, label=title, elem_id=ELEM_ID) as enabled:
        made |= _rows(OPEN, by_name, defaults)
        for heading, rows in FOLDED:
            with gr.Accordion(heading, open=False):
                made |= _rows(rows, by_name, defaults)
        with gr.Accordion("Levels from a file", open=False), gr.Row():
            made["trajectory"] = _file_chooser(by_name["trajectory"], folder)
    return [enabled, *(made[name] for name in by_name)]


def _rows(rows: Sequence[Sequence[str]], by_name: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The controls of rows of fields, by name."""
    made: dict[str, Any] = {}
    for names in rows:
        with gr.Row():
            made |= {name: _control(by_name[name], defaults) for name in names}
    return made


def _file_chooser(f: Any, folder: Callable[[], Path]) -> Any:
    """The latents files by name, with buttons that look for new ones and take one from the user's own disk."""

    def listed() -> Any:
        return gr.update(choices=["", *shelf.names(folder())])

    def taken(upload: Any) -> Any:
        try:
            name = shelf.take(folder(), Path(getattr(upload, "name", upload)))
        except TrajectoryError as error:
            raise gr.Error(str(error)) from None
        return gr.update(choices=["", *shelf.names(folder())], value=name)

    common = {"label": f.metadata["label"], "info": f.metadata["help"], "elem_id": f"{ELEM_ID}_{f.name}"}
    chooser: Any = gr.Dropdown(choices=[], value=f.default, allow_custom_value=True, scale=8, **common)
    chooser.preprocess = lambda value: value or ""  # settings.py checks it, as it does numbers
    narrow: dict[str, Any] = {"scale": 1, "min_width": 80}
    look = gr.Button("Look for files", elem_id=f"{ELEM_ID}_look", **narrow)
    upload = gr.UploadButton("Upload one", file_types=[shelf.ENDING], elem_id=f"{ELEM_ID}_upload", **narrow)
    look.click(listed, inputs=[], outputs=[chooser], show_progress=False)
    upload.upload(taken, inputs=[upload], outputs=[chooser], show_progress=False)
    return chooser


def _control(f: Any, defaults: Mapping[str, Any]) -> Any:
    """The gradio control of a field: its label, bounds, choices and help are the field's own."""
    common = {"label": f.metadata["label"], "info": f.metadata["help"], "elem_id": f"{ELEM_ID}_{f.name}"}
    value, choices = defaults.get(f.name, f.default), f.metadata["choices"]
    control: Any
    if choices is OUTPUTS:
        control = gr.CheckboxGroup(choices=list(choices), value=list(value), **common)
    elif choices:
        control = gr.Radio(choices=list(choices), value=value, **common)
    elif isinstance(f.default, bool):
        control = gr.Checkbox(value=value, **common)
    elif isinstance(f.default, str):
        control = gr.Textbox(value=value, **common)
    else:
        control = _number(f, value, common)
    control.do_not_save_to_config = f.name in defaults  # the host's file of defaults would hide the preference
    return control


def _number(f: Any, value: float, common: Mapping[str, Any]) -> Any:
    """A number that publishes its bounds and leaves the check to settings.py.

    Gradio's own check answers even with the accordion unticked, names no field, and leaves the
    WebUI's page waiting.
    """
    bounds = {"minimum": f.metadata["minimum"], "maximum": f.metadata["maximum"]}
    step = min(0.01, f.default or 0.01)
    kind = {"precision": 0, "step": 1} if isinstance(f.default, int) else {"precision": None, "step": step}
    number: Any = gr.Number(value=value, elem_classes=["batch-unsampler-number"], **kind, **bounds, **common)
    number.preprocess = lambda value: value
    return number


def preference_components() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The component of each preference for the Settings tab, with its arguments."""

    def component(f: Any) -> tuple[Any, dict[str, Any]]:
        if f.metadata["choices"]:
            return gr.Radio, {"choices": list(f.metadata["choices"])}
        if isinstance(f.default, str):
            return gr.Textbox, {}
        return gr.Number, {"precision": 0 if isinstance(f.default, int) else None}

    return {f.name: component(f) for f in fields(Preferences)}


def paste_fields(controls: list[Any]) -> list[tuple[Any, Callable[[Mapping[str, str]], Any]]]:
    """For the host's paste button: each control with how its value is read from generation parameters.

    Parameters of a picture made without the extension untick it and leave the other controls alone.
    """

    def reader(f: Any) -> Callable[[Mapping[str, str]], Any]:
        def read(params: Mapping[str, str]) -> Any:
            value = (pasted(params, "host") or {}).get(f.name)
            return Pasted(value) if isinstance(value, tuple) else value

        return read

    enabled, *fields = controls
    readers = [(control, reader(f)) for control, f in zip(fields, surface_fields("host"))]
    return [(enabled, lambda params: pasted(params, "host") is not None), *readers]
