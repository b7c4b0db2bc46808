"""What a request's arguments say and leave out: nothing that was asked for is dropped without a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from doubled import pixels
from fastapi import HTTPException
from test_manners import axis, plot  # noqa: F401  (a fixture)

from lib_unsampler.settings import surface_fields

FIELDS = [f.name for f in surface_fields("host")]


def filled(host: SimpleNamespace, args: list[Any]) -> tuple[Any, ...]:
    """Arguments as the host's API gives them: what is missing has its control's value, what is too much is gone."""
    with gr.Blocks():
        values = [control.value for control in host.script.ui(True)]
    return (*args, *values[len(args) :])[: len(values)]


@pytest.mark.parametrize(
    ("behind", "named"),
    [([5], "output: 5"), ([{"steps": 3}], "output: {'steps': 3}"), ([["frames", "animation"], 3], "steps: 3")],
)
def test_what_stands_behind_the_dict_is_refused(host: SimpleNamespace, behind: list[Any], named: str) -> None:
    request = host.make(filled(host, [{"output": ["frames"]}, *behind]))
    with pytest.raises(HTTPException, match="stands behind a dict") as caught:
        host.processing.process_images(request)
    assert caught.value.status_code == 422 and named in str(caught.value) and not host.out.exists()


def test_what_the_host_fills_in_is_nobody_s_word(host: SimpleNamespace) -> None:
    expected = pixels(host.run({"output": ["frames"]})[1])
    request = host.make(filled(host, [{"output": ["frames"]}]))
    assert pixels(host.processing.process_images(request)) == expected


def test_a_default_of_before_is_nobody_s_word_either(host: SimpleNamespace) -> None:
    """The API keeps the controls' values of its start; the owner has changed the preference since."""
    host.shared.opts.batch_unsampler_duration = 0.5
    at_start = filled(host, [{"output": ["animation"]}])
    host.shared.opts.batch_unsampler_duration = 0.2
    processed = host.processing.process_images(host.make(at_start))
    assert processed.extra_generation_params["Unsampler settings"]["duration"] == 0.2


def test_a_dict_goes_before_pasted_parameters_whole(host: SimpleNamespace) -> None:
    """The host fills every argument in from its ``infotext`` field, then puts the request's own over the first."""
    with gr.Blocks():
        host.script.ui(True)
    wanted = {"output": ["frames", "contact sheet"], "noise": "path", "step_increment": 2}
    text = host.run(wanted)[1].infotexts[0].splitlines()[1].replace("frames, contact", "frames; contact")
    params = {k: v.replace(";", ",") for k, v in (pair.split(": ", 1) for pair in text.split(", "))}
    pasted = [function(params) for _, function in host.script.infotext_fields]
    assert pasted[1] == ["frames", "contact sheet"] and pasted[1 + FIELDS.index("noise")] == "path"
    over = host.processing.process_images(host.make(({"output": ["frames"]}, *pasted[1:])))
    assert over.extra_generation_params["Unsampler settings"]["noise"] == "shared" and len(over.images) == 9
    alone = host.processing.process_images(host.make(tuple(pasted)))
    assert alone.extra_generation_params["Unsampler settings"]["noise"] == "path"


def test_an_axis_takes_the_page_s_values_along(host: SimpleNamespace, plot: SimpleNamespace) -> None:  # noqa: F811
    page = list(filled(host, [True, ["frames"], 0, 1, 2, "path", True]))
    request = host.make(tuple(page))
    axis(plot, "end at step").confirm(request, [3])
    axis(plot, "end at step").apply(request, 3, [3])
    axis(plot, "view").apply(request, "raw", ["raw"])
    told = host.processing.process_images(request).extra_generation_params["Unsampler settings"]
    assert (told["end_at_step"], told["step_increment"], told["noise"], told["view"]) == (3, 2, "path", "raw")


def test_an_axis_says_what_is_behind_a_dict(host: SimpleNamespace, plot: SimpleNamespace) -> None:  # noqa: F811
    request = host.make(({"output": ["frames"]}, 5))
    for act in (
        lambda: axis(plot, "view").confirm(request, ["raw"]),
        lambda: axis(plot, "view").apply(request, "raw", []),
    ):
        with pytest.raises(HTTPException, match="output: 5 stands behind a dict"):
            act()


@pytest.mark.parametrize("name", ["steps", "duration"])
def test_a_cleared_number_is_empty(host: SimpleNamespace, name: str) -> None:
    with pytest.raises(HTTPException, match=rf"{name}: None \(empty\) is not a"):
        host.run({name: None})


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_mismatch_never_says_the_same_of_both(host: SimpleNamespace, at: int) -> None:
    from lib_unsampler.core import trajectory
    from lib_unsampler.webui import saved

    host.run({"output": ["latents", "init"]}, denoising_strength=1.0)
    file = trajectory.load(next(host.out.glob("*.safetensors")))
    other = file.schedule.clone()
    other[at] *= 1 + 3e-5
    why = saved.other_schedule(file, other)
    said = f"it was made on another schedule: sigma {float(file.schedule[at]):.9g} at step {at}, and "
    assert why.startswith(said) and why.endswith(f"give sigma {float(other[at]):.9g} there")
    assert saved.other_schedule(file, file.schedule.clone()) is None


def test_no_strength_with_exact_steps_is_refused_by_its_name(host: SimpleNamespace) -> None:
    """Where img2img itself gives the source back: it has no step to do."""
    host.shared.opts.img2img_fix_steps = True
    try:
        plain, _ = host.run(denoising_strength=0)
        assert torch.equal(plain.latest_samples, plain.init_latent)
        for settings in ({"output": ["init"]}, {"output": ["init", "frames"], "end_at_step": 2}):
            with pytest.raises(HTTPException, match="denoising_strength: 0 leaves no noise level") as caught:
                host.run(settings, denoising_strength=0)
            assert caught.value.status_code == 422 and "img2img_fix_steps" in str(caught.value)
        assert len(host.run({"output": ["frames"]}, denoising_strength=0)[1].images) == 9
    finally:
        host.shared.opts.img2img_fix_steps = False
    assert host.run({"output": ["init"]}, denoising_strength=0)[1].images
