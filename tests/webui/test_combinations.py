"""Every output with every mode, noise and film: refused by name before work, or made, and made as what it says."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from lib_unsampler.settings import OUTPUTS, Settings, SettingsError, parse

MODES, NOISES, FILMS = ("noise", "invert", "replay"), ("shared", "independent", "path"), ("noising", "sampling", "both")
EVERY = list(product(OUTPUTS, MODES, NOISES, FILMS))
SAMPLED = ("init", "guide", "strength sweep")


def refused(output: str, mode: str, noise: str, film: str) -> bool:
    """The table, in words of its own: what cannot be."""
    return (
        (mode == "invert" and noise != "shared")
        or (mode == "replay" and noise == "path")
        or (output == "guide" and (mode == "replay" or noise != "shared"))
        or (output == "strength sweep" and (mode == "replay" or film != "noising"))
    )


@pytest.mark.parametrize("case", EVERY, ids=lambda case: " ".join(case))
def test_the_table_is_what_parse_refuses(case: tuple[str, str, str, str]) -> None:
    values = dict(zip(("output", "mode", "noise", "film"), ([case[0]], *case[1:])))
    if refused(*case):
        with pytest.raises(SettingsError):
            parse(values, "host")
    else:
        assert isinstance(parse(values, "host"), Settings)


def kinds(processed: Any) -> set[str]:
    return {note["kind"] for note in processed.extra_generation_params["Unsampler images"]}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.one_of(2)
def test_what_is_not_refused_is_made(host: SimpleNamespace, output: str) -> None:
    host.make().sd_model.scale_factor = 0.18215
    kind = {"frames": "frame", "strength sweep": "sweep"}.get(output, output)
    for mode, noise, film in product(MODES, NOISES, FILMS):
        settings = {"output": [output], "mode": mode, "noise": noise, "film": film, "max_calls": 8}
        fields = {"steps": 5, "sampler_name": "Euler a" if mode == "replay" else "Euler"}
        if refused(output, mode, noise, film):
            with pytest.raises(HTTPException) as error:
                host.run(settings, **fields)
            assert error.value.status_code == 422
            continue
        p, processed = host.run(settings, **fields)
        if output in ("latents", "comfyui"):
            assert processed.extra_generation_params[f"Unsampler {output}"], settings
        elif output in ("init", "guide"):
            assert len(processed.images) == 1 and kinds(processed) == set(), settings
        else:
            assert kind in kinds(processed), settings
        assert getattr(p.latest_samples, "already_decoded", False) is (output not in SAMPLED), settings


@pytest.mark.parametrize(("mode", "film"), list(product(MODES, FILMS)))
def test_films_beside_what_samples(host: SimpleNamespace, mode: str, film: str) -> None:
    settings = {"output": ["frames", "animation", "init"], "mode": mode, "film": film}
    processed = host.run(settings, sampler_name="Euler a" if mode == "replay" else "Euler")[1]
    parts = [n.get("part", "noising") for n in processed.extra_generation_params["Unsampler images"]]
    assert ("sampling" in parts) is (film != "noising") and parts.count("result") == (film != "noising")
