"""What is asked for and changes nothing is said: by the fields' own table, the same on every surface."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from lib_unsampler.settings import OUTPUTS, Settings, remarks
from lib_unsampler.settings.effects import clamped
from lib_unsampler.standalone.cli import FIELDS, main

Capture = pytest.CaptureFixture[str]


def said(values: dict[str, Any], outputs: tuple[str, ...], **options: Any) -> list[str]:
    return remarks(Settings(**values), set(values), outputs, **options)


CASES = [
    ({"solver": "reverse"}, ("frames",), "solver: has no effect in mode noise"),
    ({"tolerance": 1e-3}, ("frames",), "tolerance: has no effect in mode noise"),
    ({"mode": "invert", "solver": "reverse", "max_calls": 3}, ("frames",), "max_calls: has no effect with solver"),
    ({"cfg": 3.0}, ("frames",), "cfg: has no effect in mode noise"),
    ({"positive": "sea"}, ("frames", "init"), "positive: has no effect in mode noise"),
    ({"sampler": "heun"}, ("frames",), "sampler: has no effect in mode noise"),
    ({"mode": "invert", "seed": 3}, ("frames",), "seed: has no effect in mode invert"),
    ({"mode": "invert", "negative": "sea"}, ("frames",), "negative: has no effect at cfg 1"),
    ({"mode": "replay", "cfg": 3.0}, ("frames",), "cfg: has no effect without init or latents, for which"),
    ({"mode": "replay", "cfg": 3.0, "trajectory": "t"}, ("init",), "cfg: has no effect with trajectory"),
    ({"duration": 1.0}, ("latents",), "duration: has no effect without animation"),
    ({"loop": 1}, ("frames",), "loop: has no effect without animation"),
    ({"captions": True}, ("contact sheet",), "captions: has no effect without frames or animation"),
    ({"view": "raw"}, ("latents", "sigma curve"), "view: has no effect without frames or animation or contact sheet"),
    ({"step_increment": 3}, ("init",), "step_increment: has no effect without frames or"),
    ({"resample_cfg": 3.0}, ("frames",), "resample_cfg: has no effect without resample"),
    ({"resample_negative": "sea"}, ("resample",), "resample_negative: has no effect at cfg 1"),
    ({"guide_alpha": 1.0}, ("frames", "init"), "guide_alpha: has no effect without guide"),
    ({"guide_alpha": 1.0}, ("resample",), "guide_alpha: has no effect without guide"),
    ({"film": "both"}, ("frames",), "film: has no effect without init or guide"),
    ({"film": "both"}, ("init",), "film: has no effect without frames or animation or contact sheet"),
    ({"film_view": "estimate"}, ("init", "frames"), "film_view: has no effect with film noising"),
]


@pytest.mark.parametrize(("values", "outputs", "wanted"), CASES)
def test_a_field_without_effect_is_named_with_the_reason(
    values: dict[str, Any], outputs: tuple[str, ...], wanted: str
) -> None:
    (line,) = [line for line in said(values, outputs) if line.startswith(wanted.partition(":")[0])]
    assert line.startswith(wanted)


USED = [
    ({"cfg": 3.0, "positive": "sea", "negative": "night", "sampler": "heun"}, ("resample",)),
    ({"mode": "invert", "solver": "exact", "tolerance": 1e-3, "max_calls": 3, "panel": True}, ("frames",)),
    ({"mode": "replay", "skip": 2, "cfg": 2.0, "negative": "sea", "seed": 4}, ("latents",)),
    ({"duration": 1.0, "timing": "log sigma", "reverse": True, "format": "webp"}, ("animation",)),
    ({"negative": "sea", "resample_cfg": 3.0}, ("resample",)),
    ({"steps": 4, "end_at_step": 2, "noise": "path", "normalize": True}, ("init",)),
]


@pytest.mark.parametrize(("values", "outputs"), USED)
def test_a_field_that_is_used_is_not_named(values: dict[str, Any], outputs: tuple[str, ...]) -> None:
    assert said(values, outputs) == []


def test_on_a_saved_trajectory_only_what_is_made_from_it_counts() -> None:
    values = {"mode": "invert", "positive": "sea", "sampler": "heun"}
    assert [line.split(":")[0] for line in said(values, ("frames",), walked=False)] == ["sampler", "positive"]
    assert said(values, ("resample",), walked=False) == []
    assert said({"mode": "replay", "skip": 3}, ("resample",), walked=False) == []


def test_the_table_names_only_modes_and_outputs_that_there_are() -> None:
    for f in fields(Settings):
        assert set(f.metadata["modes"]) <= {"noise", "invert", "replay"}, f.name
        assert set(f.metadata["outputs"]) <= {*OUTPUTS, "resample", "report"}, f.name


def test_counts_beyond_the_schedule_are_said_with_what_is_taken() -> None:
    assert clamped(Settings(end_at_step=4), 5) == []
    assert clamped(Settings(end_at_step=5), 5) == [
        "end_at_step: 5 is not one of the 5 steps; 4 is taken, so that a level remains"
    ]
    assert clamped(Settings(mode="replay", skip=2, end_at_step=2), 5) == []
    assert clamped(Settings(mode="replay", skip=3, end_at_step=2), 5) == [
        "skip: 3 is not below the 3 steps; 2 is taken, so that one remains"
    ]


# On the command line, against what is really made

CHANGED: dict[str, Any] = {
    "steps": 3,
    "end_at_step": 1,
    "step_increment": 2,
    "noise": "path",
    "view": "raw",
    "timing": "log sigma",
    "format": "webp",
    "mode": "invert",
    "sampler": "heun",
    "scheduler": "exponential",
    "model": "gaussian-flow",
    "solver": "reverse",
    "skip": 1,
    "film": "both",
    "film_view": "estimate",
    "guide_strength": 0.5,
    "guide_from": 0.5,
    "guide_until": 0.0,
}


def other(f: Any) -> Any:
    if f.name in CHANGED:
        return CHANGED[f.name]
    if isinstance(f.default, bool):
        return not f.default
    return "sea" if isinstance(f.default, str) else 2


BASES = {
    "frames": ((), ("--frames", "f")),
    "animation": ((), ("-o", "x.gif")),
    "latents": ((), ("--latents", "t.safetensors")),
    "curve": ((), ("--curve", "c.png")),
    "resample": (("--sampler", "euler_ancestral"), ("--resample", "r.png")),
    "invert": (("--mode", "invert"), ("--frames", "f")),
    "replay": (("--mode", "replay", "--sampler", "euler_ancestral"), ("--resample", "r.png")),
    "guide": (("--guide",), ("--resample", "r.png")),
    "film": (("--film", "both"), ("--resample", "r.png", "--frames", "f")),
    "sweep": (("--sampler", "euler_ancestral"), ("--sweep", "s.gif")),
    "swept": (("--sampler", "euler_ancestral"), ("--sweep", "s")),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.one_of(2)
def test_what_is_said_to_have_no_effect_has_none(
    base: str, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Every option alone, on every kind of run: the pictures and tensors are the same if and only if it is said."""
    options, outputs = BASES[base]
    made: dict[str, dict[str, bytes]] = {}

    def run(name: str, *more: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            main([str(a) for a in (picture, *options, *outputs, "--steps", 4, *more)])
        except SystemExit:
            return "refused"
        finally:
            err = capsys.readouterr().err
        made[name] = contents(folder)
        return err

    run("plain")
    for f in fields(Settings):
        if f.name == "steps" or "cli" not in f.metadata["surfaces"] or FIELDS[f.name] in options:
            continue
        value = other(f)
        words = [FIELDS[f.name] if value else "--no-" + FIELDS[f.name][2:]] if isinstance(value, bool) else []
        err = run(f.name, *(words or [FIELDS[f.name], value]))
        if err != "refused":
            told = f"{FIELDS[f.name]}: has no effect" in err
            assert told == (made[f.name] == made["plain"]) or f.name in MAY_BE_EQUAL, (f.name, err)


MAY_BE_EQUAL = {
    *("tolerance", "max_calls", "hold_first", "hold_last", "normalize", "skip", "seed", "positive", "noise", "cfg"),
    *(
        "negative",
        "resample_negative",
        "end_at_step",
        "end_at_sigma",
        "scheduler",
        "sampler",
        "solver",
        "resample_cfg",
        "mode",
        "max_megabytes",
    ),
}
"""What may change no byte: guidance towards the same prompt, a solver that is done before its limit, the picture that
replay gives back, a limit that the file keeps anyway."""


def contents(folder: Path) -> dict[str, Any]:
    """What was made: pixels, times and tensors, without the text that names the settings."""
    from PIL import Image
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            found[path.name] = {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        elif path.is_file():
            with Image.open(path) as picture:
                frames = []
                for number in range(getattr(picture, "n_frames", 1)):
                    picture.seek(number)
                    frames.append((picture.convert("RGB").tobytes(), picture.info.get("duration")))
                found[path.name] = (frames, picture.info.get("loop"))
    return found
