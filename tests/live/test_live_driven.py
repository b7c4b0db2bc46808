"""Modes invert and replay in a running WebUI (see test_live.py): the host's own sampler, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_live import (  # noqa: F401 (plain is a fixture)
    URL,
    apart,
    as_base64,
    ask,
    img2img,
    kinds,
    notes,
    opened,
    pixels,
    plain,
    samplers,
    watched,
)

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not URL, reason="WEBUI_URL names no running WebUI"),
]
STOCHASTIC = ("Euler a", "DPM2 a", "DPM++ 2S a", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 3M SDE", "LCM")
DETERMINISTIC = ("Euler", "Heun", "DPM2")
REPLAY = {"mode": "replay", "cfg": 3, "output": ["init", "frames"], "step_increment": 100}
WHOLE = {"mask": None, "denoising_strength": 1.0}
"""The whole picture, encoded by the host, from pure noise."""


def rmse(one: str, other: str) -> float:
    """Root mean square difference of two pictures of a reply, in steps of 255."""
    first, second = (np.asarray(opened(data).convert("RGB"), dtype=float) for data in (one, other))
    return float(np.sqrt(np.mean((first - second) ** 2)))


def same(one: str, other: str) -> bool:
    """Whether two pictures are of the same latents: the host rounds their pixels down, and we to the nearest."""
    return apart(*(opened(data).convert("RGB").tobytes() for data in (one, other))) <= 1


def own_and_source(settings: dict[str, Any], **fields: Any) -> tuple[str, str]:
    """img2img's own picture, sampled from what was made, and the source's own frame."""
    wanted = {"output": ["init", "frames"], "step_increment": 100, **settings}
    reply = img2img(wanted, **{**WHOLE, **fields})
    assert "images" in reply, reply
    return reply["images"][-1], reply["images"][0]


@pytest.mark.parametrize("name", [n for n in samplers() if n in STOCHASTIC])
@pytest.mark.parametrize("cfg", [1, 7])
def test_a_replay_is_the_source(name: str, cfg: float) -> None:
    own, source = own_and_source({"mode": "replay", "cfg": cfg}, sampler_name=name, cfg_scale=cfg)
    assert same(own, source)


@pytest.fixture(scope="module")
def replayed() -> bytes:
    """A repeatable source as *Euler a* gives it back."""
    reply = img2img(REPLAY, sampler_name="Euler a")
    assert same(reply["images"][-1], reply["images"][0])
    return pixels(reply)[-1]


@pytest.mark.parametrize("name", samplers())
def test_every_sampler_gives_the_same_source_back_or_is_refused_by_name(name: str, replayed: bytes) -> None:
    reply = img2img(REPLAY, sampler_name=name)
    if "status" in reply:
        assert reply["status"] == 422 and re.search(r"(sampler|mode|eta|s_noise): |" + re.escape(name), reply["detail"])
        assert name not in STOCHASTIC
        return
    assert pixels(reply)[-1] == replayed


@pytest.fixture
def own_options() -> Iterator[None]:
    """The host's options, put back: it keeps an overridden one that was never set before."""
    before = ask("/sdapi/v1/options")["sd_noise_schedule"]
    yield
    ask("/sdapi/v1/options", {"sd_noise_schedule": before})
    img2img()  # on the model too


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"distilled_cfg_scale": 2}, {"distilled_cfg_scale": 1}),
        tuple({"override_settings": {"sd_noise_schedule": kind}} for kind in ("Zero Terminal SNR", "Default")),
    ],
)
def test_a_file_is_held_to_its_own_request_s_schedule(
    one: dict[str, Any], other: dict[str, Any], own_options: None
) -> None:
    """Whatever schedule the request before had: Neo sets a shift, and all hosts set zero terminal SNR, on the model."""
    fields = {"sampler_name": "Euler", "cfg_scale": 1, "steps": 4}
    highest = img2img({"output": ["frames"]}, **fields)["params"]["Unsampler sigmas"][-1]
    if highest <= 1 and "override_settings" in one:
        pytest.skip("a flow model, for which the hosts themselves fail with zero terminal SNR")
    img2img(**fields, **one)  # A1111 samples the first img2img on the schedule of the request before
    made = img2img({"output": ["init", "latents"]}, **fields, **one)
    (name,) = made["params"]["Unsampler latents names"]
    schedules = [img2img({"output": ["frames"]}, **fields, **which) for which in (other, other, one, one)]
    differ = len({str(reply["params"]["Unsampler sigmas"]) for reply in schedules[1::2]}) == 2
    for which in (one, other):
        img2img(**fields, **which)
        reply = img2img({"output": ["init"], "trajectory": name}, **fields, **which)
        if which is one or not differ:
            assert opened(reply["images"][-1]).tobytes() == opened(made["images"][-1]).tobytes()
        else:
            assert reply["status"] == 422 and "another schedule" in reply["detail"]
    img2img(**fields, **other)


def test_a_replay_with_prompt_editing_two_batches_and_a_mask() -> None:
    half = Image.new("L", (128, 128), 0)
    half.paste(255, (64, 0, 128, 128))
    fields = {"prompt": "a [cat:dog:0.5]", "batch_size": 2, "n_iter": 2, "inpainting_fill": 1}
    settings = {"mode": "replay", "cfg": 3, "output": ["init", "frames"], "step_increment": 100}
    for mask in (None, as_base64(half)):
        reply = img2img(settings, **{**WHOLE, **fields, "mask": mask})
        own, source = reply["images"][-4:], [reply["images"][i] for i, n in enumerate(notes(reply)) if n["sigma"] == 0]
        assert len(source) == 4 and all(same(o, s) for o, s in zip(own, source))


def test_another_prompt_edits_and_skip_keeps_more() -> None:
    made = [
        rmse(*own_and_source({"mode": "replay", "cfg": 3, "positive": "a cat", "skip": skip}, prompt="a red dog"))
        for skip in (0, 4)
    ]
    assert made[0] > made[1] > 0


def test_a_later_request_replays_the_file() -> None:
    first = img2img({"mode": "replay", "cfg": 3, "output": ["latents", "frames"]}, **WHOLE)
    (name,) = first["params"]["Unsampler latents names"]
    later = img2img({"mode": "replay", "output": ["init"], "trajectory": name}, **WHOLE, batch_size=2, seed=99)
    assert len(later["images"]) == 2 and all(same(image, first["images"][0]) for image in later["images"])


def test_a_later_request_edits_by_the_file_as_its_own_request_did() -> None:
    """Also where the model is shown the picture beside the prompt (Neo's Flux.2-Klein): prompts for the source make
    conditions anew in the first request, and none in the later one."""
    recorded = {"mode": "replay", "cfg": 3, "positive": "a red dog", "output": ["latents", "init"]}
    img2img(prompt="another")  # the host keeps conditions from request to request
    first = img2img(recorded, **WHOLE)
    img2img(prompt="another")
    (name,) = first["params"]["Unsampler latents names"]
    later = img2img({"mode": "replay", "output": ["init"], "trajectory": name}, **WHOLE)
    assert apart(pixels(later)[-1], pixels(first)[-1]) <= 1


@pytest.mark.parametrize("name", [n for n in samplers() if n in DETERMINISTIC])
def test_an_exact_inversion_comes_back_nearer_than_reverse_and_noise(name: str) -> None:
    runs = ({"mode": "invert"}, {"mode": "invert", "solver": "reverse"}, {})
    exact, reverse, noise = (rmse(*own_and_source(run, sampler_name=name, cfg_scale=1, steps=12)) for run in runs)
    assert exact < reverse < noise


def test_twenty_steps_come_back_within_one_of_255() -> None:
    assert rmse(*own_and_source({"mode": "invert"}, sampler_name="Euler", cfg_scale=1, steps=20)) <= 1


def test_what_an_inversion_tells_and_shows() -> None:
    settings = {"mode": "invert", "output": ["frames"], "panel": True, "report": True}
    reply = img2img(settings, **WHOLE, sampler_name="Euler", cfg_scale=1, batch_size=2)
    assert kinds(reply) == ["report"] * 2 + ["frame"] * 14
    assert opened(reply["images"][2]).size == (384, 128)
    (levels,) = reply["params"]["Unsampler inversion"]
    assert [level["step"] for level in levels] == [5, 4, 3, 2, 1, 0]
    assert all(len(level["residual"]) == len(level["calls"]) == 2 for level in levels)
    assert "latents dB" in notes(reply)[0] and "codec dB" in notes(reply)[0]


@pytest.mark.parametrize("name", [n for n in samplers() if n in STOCHASTIC and n != "LCM"])
def test_a_stochastic_sampler_is_inverted_as_its_kin_with_a_message(name: str) -> None:
    reply = img2img({"mode": "invert", "solver": "reverse", "output": ["frames"]}, **WHOLE, sampler_name=name, steps=4)
    assert any("inverted (reverse) as" in text for text in reply["params"]["Unsampler messages"])


@pytest.mark.parametrize(
    ("settings", "fields", "said"),
    [
        ({"mode": "replay"}, {"sampler_name": "Euler"}, "euler"),
        ({"mode": "invert"}, {"sampler_name": "DPM adaptive"}, "dpm_adaptive"),
        ({"mode": "invert"}, {"sampler_name": "DDIM"}, "DDIM"),
        ({"mode": "replay"}, {"sampler_name": "UniPC"}, "UniPC"),
        ({"mode": "invert", "noise": "path"}, {}, "noise"),
        ({"mode": "invert", "cfg": 101}, {}, "cfg"),
    ],
)
def test_what_cannot_be_driven_is_refused(settings: dict[str, Any], fields: dict[str, Any], said: str) -> None:
    if fields and fields["sampler_name"] not in samplers():
        pytest.skip(f"this WebUI has no {fields['sampler_name']}")
    reply = img2img(settings, **fields)
    assert reply["status"] == 422 and said.lower() in reply["detail"].lower()


def test_interrupting_an_inversion_leaves_nothing(plain: list[bytes]) -> None:  # noqa: F811
    settings = {"mode": "invert", "output": ["frames"]}
    reply, progress = watched("interrupt", settings, **WHOLE, sampler_name="Euler", steps=60, cfg_scale=7)
    assert "Inverting: level" in progress["textinfo"] and "model calls" in progress["textinfo"]
    assert 0 < progress["progress"] < 1
    assert len(reply["images"]) < 61
    assert pixels(img2img()) == plain


def test_plain_img2img_is_what_it_was(plain: list[bytes]) -> None:  # noqa: F811
    assert pixels(img2img()) == plain
