"""The accordion's controls, made from settings.py. The only file that imports gradio."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from .settings import OUTPUTS, pasted, surface_fields

ELEM_ID = "batch_unsampler"
GROUPS = (
    ("What comes out", (("output",),)),
    ("How far into the noise", (("steps", "end_at_step", "step_increment"),)),
    ("Which noise", (("noise", "normalize"),)),
    ("How the frames look", (("view",), ("include_clean", "captions"))),
    (
        "How the animation plays",
        (("format", "timing"), ("duration", "hold_first", "hold_last", "loop"), ("reverse", "ping_pong")),
    ),
    (
        "The model walks backwards",
        (("mode", "solver"), ("positive", "negative", "cfg"), ("tolerance", "max_calls", "skip"), ("panel", "report")),
    ),
)


def build(accordion: Callable[..., Any], title: str) -> list[Any]:
    """The controls inside a tick-box accordion: enabled first, then the host's fields in order.

    Arguments:
        accordion: The host's ``InputAccordion``, or anything called like it.
        title: The accordion's label.
    """
    by_name = {f.name: f for f in surface_fields("host")}
    made: dict[str, Any] = {}
    with accordion(False, label=title, elem_id=ELEM_ID) as enabled:
        for heading, rows in GROUPS:
            gr.HTML(f"<b>{heading}</b>", elem_classes=["batch-unsampler-heading"])
            for names in rows:
                with gr.Row():
                    made.update({name: _control(by_name[name]) for name in names})
    return [enabled, *(made[name] for name in by_name)]


def _control(f: Any) -> Any:
    """The gradio control of a field: its label, bounds, choices and help are the field's own."""
    common = {"label": f.metadata["label"], "info": f.metadata["help"], "elem_id": f"{ELEM_ID}_{f.name}"}
    choices = f.metadata["choices"]
    if choices is OUTPUTS:
        return gr.CheckboxGroup(choices=list(choices), value=list(f.default), **common)
    if choices:
        return gr.Radio(choices=list(choices), value=f.default, **common)
    if isinstance(f.default, bool):
        return gr.Checkbox(value=f.default, **common)
    if isinstance(f.default, str):
        return gr.Textbox(value=f.default, **common)
    return _number(f, common)


def _number(f: Any, common: Mapping[str, Any]) -> Any:
    """A number that publishes its bounds and leaves the check to settings.py.

    Gradio's own check answers even with the accordion unticked, names no field, and leaves the
    WebUI's page waiting.
    """
    bounds = {"minimum": f.metadata["minimum"], "maximum": f.metadata["maximum"]}
    kind = {"precision": 0, "step": 1} if isinstance(f.default, int) else {"precision": None, "step": min(0.01, f.default)}
    number = gr.Number(value=f.default, elem_classes=["batch-unsampler-number"], **kind, **bounds, **common)
    number.preprocess = lambda value: value
    return number


def paste_fields(controls: list[Any]) -> list[tuple[Any, Callable[[Mapping[str, str]], Any]]]:
    """For the host's paste button: each control with how its value is read from generation parameters.

    Parameters of a picture made without the extension untick it and leave the other controls alone.
    """

    def reader(f: Any) -> Callable[[Mapping[str, str]], Any]:
        def read(params: Mapping[str, str]) -> Any:
            value = (pasted(params, "host") or {}).get(f.name)
            return list(value) if isinstance(value, tuple) else value

        return read

    enabled, *fields = controls
    readers = [(control, reader(f)) for control, f in zip(fields, surface_fields("host"))]
    return [(enabled, lambda params: pasted(params, "host") is not None), *readers]
