"""How the extension behaves among others: axes of the X/Y/Z plot, preferences in the Settings tab."""

from __future__ import annotations

import copy
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from fastapi import HTTPException
from test_extension import host, pixels  # noqa: F401  (the fixture)

from lib_unsampler.settings import Preferences, SettingsError, parse_preferences, surface_fields


class AxisOption(SimpleNamespace):
    """The plot's own class takes the same arguments (tests/test_contract.py)."""

    def __init__(self, label: str, type: type, apply: Any, confirm: Any = None, choices: Any = None) -> None:
        super().__init__(label=label, type=type, apply=apply, confirm=confirm, choices=choices)


@pytest.fixture
def plot(host: SimpleNamespace) -> SimpleNamespace:  # noqa: F811
    """The plot's module, after the host has called what the script registered, twice."""
    from modules import script_callbacks, scripts

    module = SimpleNamespace(axis_options=[AxisOption("Nothing", str, None)], AxisOptionImg2Img=AxisOption)
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


@pytest.mark.parametrize("args", [({"output": ["frames"]},), (True, ["frames"]), ({"output": ["frames"], "noise": "path"},)])
def test_an_axis_changes_its_cell_alone(host: SimpleNamespace, plot: SimpleNamespace, args: tuple[Any, ...]) -> None:  # noqa: F811
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


def test_an_axis_is_checked_before_the_first_cell(host: SimpleNamespace, plot: SimpleNamespace) -> None:  # noqa: F811
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


def test_an_axis_of_an_unticked_script_is_refused(host: SimpleNamespace, plot: SimpleNamespace) -> None:  # noqa: F811
    for args in ((), (False, ["frames"]), ({"enabled": False},)):
        with pytest.raises(HTTPException, match="not ticked"):
            axis(plot, "noise").confirm(host.make(args), ["path"])


def test_the_settings_tab_has_every_preference(host: SimpleNamespace) -> None:  # noqa: F811
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
    with pytest.raises(SettingsError, match="^Settings, Batch Unsampler: gallery_limit: 0 is not a whole number from 1"):
        parse_preferences({"gallery_limit": 0, "duration": 0.5})
    assert parse_preferences({"gallery_limit": 20.0}).gallery_limit == 20  # gradio's numbers are floats


def test_the_frame_time_preference_is_the_default_and_no_more(host: SimpleNamespace) -> None:  # noqa: F811
    host.shared.opts.batch_unsampler_duration = 0.5
    with gr.Blocks():
        controls = dict(zip(["enabled", *(f.name for f in surface_fields("host"))], host.script.ui(True)))
    assert controls["duration"].value == 0.5
    assert [name for name, c in controls.items() if getattr(c, "do_not_save_to_config", False)] == ["duration"]
    _, processed = host.run({"output": ["animation"]})
    assert processed.extra_generation_params["Unsampler settings"]["duration"] == 0.5
    assert "Unsampler duration: 0.5" in processed.infotexts[0]
    _, processed = host.run({"output": ["animation"], "duration": 0.1})
    assert "Unsampler duration" not in processed.infotexts[0]
