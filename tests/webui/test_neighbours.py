"""Other extensions that change the same request, loaded before us and after us."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubled import pixels, reset_state

Neighbour = Callable[[SimpleNamespace, list[str]], Any]


def patches_sample(host: SimpleNamespace, seen: list[str]) -> Any:
    """As MultiDiffusion does, on the request itself."""

    class Script:
        def process(self, p: Any) -> None:
            own = p.sample

            def sample(*args: Any, **kwargs: Any) -> Any:
                seen.append("sample")
                return own(*args, **kwargs)

            p.sample = sample

    return Script()


def patches_create_sampler(host: SimpleNamespace, seen: list[str]) -> Any:
    """As samplers' extensions do, for every request from then on; the sampler's function is theirs."""

    class Script:
        def process(self, p: Any) -> None:
            if hasattr(host.sd_samplers, "own_create_sampler"):
                return
            own = host.sd_samplers.own_create_sampler = host.sd_samplers.create_sampler

            def create(name: str, model: Any) -> Any:
                sampler = own(name, model)
                function = sampler.func

                def func(*args: Any, **kwargs: Any) -> Any:
                    seen.append("func")
                    return function(*args, **kwargs)

                func.__wrapped__ = function
                sampler.func = func
                return sampler

            host.sd_samplers.create_sampler = create

    return Script()


def patches_the_model(host: SimpleNamespace, seen: list[str]) -> Any:
    """As attention's extensions do: while the request runs, the model answers otherwise."""
    from modules.sd_samplers_cfg_denoiser import CFGDenoiser

    own = CFGDenoiser.forward

    class Script:
        def process(self, p: Any) -> None:
            def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append("model")
                return own(self, x, *args, **kwargs) * 0.9

            CFGDenoiser.forward = forward

        def postprocess(self, p: Any, processed: Any) -> None:
            CFGDenoiser.forward = own

    return Script()


def changes_as_it_goes(host: SimpleNamespace, seen: list[str]) -> Any:
    """As LoRA block weight does: from a step on the model is another one, until the next sampling is announced.

    At the first it is told of the networks, so the steps it waits for are those of the networks of then.
    """
    from modules.sd_samplers_cfg_denoiser import CFGDenoiser

    own = CFGDenoiser.forward

    class Script:
        late = armed = False

        def process(self, p: Any) -> None:
            def forward(denoiser: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append("late" if self.late else "early")
                self.late |= self.armed and host.shared.state.sampling_step > 1
                return own(denoiser, x, *args, **kwargs) * (0.9 if self.late else 1)

            CFGDenoiser.forward = forward

        def after_extra_networks_activate(self, p: Any, **kwargs: Any) -> None:
            self.armed = True

        def process_before_every_sampling(self, p: Any, **kwargs: Any) -> None:
            assert self.armed
            self.late = False

        def postprocess(self, p: Any, processed: Any) -> None:
            CFGDenoiser.forward = own

    return Script()


def makes_inner_requests(host: SimpleNamespace, seen: list[str]) -> Any:
    """As ADetailer does: an img2img of its own, of a copy of the request, from each finished picture."""

    class Script:
        def postprocess_image(self, p: Any, pp: Any) -> None:
            if seen.count("inner") % 2 or getattr(p, "_inner", False):
                return
            seen.append("inner")
            inner = copy.copy(p)
            inner._inner, inner.init_images, inner.batch_size, inner.n_iter = True, [pp.image], 1, 1
            inner.do_not_save_samples = True
            with closing(inner):
                kept = [getattr(p, name) for name in ("iteration", "prompts", "seeds", "subseeds", "rng")]
                (pp.image,) = host.processing.process_images(inner).images
            assert kept == [getattr(p, name) for name in ("iteration", "prompts", "seeds", "subseeds", "rng")]
            seen.append("inner")

    return Script()


NEIGHBOURS: dict[str, Neighbour] = {
    "p.sample": patches_sample,
    "create_sampler": patches_create_sampler,
    "the model": patches_the_model,
    "a model that changes": changes_as_it_goes,
    "inner requests": makes_inner_requests,
}


@pytest.fixture(params=["before us", "after us"])
def beside(request: pytest.FixtureRequest, host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Loads a neighbour; the host calls scripts in the order of loading."""
    create = host.sd_samplers.create_sampler

    def load(kind: str) -> list[str]:
        seen: list[str] = []
        neighbour = NEIGHBOURS[kind](host, seen)
        scripts = [neighbour, host.script] if request.param == "before us" else [host.script, neighbour]

        def call(name: str, p: Any, *more: Any, **kwargs: Any) -> None:
            for script in [script for script in scripts if hasattr(script, name)]:
                try:
                    args = p.script_args[1:] if script is host.script else ()
                    getattr(script, name)(p, *more, *args, **kwargs)
                except Exception as error:
                    host.runner.swallowed.append(error)

        monkeypatch.setattr(host.runner, "call", call)
        return seen

    yield load
    host.sd_samplers.create_sampler = create
    assert host.runner.swallowed == []


REQUESTS: dict[str, dict[str, Any]] = {
    "init": {"output": ["init", "frames"]},
    "frames": {"output": ["frames"], "noise": "path"},
    "inversion": {"output": ["init", "frames"], "mode": "invert"},
    "guide": {"output": ["guide", "animation"]},
    "film": {"output": ["animation", "init"], "film": "both"},
    "sweep": {"output": ["strength sweep"]},
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_the_own_picture_is_the_neighbour_s_too(host: SimpleNamespace, beside: Any, kind: str) -> None:
    seen = beside(kind)
    (alone,) = pixels(host.run()[1])
    asked = seen[:]
    processed = host.run({"output": ["init", "frames"]})[1]
    assert pixels(processed)[-1] == alone and len(processed.images) == 7
    assert set(seen[len(asked) :]) == set(asked) != set()


@pytest.mark.parametrize("settings", REQUESTS)
@pytest.mark.parametrize("kind", NEIGHBOURS)
@pytest.mark.one_of(5)
def test_a_request_works_twice_and_leaves_nothing(host: SimpleNamespace, beside: Any, kind: str, settings: str) -> None:
    """Loopbacks process one request again: what a neighbour has wrapped of ours must not run a second time."""
    beside(kind)
    p, first = host.run(REQUESTS[settings])
    files = len(list(host.out.iterdir()))
    assert "batch_unsampler" not in vars(p) and host.shared.state.textinfo is None
    reset_state(host.shared.state)
    second = host.processing.process_images(p)
    assert pixels(second) == pixels(first) and len(list(host.out.iterdir())) == 2 * files
    assert "batch_unsampler" not in vars(p)
    p.script_args = (0,)  # unticked
    (plain,) = pixels(host.processing.process_images(p))
    assert plain == pixels(host.run()[1])[0]


ONE_REQUEST = [kind for kind in NEIGHBOURS if kind != "inner requests"]
SINGLE = {"sampler_name": "Euler a", "denoising_strength": 1.0}


@pytest.mark.parametrize("kind", ONE_REQUEST)
def test_a_replay_beside_it_is_the_source(host: SimpleNamespace, beside: Any, kind: str) -> None:
    """What a neighbour counts or changes while a sampling goes on, it begins anew in the next."""
    beside(kind)
    p, _ = host.run({"mode": "replay", "output": ["init"], "cfg": 7}, **SINGLE)
    assert torch.equal(p.latest_samples, p.init_latent)
    assert not any("misses" in text for text in p.comments)


@pytest.mark.parametrize("kind", [kind for kind in ONE_REQUEST if kind != "a model that changes"])
def test_each_picture_of_a_sweep_beside_it_is_its_strength_s(host: SimpleNamespace, beside: Any, kind: str) -> None:
    """Others are told of a sweep once, so one that counts its calls goes on counting from level to level."""
    beside(kind)
    alone = pixels(host.run(**SINGLE)[1])
    processed = host.run({"output": ["strength sweep"], "step_increment": 2}, **SINGLE)[1]
    notes = processed.extra_generation_params["Unsampler images"]
    assert len(notes) == 4 and pixels(processed)[-1:] == alone
    for note, picture in zip(notes, pixels(processed)):
        if note["kind"] == "sweep":
            at = {**SINGLE, "denoising_strength": note["strength"]}
            assert picture == pixels(host.run(**at)[1])[0], note


def test_an_inversion_beside_one_that_changes_says_that_it_misses(host: SimpleNamespace, beside: Any) -> None:
    """It walks the other way, where what opens at a later step cannot be foreseen."""
    beside("a model that changes")
    fields = {"sampler_name": "Euler", "denoising_strength": 1.0}
    settings = {"mode": "invert", "output": ["init"], "cfg": 7}
    p, _ = host.run(settings, **fields)
    assert [text for text in p.comments if text.startswith("invert: misses the source by") and "beside it" in text]
    p, _ = host.run({**settings, "positive": "a dog"}, **fields)
    assert not any("misses" in text for text in p.comments)  # an edit is no miss


def test_a_neighbour_that_fails_is_named_and_nothing_is_left(host: SimpleNamespace, beside: Any) -> None:
    beside("p.sample")
    from modules.sd_samplers_cfg_denoiser import CFGDenoiser

    own = CFGDenoiser.forward
    CFGDenoiser.forward = lambda self, x, *args, **kwargs: torch.cat([own(self, x, *args, **kwargs)] * 2)
    try:
        with pytest.raises(RuntimeError, match=r"the model's answer has shape \(2, 4, 8, 8\), not \(1, 4, 8, 8\)"):
            host.run({"mode": "invert", "output": ["init"]})
    finally:
        CFGDenoiser.forward = own
    assert host.run()[1].images
