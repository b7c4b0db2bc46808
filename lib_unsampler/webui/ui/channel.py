"""How the page's script and Python talk: through events of the page itself, so the page's own login guards them.

The script writes a question into a hidden text box; gradio brings the answer into a hidden HTML. No route is
added, so there is no second password prompt with ``--api-auth``, and nothing to be asked from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from .controls import ELEM_ID

Answerer = Callable[[str], tuple[str, str | None, Path | None]]
"""Question to (HTML, latents file to choose, latents file to download)."""

CHANGED = "() => { document.dispatchEvent(new CustomEvent('batch-unsampler-changed')); return []; }"
HIDDEN = ["batch-unsampler-hidden"]


def channel(answer: Answerer, chooser: Any) -> None:
    """The hidden components, inside the accordion; ``chooser`` is that of the latents files."""
    with gr.Row(elem_classes=HIDDEN):
        question = gr.Textbox(label="question", elem_id=f"{ELEM_ID}_question", elem_classes=HIDDEN)
        told = gr.HTML("", elem_id=f"{ELEM_ID}_answer", elem_classes=HIDDEN)
        file = gr.File(label="file", elem_id=f"{ELEM_ID}_file", elem_classes=HIDDEN, interactive=False)

    def ask(text: str) -> list[Any]:
        said, chosen, found = answer(text)
        choice = gr.update() if chosen is None else gr.update(choices=["", chosen], value=chosen)
        return [said, choice, gr.update() if found is None else gr.update(value=str(found))]

    hidden: list[Any] = [question, told, file]
    for component in hidden:
        component.do_not_save_to_config = True
    quiet = {"show_progress": "hidden", "queue": False, **_unpublished(question.change)}
    question.change(ask, inputs=[question], outputs=[told, chooser, file], **quiet)


def _unpublished(listener: Callable[..., Any]) -> dict[str, Any]:
    """Keeps an event out of gradio's published API, and lets none wait for another, as this gradio says it."""
    known = inspect.signature(listener).parameters
    private = {"api_visibility": "private"} if "api_visibility" in known else {"api_name": False}
    return {**private, **({"trigger_mode": "multiple"} if "trigger_mode" in known else {})}


def tells_script(component: Any) -> None:
    """Lets the page's script hear of every change, pasted ones too, which raise no event of the browser."""
    known = inspect.signature(component.change).parameters
    script = {"js" if "js" in known else "_js": CHANGED}
    component.change(fn=None, inputs=[], outputs=[], **script)
