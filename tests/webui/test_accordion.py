"""What the page asks before a request is made: the answer is the request's own, and nothing is loaded for it."""

from __future__ import annotations

import copy
import html
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from doubled import latents_of

from lib_unsampler.core import trajectory
from lib_unsampler.page import questions
from lib_unsampler.settings import Settings, form, help_on, surface_fields

HOST = {"sampler": "Euler", "scheduler": "Automatic", "steps": 8, "denoising_strength": 0.6, "width": 64, "height": 64}
FIELDS = surface_fields("host")


def every(values: dict[str, Any]) -> dict[str, Any]:
    """The fields as the page sends them."""
    return {**{f.name: list(f.default) if type(f.default) is tuple else f.default for f in FIELDS}, **values}


def ask(values: dict[str, Any], **told: Any) -> dict[str, Any]:
    from lib_unsampler.webui import preview

    asked = {"wants": ["schedule", "check"], "values": every(values), "host": {**HOST, **told}}
    return questions.told_of(asked, preview.foreseen)


def read(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'^<span data-answer="([^"]*)"></span>$', text)
    return json.loads(html.unescape(found))


def test_the_schedule_is_the_request_s(host: SimpleNamespace) -> None:
    for values in ({}, {"steps": 13}, {"output": ["frames", "init"]}):
        told = ask(values)["schedule"]
        _, processed = host.run(values)
        sigmas = processed.extra_generation_params["Unsampler sigmas"]
        assert set(sigmas) <= set(told["sigmas"]) and len(told["sigmas"]) == told["total"] + 1
        assert told["model"] == "doubled" and told["own"] == [8, 3] and told["kept"] is None


def test_exact_steps_of_img2img_count(host: SimpleNamespace) -> None:
    host.shared.opts.img2img_fix_steps = True
    told = ask({"output": ["init"]}, denoising_strength=0.5)["schedule"]
    assert told["fixed"] and told["total"] == 16 and told["own"] == [16, 8]
    host.shared.opts.img2img_fix_steps = False


def test_no_model_is_loaded_for_the_page(host: SimpleNamespace) -> None:
    from modules import sd_models

    for none in (None, type("FakeInitialModel", (), {})()):
        sd_models.model_data.sd_model = none
        told = ask({"mode": "noise", "panel": True})
        assert told["schedule"]["none"].startswith("No model is loaded yet")
        assert told["check"]["errors"] == [{"field": "panel", "text": "true needs mode invert"}]
    assert sd_models.model_data.sd_model is none


def test_a_curve_of_another_model_says_whose_it_is(host: SimpleNamespace) -> None:
    from modules import sd_models

    sd_models.model_data.forge_loading_parameters = {"checkpoint_info": sd_models.checkpoint("chosen")}
    told = ask({})["schedule"]
    assert told["model"] == "doubled" and told["note"] == "chosen is chosen and loads with the next picture"


def test_a_request_s_own_shift_counts_and_leaves_the_model_alone(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neo's engines with use_shift: the schedule hangs on the request's distilled_cfg_scale."""
    from modules import sd_models, sd_samplers_kdiffusion

    from lib_unsampler.webui.host import hypothetical

    class Predictor:
        shift = 1.0

        def set_parameters(self, shift: float) -> None:
            self.shift = shift

    predictor = Predictor()
    model = copy.copy(sd_models.model_data.sd_model)
    model.use_shift = True
    original = sd_samplers_kdiffusion.KDiffusionSampler

    class Sampler(original):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.model_wrap = SimpleNamespace(predictor=predictor)

        def get_sigmas(self, p: Any, steps: int) -> torch.Tensor:
            t = torch.linspace(1, 0, steps + 1)
            shift = self.model_wrap.predictor.shift
            return shift * t / (1 + (shift - 1) * t)

    class Asked(host.processing.StableDiffusionProcessingImg2Img):
        pass

    asked = host.processing.StableDiffusionProcessingImg2Img
    monkeypatch.setattr(sd_samplers_kdiffusion, "KDiffusionSampler", Sampler)
    monkeypatch.setattr(asked, "distilled_cfg_scale", 3.0, raising=False)
    sd_models.model_data.sd_model = model
    request, sampler = hypothetical.request(HOST, model)
    assert float(sampler.get_sigmas(request, 2)[1]) == pytest.approx(0.75)
    assert predictor.shift == 1.0


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"output": ["init"], "steps": 20}, {}, "steps"),
    ({"steps": "many", "duration": 0}, {}, "steps"),
    ({"mode": "invert", "noise": "path"}, {}, "noise"),
    ({"output": ["init"]}, {"sampler": "DDIM"}, "output"),
    ({"mode": "replay"}, {}, "mode"),
    ({"mode": "invert"}, {"sampler": "DPM fast"}, ""),
    ({"trajectory": "nothing.safetensors"}, {}, "trajectory"),
    ({"steps": 10000}, {"width": 2048, "height": 2048}, "steps"),
]


@pytest.mark.parametrize(("values", "told", "field"), REFUSED, ids=str)
def test_what_is_refused_is_what_the_request_would_be_refused_for(
    host: SimpleNamespace, values: dict[str, Any], told: dict[str, Any], field: str
) -> None:
    answer = ask(values, **told)
    errors = answer["check"]["errors"]
    asked = {{"sampler": "sampler_name"}.get(name, name): value for name, value in told.items()}
    with pytest.raises(Exception) as refused:  # the host's HTTPException
        host.run(values, **asked)
    said = str(refused.value)
    for error in errors:
        assert error["text"] in said
    assert errors and field in ({entry["field"] for entry in errors} | {""})


def test_what_the_page_says_that_it_resizes_to_is_the_size(host: SimpleNamespace) -> None:
    sizes = [ask({}, **told)["check"]["said"] for told in ({"width": 128, "height": 256}, {"resized": "128x256"}, {})]
    assert sizes[0] == sizes[1] != sizes[2]
    assert ask({}, resized="no image selected")["check"]["said"] == sizes[2]


def test_nothing_is_refused_that_is_done(host: SimpleNamespace) -> None:
    for values in ({}, {"output": ["latents"]}, {"mode": "invert"}, {"noise": "path", "captions": True}):
        assert ask(values)["check"]["errors"] == []
        assert host.run(values)[1].images


def test_the_levels_of_a_file_are_the_curve_s(host: SimpleNamespace) -> None:
    _, processed = host.run({"output": ["latents"], "step_increment": 3})
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    told = ask({"trajectory": name})["schedule"]
    (saved,) = latents_of(processed)
    assert [told["sigmas"][i] for i in told["kept"]] == saved.sigmas.tolist()


def test_an_answer_is_no_markup(host: SimpleNamespace) -> None:
    from lib_unsampler.webui import preview

    for question in ("", "null", "[]", "{}", '{"id": "\\"><script>", "kind": "fetch", "name": "<b>"}'):
        text, chosen, file = preview.answer(question)
        assert "error" in read(text) and chosen is None and file is None
        assert "<script" not in text and "<b>" not in text


def test_a_file_is_chosen_cut_and_fetched_from_the_shelf_alone(host: SimpleNamespace, tmp_path: Path) -> None:
    from lib_unsampler.webui import preview

    _, processed = host.run({"output": ["latents"], "noise": "path"})
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    (saved,) = latents_of(processed)

    def asked(**question: Any) -> tuple[dict[str, Any], str | None, Path | None]:
        text, chosen, file = preview.answer(json.dumps({"id": 1, **question}), lambda: host.out)
        return read(text), chosen, file

    assert asked(kind="choose", name=name, step=0)[1] == name
    told, chosen, _ = asked(kind="choose", name=name, step=3)
    cut = trajectory.load(host.out / chosen)
    assert told["name"] == chosen and cut.start == 3
    level = int((saved.sigmas == saved.schedule[3]).nonzero())
    assert torch.equal(cut.latent, saved.z[level]) and torch.equal(cut.z, saved.z[: level + 1])
    assert asked(kind="choose", name=name, step=3)[1] == chosen
    assert asked(kind="choose", name="")[1] == ""
    assert asked(kind="fetch", name=name)[2] == host.out / name
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((host.out / name).read_bytes())
    for other in ("../secret.safetensors", str(secret), "no.safetensors"):
        for kind in ("choose", "fetch"):
            told, chosen, file = asked(kind=kind, name=other)
            assert "error" in told and chosen is None and file is None
    for step in (1000, -1, 8):
        assert "is not one of the levels" in asked(kind="choose", name=name, step=step)[0]["error"]


def test_every_field_has_a_place_and_a_control_of_its_own(host: SimpleNamespace) -> None:
    with gr.Blocks() as blocks:
        controls = host.script.ui(True)
    assert len(controls) == len(FIELDS) + 1
    made = [block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)]
    assert len(made) == len(set(made))
    assert {f"batch_unsampler_{f.name}" for f in FIELDS} <= set(made)


def test_the_page_s_channel_is_not_in_the_published_api(host: SimpleNamespace) -> None:
    with gr.Blocks() as blocks:
        host.script.ui(True)
    assert not any("ask" in name for name in blocks.get_api_info()["named_endpoints"])


def test_script_info_has_each_field_s_help(host: SimpleNamespace) -> None:
    """The host makes its list from the controls' labels and sets it on the script."""
    with gr.Blocks():
        controls = host.script.ui(True)
    host.script.api_info = SimpleNamespace(args=[SimpleNamespace(label=control.label) for control in controls])
    labels = [arg.label for arg in host.script.api_info.args]
    assert labels == ["Batch Unsampler", *(f"{f.metadata['label']}: {help_on(f, 'host')}" for f in FIELDS)]


def test_the_form_without_its_script_has_every_field_s_help(host: SimpleNamespace) -> None:
    with gr.Blocks():
        controls = host.script.ui(True)
    assert [control.info for control in controls[1:]] == [help_on(f, "host") for f in FIELDS]


def test_the_script_is_told_of_every_field(host: SimpleNamespace) -> None:
    told = form.described("host", {"format": "webp"})
    assert [field["name"] for field in told["fields"]] == [f.name for f in FIELDS]
    json.dumps(told)
    assert next(field for field in told["fields"] if field["name"] == "format")["default"] == "webp"
    assert Settings(**{f.name: f.default for f in FIELDS}) == Settings()
