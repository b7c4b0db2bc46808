"""Each field's gradio control: label, bounds, choices and help are the field's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr

from ...core.trajectory import TrajectoryError
from ...page import shelf
from ...settings import OUTPUTS, Preferences, help_on

ELEM_ID = "batch_unsampler"


def _common(f: Any) -> dict[str, Any]:
    return {"label": f.metadata["label"], "info": help_on(f, "host"), "elem_id": f"{ELEM_ID}_{f.name}"}


def control(f: Any, defaults: Mapping[str, Any]) -> Any:
    """The control of a field; ``defaults`` are what controls begin with where that is a preference."""
    common = {**_common(f), "elem_classes": ["batch-unsampler-field"]}
    value, choices = defaults.get(f.name, f.default), f.metadata["choices"]
    made: Any
    if choices is OUTPUTS:
        made = gr.CheckboxGroup(choices=list(choices), value=list(value), **common)
    elif choices:
        made = gr.Radio(choices=list(choices), value=value, **common)
    elif isinstance(f.default, bool):
        made = gr.Checkbox(value=value, **common)
    elif isinstance(f.default, str):
        made = gr.Textbox(value=value, **common)
    else:
        made = _number(f, value, common)
    made.do_not_save_to_config = f.name in defaults  # the host's file of defaults would hide the preference
    return made


def _number(f: Any, value: float, common: Mapping[str, Any]) -> Any:
    """A number that publishes its bounds and leaves the check to settings.py.

    Gradio's own check answers even with the accordion unticked, names no field, and leaves the
    WebUI's page waiting. It is no gradio slider, which would force what is typed into a range that
    must then be useless or endless: the page's script puts a slider beside it.
    """
    bounds = {"minimum": f.metadata["minimum"], "maximum": f.metadata["maximum"]}
    step = min(0.01, f.default or 0.01)
    kind = {"precision": 0, "step": 1} if isinstance(f.default, int) else {"precision": None, "step": step}
    number: Any = gr.Number(value=value, **kind, **bounds, **common)
    number.preprocess = lambda value: value
    return number


def file_chooser(f: Any, folder: Callable[[], Path]) -> Any:
    """The latents files by name, with buttons that look for new ones and take one from the user's own disk."""

    def listed() -> Any:
        return gr.update(choices=["", *shelf.names(folder())])

    def taken(upload: Any) -> Any:
        try:
            name = shelf.take(folder(), Path(getattr(upload, "name", upload)))
        except TrajectoryError as error:
            raise gr.Error(str(error)) from None
        return gr.update(choices=["", *shelf.names(folder())], value=name)

    chooser: Any = gr.Dropdown(choices=[], value=f.default, allow_custom_value=True, scale=8, **_common(f))
    chooser.preprocess = lambda value: value or ""  # settings.py checks it, as it does numbers
    narrow: dict[str, Any] = {"scale": 1, "min_width": 80}
    look = gr.Button("Look for files", elem_id=f"{ELEM_ID}_look", **narrow)
    upload = gr.UploadButton("Upload one", file_types=[shelf.ENDING], elem_id=f"{ELEM_ID}_upload", **narrow)
    look.click(listed, inputs=[], outputs=[chooser], show_progress=False)
    upload.upload(taken, inputs=[upload], outputs=[chooser], show_progress=False)
    return chooser


def preference_components() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The component of each preference for the Settings tab, with its arguments."""

    def component(f: Any) -> tuple[Any, dict[str, Any]]:
        if f.metadata["choices"]:
            return gr.Radio, {"choices": list(f.metadata["choices"])}
        if isinstance(f.default, str):
            return gr.Textbox, {}
        return gr.Number, {"precision": 0 if isinstance(f.default, int) else None}

    return {f.name: component(f) for f in fields(Preferences)}
