"""The form: its tables name fields that are there, and what it hides changes nothing."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from lib_unsampler.settings import Settings, form, parse, parse_args, surface_fields, to_infotext
from lib_unsampler.settings.needs import MORE, RECORDS, is_used, ways

FIELDS = {f.name: f for f in surface_fields("host")}


def test_every_field_of_the_form_is_there_once() -> None:
    rows = form.rows()
    assert len(rows) == len(set(rows)) and set(rows) <= set(FIELDS)
    assert set(form.SLIDERS) <= set(FIELDS)


def test_every_need_is_of_a_field_and_a_value_that_there_are() -> None:
    every = {f.name: f for f in fields(Settings)}
    assert set(MORE) <= set(every) and set(RECORDS) <= set(every)
    for f in every.values():
        for need in (need for way in ways(f) for need in way):
            choices = every[need.field].metadata["choices"]
            assert choices is None or set(need.values) <= {*choices, "resample", "report"}, f.name


def test_a_field_of_the_page_can_be_of_use_there() -> None:
    for told in form.described("host", {})["fields"]:
        assert told["ways"], told["name"]


@pytest.mark.parametrize("name", form.PRESETS)
def test_a_preset_is_a_request(name: str) -> None:
    settings = parse(form.preset(name), "host")
    assert all(is_used(FIELDS[field], form.preset(name)) for field in form.PRESETS[name])
    assert name in form.PRESET_HELP and settings != Settings()


def test_a_slider_is_within_its_field_s_bounds() -> None:
    for name, (low, high, _) in form.SLIDERS.items():
        least, most = FIELDS[name].metadata["minimum"], FIELDS[name].metadata["maximum"]
        assert least <= low and (isinstance(high, str) or high <= most)


WORDS: list[tuple[str, str, str]] = [
    ("host", "steps", "automatic"),
    ("host", "end_at_step", "automatic"),
    ("host", "loop", "for ever"),
    ("cli", "steps", "Automatic "),
    ("cli", "resample_cfg", "as cfg"),
]


@pytest.mark.parametrize(("surface", "name", "word"), WORDS)
def test_a_word_is_its_number(surface: str, name: str, word: str) -> None:
    assert parse({name: word}, surface) == Settings() == parse({name: getattr(Settings(), name)}, surface)
    positional = [True, *(word if f.name == name else f.default for f in surface_fields(surface))]
    assert parse_args(positional, surface) == (True, Settings())
    assert to_infotext(replace(Settings(), end_at_step=3), "host") == {"Unsampler end at step": "3"}


@pytest.mark.parametrize("wrong", ["auto", "", "for ever", "-1 (automatic)"])
def test_no_other_word_is(wrong: Any) -> None:
    with pytest.raises(ValueError, match="steps: .* is not automatic"):
        parse({"steps": wrong}, "host")


def test_labels_are_one_line() -> None:
    assert all(len(f.metadata["label"]) <= 30 for f in FIELDS.values())
