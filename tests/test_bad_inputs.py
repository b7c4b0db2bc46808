"""Inputs that are wrong, each in its own field or way: refused before any work, by field, value and what is allowed."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib_unsampler.core import trajectory
from lib_unsampler.core.trajectory import TrajectoryError
from lib_unsampler.page import questions, shelf
from lib_unsampler.settings import (
    Preferences,
    Settings,
    SettingsError,
    infotext_key,
    parse,
    parse_args,
    parse_preferences,
    pasted,
    surface_fields,
)
from lib_unsampler.settings.infotext import VERSION_KEY
from lib_unsampler.standalone import cli, folders
from lib_unsampler.standalone.serve.asked import BOUNDS, Asked
from lib_unsampler.webui import routes

NAN, INF = math.nan, math.inf
HOST = {f.name: f for f in surface_fields("host")}
CLI = {f.name: f for f in surface_fields("cli")}
EVERY = {f.name: f for f in fields(Settings)}


def beyond(f: Any) -> dict[str, Any]:
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    step = 1 if type(f.default) is int else 0.5
    return {"below": low - step - 1, "above": high + step}


NUMBERS: dict[str, Any] = {
    "nothing": None,
    "empty": "",
    "a word": "many",
    "grouped digits": "1_0",
    "true": True,
    "a list": [1],
    "a dict": {"a": 1},
    "not a number": NAN,
    "infinite": INF,
    "hexadecimal": "0x10",
    "a sum": "1+1",
}
KINDS: dict[type, dict[str, Any]] = {
    int: {**NUMBERS, "a fraction": 1.5, "a fraction as text": "1.5"},
    float: {**NUMBERS, "words of it": "nan"},
    bool: {"nothing": None, "empty": "", "yes": "yes", "one": 1, "a list": [True], "a dict": {}},
    str: {"nothing": None, "a number": 1, "true": True, "a list": ["a"], "a dict": {"a": 1}},
    tuple: {
        "nothing": None,
        "empty": [],
        "an empty text": "",
        "unknown": ["frames", "gif"],
        "a number in it": [1],
        "a list in it": [["frames"]],
        "a number": 7,
        "true": True,
        "a dict": {"frames": True},
    },
}
CHOSEN = {"empty": "", "a word": "rubbish", "in capitals": None, "with a blank": None}


def wrong(f: Any) -> dict[str, Any]:
    """Values of a field by what is wrong with them."""
    kinds = dict(KINDS[type(f.default)])
    if type(f.default) in (int, float):
        kinds |= beyond(f)
    choices = f.metadata["choices"]
    if type(f.default) is str and choices:
        kinds |= {**CHOSEN, "in capitals": choices[0].upper(), "with a blank": f" {choices[0]}"}
    return kinds


def as_text(value: Any) -> str | None:
    """A value as somebody types it; None for what cannot be typed, or means something else as text."""
    if value is None or isinstance(value, (bool, list, dict)):
        return None
    return str(value)


FIELDS = [(name, kind) for name, f in EVERY.items() for kind in wrong(f)]


def allowed_there(f: Any, text: str) -> bool:
    """Free text is never wrong; an empty one for a list of words neither where it is left out."""
    return type(f.default) is str and not f.metadata["choices"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parent / "webui"))
    patch = pytest.MonkeyPatch()
    from doubled import doubled_host

    with doubled_host(tmp_path_factory.mktemp("host"), patch) as doubled:
        with gr.Blocks():
            doubled.script.ui(True)
        doubled.pasting = doubled.script.infotext_fields
        yield doubled
    patch.undo()
    sys.path.remove(str(Path(__file__).resolve().parent / "webui"))


def refused(host: SimpleNamespace, args: tuple[Any, ...], by_schedule: bool = False, **request: Any) -> str:
    """What the API answers before any work: nothing encoded, nothing written, no attribute left.

    What depends on the schedule is refused where the host samples, which is after it has encoded the source.
    """
    p = host.make(args, **request)
    with pytest.raises(Exception) as caught:
        host.processing.process_images(p)
    assert caught.value.status_code == 422, caught.value
    assert not host.out.exists() and (by_schedule or not hasattr(p, "init_latent"))
    assert not {"init", "sample", "save_samples", "close", "batch_unsampler"} & set(vars(p))
    return str(caught.value)


def assert_named(said: str, name: str, value: Any) -> None:
    shown = "None (empty)" if value is None and type(EVERY[name].default) in (int, float) else repr(value)
    assert f"{name}: {shown} is not " in said, said
    allowed = said.split(f"{name}: {shown} is not ")[1]
    assert len(allowed) > 3


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in FIELDS if n in HOST])
def test_the_api_refuses_a_field(host: SimpleNamespace, name: str, kind: str) -> None:
    value = wrong(HOST[name])[kind]
    assert_named(refused(host, ({name: value},)), name, value)
    behind = {f.name: f.default for f in surface_fields("host")} | {name: value}
    assert_named(refused(host, (True, *behind.values())), name, value)


def test_the_x_y_z_plot_refuses_a_field(host: SimpleNamespace) -> None:
    from lib_unsampler.webui import axes

    def option(label: str, type: Any, apply: Any, confirm: Any, choices: Any) -> SimpleNamespace:
        return SimpleNamespace(label=label, type=type, confirm=confirm)

    p, count = host.make((True,)), 0
    for name, f in HOST.items():
        for axis in axes._axes(option, f):
            for value in filter(None, map(as_text, wrong(f).values())):
                try:
                    axis.confirm(p, [axis.type(value)])
                except ValueError as error:  # as the plot's own numbers: it says which text is none
                    assert repr(value) in str(error)
                except Exception as error:
                    assert error.status_code == 422 and f"{name}: " in str(error) and " is not " in str(error)
                else:
                    pytest.fail(f"{name}: {value!r} was taken")
                count += 1
    assert count > 100


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in FIELDS if n in CLI])
def test_the_command_line_refuses_a_field(name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    f = CLI[name]
    text = as_text(wrong(f)[kind])
    if text is None or allowed_there(f, text):
        return
    given = [f"--{name.replace('_', '-')}={text}", "cat.jpg", "-o", "x.gif"]
    with pytest.raises(SystemExit) as caught:
        cli.main(given)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and f"--{name.replace('_', '-')}" in said


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, k in FIELDS if n in HOST])
def test_pasted_parameters_say_a_field(host: SimpleNamespace, name: str, kind: str) -> None:
    """The extension is ticked all the same: a paste that is partly wrong is no plain img2img."""
    f = HOST[name]
    text = as_text(wrong(f)[kind])
    if text is None or allowed_there(f, text):
        return
    params = {VERSION_KEY: "0.1.0", infotext_key(f): text}
    values = pasted(params, "host")
    assert values is not None and isinstance(values[name], SettingsError)
    assert_named(str(values[name]), name, text)
    assert all(not isinstance(value, SettingsError) for other, value in values.items() if other != name)
    readers = {control.elem_id: function for control, function in host.pasting}
    assert readers["batch_unsampler-checkbox"](params) is True
    with pytest.warns(UserWarning, match=f"{name}: "), pytest.raises(SettingsError):
        readers[f"batch_unsampler_{name}"](params)


# What is wrong with more than one value


@dataclass(frozen=True)
class Wrong:
    """A request whose fields are right, each by itself."""

    args: tuple[Any, ...]
    said: str
    request: dict[str, Any]


def together(said: str, *args: Any, **request: Any) -> Wrong:
    return Wrong(args, said, request)


REQUESTS: dict[str, Wrong] = {
    "an unknown field": together("nois: unknown field (known: ", {"nois": "path"}),
    "the command line's field": together("sampler: unknown field", {"sampler": "euler"}),
    "two unknown": together("b: unknown field", {"a": 1, "b": 2}),
    "too many": together("values where at most", True, *range(60)),
    "enabled is a word": together("enabled: 'yes' is not true or false", {"enabled": "yes"}),
    "enabled is a number": together("enabled: 1 is not true or false", 1),
    "enabled is nothing": together("enabled: None is not true or false", None),
    "enabled is a list": together("enabled: [] is not true or false", []),
    "a value behind a dict": together("stands behind a dict", {"output": ["frames"]}, ["animation"]),
    "a dict behind a dict": together("stands behind a dict", {"output": ["frames"]}, {"steps": 3}),
    "steps with init": together("steps: 5 is not 0, which init needs", {"output": ["init"], "steps": 5}),
    "steps with guide": together("steps: 5 is not 0, which guide needs", {"output": ["guide"], "steps": 5}),
    "steps with a sweep": together("steps: 5 is not 0", {"output": ["strength sweep"], "steps": 5}),
    "noise of an inversion": together("noise: 'path' is not shared", {"mode": "invert", "noise": "path"}),
    "a normalized inversion": together("normalize: true does not", {"mode": "invert", "normalize": True}),
    "a panel of noise": together("panel: true needs mode invert", {"panel": True}),
    "a panel of a film": together(
        "panel: true does not go with film", {"mode": "invert", "panel": True, "film": "both", "output": ["init"]}
    ),
    "a report of noise": together("report: true needs mode invert", {"report": True}),
    "a path to replay": together("noise: 'path' is not independent", {"mode": "replay", "noise": "path"}),
    "an inverted file": together("trajectory: a file's levels", {"mode": "invert", "trajectory": "x.safetensors"}),
    "skip without replay": together("skip: 2 needs mode replay", {"skip": 2}),
    "two ends": together("both say where to stop", {"end_at_step": 2, "end_at_sigma": 1.0}),
    "a guided replay": together("does not go with mode replay", {"mode": "replay", "output": ["guide"]}),
    "a guide of many noises": together("noise: 'path' does not go with guide", {"output": ["guide"], "noise": "path"}),
    "a guide that ends first": together(
        "guide_from: 0.8 is above guide_until", {"output": ["guide"], "guide_from": 0.8, "guide_until": 0.2}
    ),
    "a guided sweep": together("strength sweep does not go with guide", {"output": ["guide", "strength sweep"]}),
    "a replayed sweep": together("does not go with mode replay", {"mode": "replay", "output": ["strength sweep"]}),
    "a filmed sweep": together("film: 'both'", {"output": ["strength sweep", "animation"], "film": "both"}),
    **{
        f"{name} of a file": together(f"{name}: {value!r} does not go with trajectory", {
            "trajectory": "x.safetensors", name: value,
        })
        for name, value in {
            "steps": 5, "end_at_step": 2, "step_increment": 2, "normalize": True, "end_at_sigma": 1.0, "noise": "path",
        }.items()
    },
    "a replay without noise": together("adds no noise", {"mode": "replay", "output": ["init"]}, sampler_name="Euler"),
    "an inverted sampler": together("can not be inverted", {"mode": "invert"}, sampler_name="DPM fast"),
    "an adaptive inversion": together("can not be inverted", {"mode": "invert"}, sampler_name="DPM adaptive"),
    "timesteps for init": together("needs a sampler with a sigma", {"output": ["init"]}, sampler_name="DDIM"),
    "timesteps for invert": together("needs a sampler with a sigma", {"mode": "invert"}, sampler_name="DDIM"),
    "timesteps for replay": together("needs a sampler with a sigma", {"mode": "replay"}, sampler_name="DDIM"),
    "a guide of own steps": together("chooses its own steps", {"output": ["guide"]}, sampler_name="DPM fast"),
    "a film of own steps": together(
        "film: both needs", {"output": ["animation", "init"], "film": "both"}, sampler_name="DPM adaptive"
    ),
    "a refiner": together(
        "refiner: 'other'", {"mode": "invert"}, refiner_checkpoint="other", refiner_switch_at=0.5
    ),
    "an unknown latent format": together("comfyui knows the latent formats", {"output": ["comfyui"]}),
    "a map without a mask": together("needs an inpaint mask", {"output": ["guide"], "guide_weight": "map"}),
    "a filled map": together(
        "needs masked content", {"output": ["guide"], "guide_weight": "map"},
        nmask=torch.ones(1, 1, 8, 8), inpainting_fill=0,
    ),
    "a cropped map": together(
        "needs inpaint area", {"output": ["guide"], "guide_weight": "map"},
        nmask=torch.ones(1, 1, 8, 8), inpaint_full_res=True,
    ),
    "too many megapixels": together("megapixels; at most", {"steps": 10000}, width=2048, height=2048, by_schedule=True),
    **{
        f"a file: {kind}": together("is not a latents file", {"output": ["init"], "trajectory": name})
        for kind, name in {
            "not there": "no.safetensors",
            "above": "../x.safetensors",
            "far above": "a/../../x.safetensors",
            "from the root": "/etc/passwd",
            "from the root, with the ending": "/etc/x.safetensors",
            "a drive": "C:\\x.safetensors",
            "a drive with slashes": "C:/x.safetensors",
            "a share": "\\\\host\\x.safetensors",
            "a reserved name": "CON.safetensors",
            "percent": "%2e%2e%2fx.safetensors",
            "percent of percent": "%252e%252e/x.safetensors",
            "a NUL": "x\0.safetensors",
            "a home": "~/x.safetensors",
            "a variable": "$HOME/x.safetensors",
            "an address": "file:///x.safetensors",
            "a stream": "x.safetensors:stream.safetensors",
            "another ending": "x.pt",
            "ComfyUI's": "x.latent",
            "no ending": "x",
            "a folder": ".",
            "here": "./x.safetensors",
            "twice a slash": "a//x.safetensors",
            "very long": "x" * 5000 + ".safetensors",
            "a lone surrogate": "\ud800.safetensors",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_is_refused(host: SimpleNamespace, kind: str) -> None:
    asked = REQUESTS[kind]
    said = refused(host, asked.args, **asked.request)
    assert asked.said in said and len(said) < 4000


PREFERENCES = [(f.name, kind) for f in fields(Preferences) for kind in wrong(f)]


@pytest.mark.parametrize(("name", "kind"), PREFERENCES)
def test_a_preference_is_refused(name: str, kind: str) -> None:
    f = {f.name: f for f in fields(Preferences)}[name]
    with pytest.raises(SettingsError, match=rf"^Settings, Batch Unsampler: {name}: .* is not "):
        parse_preferences({name: wrong(f)[kind]})


OWN = {"sampler": "euler", "scheduler": "karras", "model": "gaussian", "seed": "5", "steps": "6", "cfg_scale": "1"}
OWN |= {"denoising_strength": "0.6", "size": "24", "positive": "", "negative": "", "width": "24", "height": "18"}
PAGE = [
    (name, kind)
    for name in (*BOUNDS, "seed", "cfg_scale", "sampler", "scheduler", "model", "positive")
    for kind in ("nothing", "a word", "a list", "a dict", "not a number", "below", "above")
    if (name, kind) not in {("positive", "nothing"), ("positive", "below")}
]
OFTEN = {"nothing": None, "a word": "rubbish", "a list": [1], "a dict": {}, "not a number": "nan", "below": -5,
         "above": 2**70}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), PAGE)
def test_the_page_without_a_webui_refuses_its_own_controls(name: str, kind: str, tmp_path: Path) -> None:
    form = Settings(output=("frames", "init"))
    with pytest.raises(ValueError) as caught:
        Asked({**OWN, name: OFTEN[kind]}, form, tmp_path).check()
    assert name.replace("_", " ") in str(caught.value).replace("_", " ") or name == "cfg_scale"
    assert list(tmp_path.iterdir()) == []


def test_there_are_enough_of_them() -> None:
    """Each is another field or another kind of fault; the same on another surface is not counted."""
    assert len(FIELDS) + len(REQUESTS) + len(PREFERENCES) + len(PAGE) >= 200


# Every parser, of anything

TEXT = st.text(max_size=30) | st.sampled_from(["../x", "a\0b", "%2e%2e", "1_0", "nan", "\u0661", "\ud800"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANYTHING = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
OFTEN_ENOUGH = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@OFTEN_ENOUGH
@given(st.dictionaries(st.sampled_from([*EVERY, "x"]), ANYTHING, max_size=4), st.sampled_from(["host", "cli"]))
def test_settings_are_read_or_refused(values: dict[str, Any], surface: str) -> None:
    try:
        assert isinstance(parse(values, surface), Settings)
    except SettingsError as error:
        assert error.errors and all(": " in line for line in error.errors)


@OFTEN_ENOUGH
@given(st.lists(ANYTHING, max_size=50))
def test_arguments_are_read_or_refused(args: list[Any]) -> None:
    try:
        enabled, asked = parse_args(args, "host")
        assert isinstance(enabled, bool) and isinstance(asked, Settings)
    except SettingsError as error:
        assert error.errors


@OFTEN_ENOUGH
@given(st.dictionaries(st.sampled_from([infotext_key(f) for f in HOST.values()]), TEXT, max_size=5))
def test_parameters_are_pasted_or_said(params: dict[str, str]) -> None:
    values = pasted({VERSION_KEY: "9", **params}, "host")
    assert values is not None and list(values) == list(HOST)


@OFTEN_ENOUGH
@given(TEXT | ANYTHING.map(lambda value: json.dumps(value)) | st.fixed_dictionaries({
    "id": PLAIN, "kind": st.sampled_from(["ask", "choose", "fetch", "x"]), "name": ANYTHING, "step": ANYTHING,
    "values": ANYTHING, "host": ANYTHING, "wants": ANYTHING,
}).map(json.dumps))  # fmt: skip
def test_every_question_has_an_answer(question: str) -> None:
    folder = Path("/nonexistent/of-no-files")
    told = questions.answer(question, lambda: folder, lambda host, form: Asked(host, form, folder)).told
    json.dumps(told)
    assert not folder.exists()


@OFTEN_ENOUGH
@given(st.lists(TEXT | st.sampled_from(["..", "a", "link", "", ".", "x.safetensors"]), max_size=5).map("/".join))
def test_no_name_leads_out_of_a_shelf(name: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "out"
        folder.mkdir()
        (Path(above) / "x.safetensors").write_bytes(b"secret")
        (folder / "link").symlink_to(above)
        (folder / "a").symlink_to(Path(above) / "x.safetensors")
        found = shelf.place(folder, name)
        assert found is None or found.resolve().is_relative_to(folder.resolve())


@OFTEN_ENOUGH
@given(TEXT | st.from_regex(r"bytes=\s?[0-9]{0,20}-[0-9]{0,20}", fullmatch=True), st.integers(0, 10**12))
def test_a_range_lies_within_the_file(asked: str, size: int) -> None:
    part = routes._part(asked, size)
    assert part is None or (part.start >= 0 and part.stop <= max(size, part.start))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("kept") / "t.safetensors"
    schedule = torch.tensor([3.0, 2.0, 1.0, 0.0])
    source = torch.randn(1, 4, 3, 3)
    z = torch.stack([source + s * torch.randn_like(source) for s in (1.0, 2.0, 3.0)])
    about = {"seeds": (1,), "settings": {}, "info": {}, "mask": None}
    trajectory.save(trajectory.of_walk(schedule, [2, 1, 0], z, source, "eps", **about), path)
    return path.read_bytes()


@OFTEN_ENOUGH
@given(data=st.data())
def test_any_bytes_are_a_trajectory_or_refused(whole: bytes, data: st.DataObject, tmp_path: Path) -> None:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([None, 0, 7, 8, 9, 100, len(changed) - 1]))
    path = tmp_path / "t.safetensors"
    path.write_bytes(bytes(changed[:cut]))
    try:
        trajectory.load(path)
    except TrajectoryError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("declared", [2**63 - 1, 2**40, 100_000_001, 10**6])
def test_a_header_s_declared_size_is_not_believed(declared: int, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", declared) + b"{}")
    with pytest.raises(TrajectoryError, match="not a readable trajectory"):
        trajectory.load(path)
    shape = [declared, 1, 4, 3, 3]
    head = json.dumps({"z": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(TrajectoryError, match="not a"):
        trajectory.load(path)


@OFTEN_ENOUGH
@given(TEXT.filter(bool))
def test_a_place_is_a_file_or_a_folder(text: str) -> None:
    place = folders.Place.named(text)
    assert isinstance(place.path, Path) and isinstance(place.folder, bool)
