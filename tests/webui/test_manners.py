"""How the extension behaves among others: axes of the X/Y/Z plot, preferences in the Settings tab."""

from __future__ import annotations

import copy
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from doubled import latents_of, pixels, record_start
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from lib_unsampler.core import trajectory
from lib_unsampler.page import shelf
from lib_unsampler.settings import Preferences, SettingsError, parse_preferences, surface_fields
from lib_unsampler.webui import routes


class AxisOption(SimpleNamespace):
    """The plot's own class takes the same arguments (tests/test_contract.py)."""

    is_img2img = True

    def __init__(self, label: str, type: type, apply: Any, confirm: Any = None, choices: Any = None) -> None:
        super().__init__(label=label, type=type, apply=apply, confirm=confirm, choices=choices)


@pytest.fixture
def plot(host: SimpleNamespace) -> SimpleNamespace:
    """The plot's module, after the host has called what the script registered, twice."""
    from modules import script_callbacks, scripts

    module = SimpleNamespace(axis_options=[AxisOption("Nothing", str, None)])
    plot_class = type("Script", (), {"__module__": "xyz_grid.py"})
    scripts.scripts_data[:] = [SimpleNamespace(script_class=plot_class, module=module)]
    for callback in script_callbacks.registered["before_ui"] * 2:
        callback()
    return module


def axis(plot: SimpleNamespace, name: str) -> AxisOption:
    (found,) = [option for option in plot.axis_options if option.label == f"[Unsampler] {name}"]
    return found


def test_every_number_and_choice_has_one_axis(plot: SimpleNamespace) -> None:
    expected = {
        "[Unsampler] " + f.name.replace("_", " "): type(f.default) if type(f.default) in (int, float) else str
        for f in surface_fields("host")
        if type(f.default) is not str or f.metadata["choices"]
    }
    assert {option.label: option.type for option in plot.axis_options[1:]} == expected
    assert len(plot.axis_options) == len(expected) + 1


@pytest.mark.parametrize(
    "args", [({"output": ["frames"]},), (True, ["frames"]), ({"output": ["frames"], "noise": "path"},)]
)
def test_an_axis_changes_its_cell_alone(host: SimpleNamespace, plot: SimpleNamespace, args: tuple[Any, ...]) -> None:
    request = host.make(args)
    direct = [host.run({"output": ["frames"], "noise": noise})[1] for noise in ("shared", "independent")]
    for noise, alone in zip(("shared", "independent"), direct):
        cell = copy.copy(request)
        axis(plot, "noise").apply(cell, noise, ["shared", "independent"])
        processed = host.processing.process_images(cell)
        assert pixels(processed) == pixels(alone)
        said = [[sorted(text.split(", ")) for text in made.infotexts] for made in (processed, alone)]
        assert said[0] == said[1]  # nothing of the cell before, though the cells share a dict
    assert request.script_args[1:] == args


def test_an_axis_is_checked_before_the_first_cell(host: SimpleNamespace, plot: SimpleNamespace) -> None:
    request = host.make((True, ["frames"]))
    for f in surface_fields("host"):
        if type(f.default) is str and not f.metadata["choices"]:
            continue
        option = axis(plot, f.name.replace("_", " "))
        good = [f.metadata["minimum"]] if f.metadata["choices"] is None else list(f.metadata["choices"])
        option.confirm(request, ["true", "false"] if type(f.default) is bool else good)
        assert list(option.choices() if option.choices else ["false"])[-1] in ("false", *good)
        with pytest.raises(HTTPException) as refused:
            option.confirm(request, ["rubbish"])
        assert refused.value.status_code == 422 and f"{f.name}: 'rubbish' is not " in str(refused.value)


def test_an_axis_takes_its_field_s_word(host: SimpleNamespace, plot: SimpleNamespace) -> None:
    option, request = axis(plot, "end at step"), host.make((True, ["frames"]))
    values = [option.type(text) for text in ("automatic", "3", " Automatic ")]  # as the plot reads what is typed
    assert values == ["automatic", 3, "automatic"] and option.type == int  # noqa: E721 - so the plot finds ranges
    option.confirm(request, values)
    for value, number in zip(values, (-1, 3, -1)):
        cell = copy.copy(request)
        option.apply(cell, value, values)
        alone = host.run({"output": ["frames"], "end_at_step": number})[1]
        assert pixels(host.processing.process_images(cell)) == pixels(alone)
    for wrong in ("for ever", "", "auto"):
        with pytest.raises(ValueError, match="invalid literal"):
            option.type(wrong)


def test_an_axis_of_an_unticked_script_is_refused(host: SimpleNamespace, plot: SimpleNamespace) -> None:
    for args in ((), (False, ["frames"]), ({"enabled": False},)):
        with pytest.raises(HTTPException, match="not ticked"):
            axis(plot, "noise").confirm(host.make(args), ["path"])


def test_the_settings_tab_has_every_preference(host: SimpleNamespace) -> None:
    from modules import script_callbacks

    for callback in script_callbacks.registered["ui_settings"]:
        callback()
    there = host.shared.opts.data_labels
    assert list(there) == [f"batch_unsampler_{f.name}" for f in fields(Preferences)]
    for f, option in zip(fields(Preferences), there.values()):
        assert (option.default, option.label) == (f.default, f.metadata["label"])
        assert option.section == ("batch_unsampler", "Batch Unsampler") and f.metadata["help"] in option.comment_after
    assert there["batch_unsampler_animation_folder"].restrict_api


def test_a_preference_out_of_bounds_is_named() -> None:
    with pytest.raises(SettingsError, match="^Settings, Batch Unsampler: gallery_limit: 0 is not a whole"):
        parse_preferences({"gallery_limit": 0, "duration": 0.5})
    assert parse_preferences({"gallery_limit": 20.0}).gallery_limit == 20  # gradio's numbers are floats


def test_the_frame_time_preference_is_the_default_and_no_more(host: SimpleNamespace) -> None:
    host.shared.opts.batch_unsampler_duration = 0.5
    with gr.Blocks():
        controls = dict(zip(["enabled", *(f.name for f in surface_fields("host"))], host.script.ui(True)))
    assert controls["duration"].value == 0.5
    assert [name for name, c in controls.items() if getattr(c, "do_not_save_to_config", False)] == [
        "duration",
        "format",
    ]
    _, processed = host.run({"output": ["animation"]})
    assert processed.extra_generation_params["Unsampler settings"]["duration"] == 0.5
    assert "Unsampler duration: 0.5" in processed.infotexts[0]
    _, processed = host.run({"output": ["animation"], "duration": 0.1})
    assert "Unsampler duration" not in processed.infotexts[0]


def test_the_gallery_limit_is_the_owner_s(host: SimpleNamespace) -> None:
    host.shared.opts.batch_unsampler_gallery_limit = 3.0
    p, processed = host.run({"output": ["frames"]})
    assert len(processed.images) == 3 and len(list(host.out.glob("*-z0*.png"))) == 9
    assert p.comments == ["3 of 9 frames are shown, spread evenly; all are saved"]


def test_too_much_work_is_refused_before_any(host: SimpleNamespace) -> None:
    host.shared.opts.batch_unsampler_megapixels = 1
    with pytest.raises(HTTPException, match=r"steps: 300 give 301 frames of 1 x 64 x 64, 1 megapixels; at most 1 are"):
        host.run({"steps": 300})
    assert not host.out.exists()
    for fewer in ({"steps": 300, "step_increment": 2}, {"steps": 300, "end_at_step": 100}, {"output": ["init"]}):
        assert host.run(fewer)[1].images
    with pytest.raises(HTTPException):
        host.run({"steps": 240}, batch_size=2)


def test_animations_go_where_the_owner_says(host: SimpleNamespace, tmp_path: Path) -> None:
    host.shared.opts.batch_unsampler_animation_folder = str(tmp_path / "moving")
    _, processed = host.run({"output": ["animation", "frames"]})
    (file,) = (tmp_path / "moving").iterdir()
    assert file.suffix == ".gif" and not list(host.out.glob("*.gif")) and len(list(host.out.glob("*-z0*"))) == 9
    shown = Path(processed.images[0].already_saved_as)
    assert shown.parent == Path(host.shared.opts.temp_dir) and shown.read_bytes() == file.read_bytes()


def kept(host: SimpleNamespace, settings: dict[str, Any], **request: Any) -> str:
    """The name of a latents file that a run has left in the output folder."""
    _, processed = host.run({**settings, "output": ["latents", *settings.get("output", [])]}, **request)
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    return name


@pytest.mark.parametrize("noise", ["shared", "independent", "path"])
@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
def test_init_from_a_file_is_the_init_that_made_it(host: SimpleNamespace, noise: str, sampler: str) -> None:
    made, _ = host.run({"output": ["init", "latents"], "noise": noise}, sampler_name=sampler)
    (file,) = host.out.glob("*.safetensors")
    again, processed = host.run({"output": ["init", "latents"], "trajectory": file.name}, sampler_name=sampler)
    assert torch.equal(again.latest_samples, made.latest_samples)
    first, second = trajectory.load(file), latents_of(processed)[0]
    assert torch.equal(first.z, second.z) and torch.equal(first.sigmas, second.sigmas)
    assert "Unsampler trajectory: " + file.name in processed.infotexts[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
def test_extra_noise_is_in_the_hand_off_alone(host: SimpleNamespace, sampler: str, masked: bool) -> None:
    """img2img_extra_noise: sampling starts where img2img's does; z and frames stay at their sigma."""
    nmask = torch.ones(1, 1, 8, 8)
    nmask[..., 4:] = 0.5
    fields = {"sampler_name": sampler, **({"nmask": nmask, "mask": 1 - nmask} if masked else {})}
    _, quiet = host.run({"output": ["frames", "latents"]}, **fields)
    host.shared.opts.img2img_extra_noise = 0.3
    seen: list[torch.Tensor] = []
    restore = record_start(host, seen)
    plain, _ = host.run(**fields)
    made, processed = host.run({"output": ["init", "frames", "latents"]}, **fields)
    restore()
    first = latents_of(processed)[0]
    assert torch.equal(seen[0], seen[1]) and torch.equal(made.latest_samples, plain.latest_samples)
    assert torch.equal(first.handoff, seen[0]) and torch.equal(first.latent, seen[0])
    assert torch.equal(first.z, latents_of(quiet)[0].z[: len(first.z)])
    assert float((first.handoff - first.z[-1])[..., :4].std()) > 0.2
    (name,) = processed.extra_generation_params["Unsampler latents names"]
    again, resumed = host.run({"output": ["init", "frames", "latents"], "trajectory": name}, **fields)
    second = latents_of(resumed)[0]
    assert torch.equal(again.latest_samples, made.latest_samples)
    assert torch.equal(second.handoff, first.handoff)
    torch.testing.assert_close(second.z, first.z, rtol=0, atol=0 if not masked else 2.0)
    if not masked:
        assert pixels(resumed)[:-1] == pixels(processed)[:-1]


def test_frames_of_a_file_need_no_sampler_of_its_schedule(host: SimpleNamespace) -> None:
    settings = {"step_increment": 3, "noise": "path"}
    _, direct = host.run({**settings, "output": ["frames", "latents"]}, batch_size=2)
    name = direct.extra_generation_params["Unsampler latents names"][0]
    _, again = host.run({"output": ["frames"], "trajectory": name}, batch_size=2, steps=30, sampler_name="LMS", seed=77)
    assert pixels(again) == pixels(direct)
    notes = [made.extra_generation_params["Unsampler images"] for made in (direct, again)]
    assert notes[0] == notes[1]


def test_a_file_that_starts_elsewhere_overrides_the_strength(host: SimpleNamespace) -> None:
    made, _ = host.run({"output": ["init", "latents"], "noise": "path", "end_at_step": 1})
    (file,) = host.out.glob("*.safetensors")
    again, _ = host.run({"output": ["init"], "trajectory": file.name})
    assert torch.equal(again.latest_samples, made.latest_samples)
    assert "end at step 1 overrides the denoising strength: starts at step 1 of 8" in again.comments


@pytest.mark.parametrize(
    ("settings", "request_", "said"),
    [
        ({}, {"width": 128}, "it holds other pictures: 1 of 64 x 64, and a batch of this request is 1 of 128 x 64"),
        ({}, {"steps": 9}, "it was made on another schedule: 8 steps from sigma 14.61 to 0.02917, and this"),
        ({}, {"parameterization": "v"}, "it is from a model of type eps, and the loaded one is of type v"),
        ({"mode": "replay"}, {"sampler_name": "Euler a"}, "holds no noises to replay"),
        ({"mode": "invert"}, {}, "trajectory: a file's levels go with mode noise or replay, not with invert"),
        ({"steps": 3, "output": ["frames"]}, {}, "steps: 3 does not go with trajectory"),
        ({"noise": "path"}, {}, "noise: 'path' does not go with trajectory"),
        ({"end_at_step": 2}, {}, "end_at_step: 2 does not go with trajectory"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    host: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    request_: dict[str, Any],
    said: str,
) -> None:
    from modules.sd_samplers_cfg_denoiser import CFGDenoiser

    name = kept(host, {})
    parameterization = request_.pop("parameterization", "eps")
    p = host.make(({"output": ["init"], "trajectory": name, **settings},), **request_)
    p.sd_model = copy.copy(p.sd_model)
    p.sd_model.parameterization = parameterization
    monkeypatch.setattr(CFGDenoiser, "forward", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(HTTPException) as refused:
        host.processing.process_images(p)
    assert refused.value.status_code == 422 and said in str(refused.value)


def test_a_replay_from_its_file(host: SimpleNamespace) -> None:
    made, _ = host.run({"output": ["init", "latents"], "mode": "replay"}, sampler_name="Euler a")
    (file,) = host.out.glob("*.safetensors")
    settings = {"output": ["init"], "mode": "replay", "trajectory": file.name}
    again, _ = host.run(settings, sampler_name="Euler a", seed=99)
    assert torch.equal(again.latest_samples, made.latest_samples)


@pytest.fixture
def outside(host: SimpleNamespace, tmp_path: Path) -> list[str]:
    """Names that must not be served; beside them one good file is in the folder."""
    good = host.out / kept(host, {})
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(good.read_bytes())
    os.symlink(secret, host.out / "link.safetensors")
    (host.out / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    (host.out / "picture.png").write_bytes(b"PNG")
    names = ["../secret.safetensors", str(secret), "link.safetensors", "model.safetensors", "picture.png", "", "."]
    return [*names, "no.safetensors", "sub/../../secret.safetensors", "\0.safetensors"]


def test_nothing_but_our_files_in_the_folder_is_read(host: SimpleNamespace, outside: list[str]) -> None:
    assert len(shelf.names(host.out)) == 1
    for name in outside:
        with pytest.raises(trajectory.TrajectoryError):
            shelf.find(host.out, name)


@pytest.mark.parametrize("accounts", [{}, {"ann": "one", "bob": "two:2"}])
def test_latents_over_the_api(host: SimpleNamespace, outside: list[str], accounts: dict[str, str]) -> None:
    app = FastAPI()
    routes.add(app, lambda: host.out, accounts)
    client = TestClient(app)
    right = ("bob", "two:2") if accounts else None
    names = client.get(routes.LATENTS, auth=right).json()
    (good,) = names
    assert client.get(f"{routes.LATENTS}/{good}", auth=right).content == (host.out / good).read_bytes()
    for name in outside[:-1]:
        quoted = name.replace("/", "%2F").replace("..", "%2E%2E")
        reply = client.get(f"{routes.LATENTS}/{quoted}", auth=right)
        assert reply.status_code in (404, 405) or (not name.strip(".") and reply.json() == names)
    for wrong in (None, ("bob", "one"), ("ann", ""), ("eve", ""), ("", "")) if accounts else ():
        for path in (routes.LATENTS, f"{routes.LATENTS}/{good}"):
            assert client.get(path, auth=wrong).status_code == 401


def test_an_upload_is_read_whole_before_it_is_kept(host: SimpleNamespace, tmp_path: Path) -> None:
    file = host.out / kept(host, {})
    elsewhere = tmp_path / "downloaded.safetensors"
    elsewhere.write_bytes(file.read_bytes())
    name = shelf.take(host.out, elsewhere)
    assert name == shelf.take(host.out, elsewhere) and shelf.find(host.out, name).read_bytes() == file.read_bytes()
    elsewhere.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(trajectory.TrajectoryError):
        shelf.take(host.out, elsewhere)
    assert len(list((host.out / shelf.UPLOADS).iterdir())) == 1
