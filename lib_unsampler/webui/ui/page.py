"""What the page's script finds: the form as JSON, and where the host's own controls are."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from ...settings import form

HOST: dict[str, str] = {
    "sampler": "#img2img_sampling input",
    "scheduler": "#img2img_scheduler input",
    "steps": "#img2img_steps input[type=number]",
    "denoising_strength": "#img2img_denoising_strength input[type=number]",
    "distilled_cfg_scale": "#img2img_distilled_cfg_scale input[type=number]",
    "width": "#img2img_width input[type=number]",
    "height": "#img2img_height input[type=number]",
    "resized": "#img2img_scale_resolution_preview .resolution:last-of-type",
    "batch_size": "#img2img_batch_size input[type=number]",
    "n_iter": "#img2img_batch_count input[type=number]",
    "seed": "#img2img_seed input[type=number]",
}
"""The host's own controls, by the names of the request's attributes; ``resized`` is what *Resize by* says it makes."""

PLACES: dict[str, str] = {
    "gallery": "#img2img_gallery",
    "result": "#generation_info_img2img textarea",
    "player": "#img2img_gallery_container",
    "source": "#img2img_image img, #img2img_image canvas",
}
"""Where results are, and after what the player stands."""


def stage(defaults: Mapping[str, Any], answers: bool) -> str:
    """An element that the script fills, with all it needs to know. Without the script it shows nothing."""
    told = {**form.described("host", defaults), "host": HOST, "places": PLACES, "answers": answers}
    return f'<div class="batch-unsampler-stage" data-form="{html.escape(json.dumps(told), quote=True)}"></div>'
