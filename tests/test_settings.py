"""Settings: every field says what it allows, every bad input is answered by name and all at once,
and infotext carries every valid setting there and back."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_unsampler.settings import (
    SAMPLERS,
    STOCHASTIC,
    Pasted,
    Settings,
    SettingsError,
    allowed,
    from_infotext,
    infotext_key,
    parse,
    parse_args,
    surface_fields,
    to_infotext,
)

SURFACES = ("cli", "host")
EVERY = [(s, f) for s in SURFACES for f in surface_fields(s)]
NUMBERS = [(s, f) for s, f in EVERY if type(f.default) in (int, float)]
NOT_A_NUMBER = ["", "many", "1,5", "1_0", "nan", "0x10", None, True, False, [], {}, math.nan, math.inf, -math.inf]


def by_id(case: tuple[str, Any]) -> str:
    return f"{case[0]}-{case[1].name}"


def values_of(f: Any) -> st.SearchStrategy[Any]:
    """Every valid value of a field, from its own metadata."""
    low, high, choices = (f.metadata[k] for k in ("minimum", "maximum", "choices"))
    kind = type(f.default)
    if kind is tuple:
        return st.sets(st.sampled_from(choices), min_size=1).map(lambda s: tuple(c for c in choices if c in s))
    if choices:
        return st.sampled_from(choices)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(low, high)
    return st.floats(low, high) if kind is float else st.text()


def requests(surface: str) -> st.SearchStrategy[dict[str, Any]]:
    every = st.fixed_dictionaries({f.name: values_of(f) for f in surface_fields(surface)})
    return every.map(without_contradictions)


def without_contradictions(values: dict[str, Any]) -> dict[str, Any]:
    """What parse would refuse for the sake of another field, put right."""
    mended = {**values, **({"end_at_step": -1} if values.get("end_at_sigma") else {})}
    wanted = set(values.get("output", ()))
    if "guide" in wanted or values.get("guide"):
        low, high = sorted((values["guide_from"], values["guide_until"]))
        mended |= {"guide_from": low, "guide_until": high, "noise": "shared"}
        mended |= {"mode": "noise"} if values["mode"] == "replay" else {}
    if "strength sweep" in wanted:
        mended |= {"film": "noising", **({"mode": "noise"} if values["mode"] == "replay" else {})}
        mended["output"] = tuple(name for name in values["output"] if name != "guide")
    if wanted & {"init", "guide", "strength sweep"}:
        mended["steps"] = 0
    if mended.get("trajectory"):
        own = {"steps": 0, "end_at_step": -1, "step_increment": 1, "noise": "shared", "normalize": False}
        own |= {"end_at_sigma": 0.0} if "end_at_sigma" in mended else {}
        mended |= own | ({"mode": "noise"} if mended["mode"] == "invert" else {})
    mended |= {"panel": False} if mended.get("film", "noising") != "noising" and "panel" in mended else {}
    if mended["mode"] == "invert":
        return {**mended, "noise": "shared", "normalize": False, "skip": 0}
    mended |= {name: False for name in ("panel", "report") if name in mended}
    if mended["mode"] == "replay":
        return {**mended, "noise": "independent", **({"sampler": "dpmpp_sde"} if "sampler" in mended else {})}
    return {**mended, "skip": 0}


def errors_of(values: dict[str, Any], surface: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse(values, surface)
    assert str(caught.value) == "; ".join(caught.value.errors)
    return caught.value.errors


def assert_refused(f: Any, surface: str, value: Any) -> None:
    (error,) = errors_of({f.name: value}, surface)
    assert error.startswith(f"{f.name}: ") and repr(value) in error and allowed(f) in error


@pytest.mark.parametrize("case", EVERY, ids=by_id)
def test_every_default_is_allowed_and_documented(case: tuple[str, Any]) -> None:
    surface, f = case
    assert getattr(parse({f.name: f.default}, surface), f.name) == f.default
    assert f.metadata["label"] and f.metadata["help"].endswith(".")


@pytest.mark.parametrize("case", NUMBERS, ids=by_id)
def test_bounds_are_allowed_and_one_beyond_is_not(case: tuple[str, Any]) -> None:
    surface, f = case
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    mode = {"mode": "replay", **({"sampler": "dpmpp_sde"} if surface == "cli" else {})} if f.name == "skip" else {}
    for value in (low, high, str(low), str(high)):
        assert getattr(parse({**mode, f.name: value}, surface), f.name) == type(f.default)(value)
    whole = type(f.default) is int
    below, above = (low - 1, high + 1) if whole else (math.nextafter(low, -math.inf), math.nextafter(high, math.inf))
    for value in (below, above, str(below), 10**400):
        assert_refused(f, surface, value)


@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=repr)
@pytest.mark.parametrize("case", NUMBERS, ids=by_id)
def test_what_is_no_number_is_refused(case: tuple[str, Any], value: Any) -> None:
    assert_refused(case[1], case[0], value)


def test_a_whole_float_is_a_whole_number_and_a_broken_one_is_not() -> None:
    steps = parse({"steps": 7.0}, "cli").steps
    assert steps == 7 and type(steps) is int
    assert errors_of({"steps": 7.5}, "cli") and errors_of({"steps": "7.5"}, "cli")


@pytest.mark.parametrize("value", ["yes", "1", 0, 1, 1.0, None, "", []], ids=repr)
@pytest.mark.parametrize("case", [c for c in EVERY if type(c[1].default) is bool], ids=by_id)
def test_what_is_neither_true_nor_false_is_refused(case: tuple[str, Any], value: Any) -> None:
    assert_refused(case[1], case[0], value)


@pytest.mark.parametrize("value", ["nothing like it", "", None, 3, True, ["euler"]], ids=repr)
@pytest.mark.parametrize("case", [c for c in EVERY if c[1].metadata["choices"]], ids=by_id)
def test_what_is_no_choice_is_refused(case: tuple[str, Any], value: Any) -> None:
    assert_refused(case[1], case[0], value)


@pytest.mark.parametrize("value", [None, 3, True, ["sea"], b"sea"], ids=repr)
@pytest.mark.parametrize("name", ["positive", "negative"])
def test_a_prompt_is_text(name: str, value: Any) -> None:
    (error,) = errors_of({name: value}, "cli")
    assert error == f"{name}: {value!r} is not text"


@pytest.mark.parametrize("value", [[], (), "", ",", ["frames", "nothing"], ["frames", 3], {"frames": 1}], ids=repr)
def test_output_needs_known_names(value: Any) -> None:
    assert_refused(surface_fields("host")[0], "host", value)


def test_output_is_in_one_order_however_it_is_given() -> None:
    for value in (["latents", "frames"], ("frames", "latents", "frames"), "latents, frames"):
        assert parse({"output": value}, "host").output == ("frames", "latents")


@pytest.mark.parametrize("surface", SURFACES)
def test_a_field_of_the_other_surface_is_unknown(surface: str) -> None:
    names = [f.name for f in surface_fields(surface)]
    others = {f.name for _, f in EVERY} - set(names)
    for name in [*others, "nothing", "Steps", "enabled"]:
        (error,) = errors_of({name: 1}, surface)
        assert error == f"{name}: unknown field (known: {', '.join(names)})"


def test_all_errors_come_at_once() -> None:
    bad = {"steps": "many", "noise": "loud", "sed": 3, "duration": math.nan, "cfg": 101, "normalize": "maybe"}
    errors = errors_of({**bad, "sampler": "heun"}, "cli")
    assert [e.split(":")[0] for e in errors] == list(bad)


def test_init_refuses_own_steps_by_name() -> None:
    (error,) = errors_of({"output": ["init", "frames"], "steps": 20}, "host")
    assert error.startswith("steps: 20 is not 0")
    assert parse({"output": ["init"], "steps": 0, "end_at_step": 3}, "host").end_at_step == 3
    assert parse({"output": ["frames"], "steps": 20}, "host").steps == 20


@pytest.mark.parametrize(
    ("field", "value", "mode"),
    [
        ("noise", "path", "invert"),
        ("noise", "independent", "invert"),
        ("normalize", True, "invert"),
        ("panel", True, "noise"),
        ("report", True, "noise"),
    ],
)
def test_what_does_not_go_with_the_mode_is_refused_by_name(field: str, value: Any, mode: str) -> None:
    (error,) = errors_of({field: value, "mode": mode}, "host")
    assert error.startswith(f"{field}: ") and "mode invert" in error
    other = {"invert": "noise", "noise": "invert"}[mode]
    assert getattr(parse({field: value, "mode": other}, "host"), field) == value


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mode": "replay", "noise": "path"}, "noise: 'path' is not independent"),
        ({"skip": 3}, "skip: 3 needs mode replay"),
        ({"mode": "invert", "skip": 3}, "skip: 3 needs mode replay"),
        ({"mode": "replay", "panel": True}, "panel: true needs mode invert"),
    ],
)
def test_what_replay_cannot_have_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    (error,) = errors_of(values, "host")
    assert error.startswith(said)


@pytest.mark.parametrize("noise", [{}, {"noise": "shared"}, {"noise": "independent"}])
def test_replay_s_noise_is_independent(noise: dict[str, Any]) -> None:
    """The accordion sends every field, so the default stands for no choice."""
    assert parse({"mode": "replay", **noise}, "host").noise == "independent"


def test_on_the_command_line_replay_needs_a_sampler_with_noise() -> None:
    for sampler in SAMPLERS:
        if sampler in STOCHASTIC:
            assert parse({"mode": "replay", "sampler": sampler}, "cli").sampler == sampler
        else:
            (error,) = errors_of({"mode": "replay", "sampler": sampler}, "cli")
            assert error.startswith(f"sampler: {sampler!r} adds no noise") and "dpmpp_sde" in error


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("surface", SURFACES)
def test_positional_and_dict_arguments_agree(surface: str) -> None:
    wanted = replace(Settings(), steps=9, noise="path", normalize=True, duration=0.25)
    values = {f.name: getattr(wanted, f.name) for f in surface_fields(surface)}
    assert parse_args([True, *values.values()], surface) == (True, wanted)
    assert parse_args([values], surface) == (True, wanted)
    behind = [f.default for f in surface_fields(surface)]  # as the host fills up what is missing
    assert parse_args([{**values, "enabled": True}, *behind], surface) == (True, wanted)


def test_missing_arguments_are_defaults() -> None:
    assert parse_args([], "host") == (False, Settings())
    assert parse_args([True], "host") == (True, Settings())
    assert parse_args([True, ["latents"]], "host") == (True, Settings(output=("latents",)))
    assert parse_args([{}], "host") == (True, Settings())
    assert parse_args([False, "rubbish"], "host") == (False, Settings())
    assert parse_args([{"enabled": False}], "host") == (False, Settings())


@pytest.mark.parametrize("args", [["yes"], [None], [1, ["frames"]], [{"enabled": "true"}]], ids=repr)
def test_enabled_is_true_or_false(args: list[Any]) -> None:
    with pytest.raises(SettingsError, match="^enabled: .* is not true or false$"):
        parse_args(args, "host")


def test_too_many_arguments_are_refused() -> None:
    known = [True, *(f.default for f in surface_fields("host"))]
    assert parse_args(known, "host") == (True, Settings())
    with pytest.raises(SettingsError, match=f"^args: {len(known) + 1} values where at most {len(known)} are known$"):
        parse_args([*known, 0], "host")


@pytest.mark.parametrize("surface", SURFACES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_infotext_carries_every_setting_there_and_back(surface: str, data: st.DataObject) -> None:
    wanted = parse(data.draw(requests(surface)), surface)
    text = to_infotext(wanted, surface)
    assert all(type(v) is str for v in text.values())
    said = replace(wanted, reply=Settings.reply)  # that is no picture's
    assert from_infotext({"Steps": "20", "Seed": "1", **text}, surface) == said
    different = {f.name for f in surface_fields(surface) if getattr(said, f.name) != f.default}
    assert len(text) == len(different)


@pytest.mark.parametrize("surface", SURFACES)
def test_infotext_keys_differ_and_defaults_are_not_written(surface: str) -> None:
    assert to_infotext(Settings(), surface) == {}
    keys = [infotext_key(f) for f in surface_fields(surface)]
    assert len(set(keys)) == len(keys)
    assert not any(c in key for key in keys for c in ",:")


def test_edited_infotext_is_refused_by_field() -> None:
    edited = dict.fromkeys(to_infotext(Settings(steps=3, noise="path"), "host"), "rubbish")
    with pytest.raises(SettingsError) as caught:
        from_infotext(edited, "host")
    assert [e.split(":")[0] for e in caught.value.errors] == ["steps", "noise"]


@pytest.mark.parametrize(
    ("behind", "named"),
    [
        ([5], ["output: 5"]),
        ([{"steps": 3}], ["output: {'steps': 3}"]),
        (["ignored"], ["output: 'ignored'"]),
        ([None], ["output: None"]),
        ([["frames"]], ["output: ['frames']"]),
        ([["frames", "animation"], 0, 3, 1, "path"], ["end_at_step: 3", "noise: 'path'"]),
        ([["frames", "animation"], False], ["steps: False"]),
    ],
    ids=repr,
)
def test_what_stands_behind_a_dict_is_refused_by_name(behind: list[Any], named: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_args([{"noise": "path"}, *behind], "host")
    assert len(caught.value.errors) == len(named)
    for error, name in zip(caught.value.errors, named):
        assert error.startswith(f"{name} stands behind a dict")


@pytest.mark.parametrize("surface", SURFACES)
def test_every_field_behind_a_dict_may_be_its_default_and_no_other(surface: str) -> None:
    defaults = [list(f.default) if type(f.default) is tuple else f.default for f in surface_fields(surface)]
    for i, f in enumerate(surface_fields(surface)):
        assert parse_args([{}, *defaults[: i + 1]], surface) == (True, Settings())
        with pytest.raises(SettingsError, match=f"^{f.name}: "):
            parse_args([{}, *defaults[:i], [["no such thing"]]], surface)
    with pytest.raises(SettingsError, match="^args: "):
        parse_args([{}, *defaults, 0], surface)


def test_behind_a_dict_the_host_s_other_defaults_and_pasted_ones_may_stand() -> None:
    names = [f.name for f in surface_fields("host")]
    rest = [f.default for f in surface_fields("host")]
    rest[names.index("duration")], rest[names.index("format")] = 0.5, "webp"
    defaults, earlier = {"duration": 0.25, "format": "webp"}, {"duration": [0.1, 0.5]}
    assert parse_args([{}, *rest], "host", defaults, earlier)[1] == replace(Settings(), **defaults)
    with pytest.raises(SettingsError, match=r"^duration: 0.5 stands behind"):
        parse_args([{}, *rest], "host", defaults)
    pasted_ones = [Pasted(["latents"]), *(f.metadata["maximum"] for f in surface_fields("host")[1:4])]
    assert parse_args([{"noise": "path"}, *pasted_ones], "host") == (True, replace(Settings(), noise="path"))
    assert parse_args([{"enabled": False}, 5, "rubbish"], "host") == (False, Settings())


@pytest.mark.parametrize("case", NUMBERS, ids=by_id)
def test_a_cleared_number_is_called_empty(case: tuple[str, Any]) -> None:
    surface, f = case
    (error,) = errors_of({f.name: None}, surface)
    assert error == f"{f.name}: None (empty) is not {allowed(f)}"
