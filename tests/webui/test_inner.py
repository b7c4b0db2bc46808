"""Requests that other scripts make while the host processes the user's: ours leaves them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from doubled import pixels, reset_state

EVERYTHING = {"output": ["init", "frames", "animation", "latents"], "noise": "path"}


class Other:
    """An always-on script that sends each of the host's pictures through an img2img of its own."""

    def __init__(self, host: SimpleNamespace, make: Callable[[SimpleNamespace, Any, Any], Any]) -> None:
        self.host, self.make = host, make
        self.answers: list[Any] = []
        self.busy = False

    def process(self, p: Any) -> None:
        pass

    def postprocess(self, p: Any, processed: Any) -> None:
        pass

    def postprocess_image(self, p: Any, pp: Any) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            self.answers.append(self.host.processing.process_images(self.make(self.host, p, pp.image)))
        finally:
            self.busy = False
        pp.image = self.answers[-1].images[0]


class Detailer(Other):
    """ADetailer's calls, in its order, with *only selected scripts* off (Bing-su/adetailer, scripts/!adetailer.py)."""

    def postprocess_image(self, p: Any, pp: Any) -> None:
        if getattr(p, "_ad_disabled", False):
            return
        if p.batch_index == 0:
            p.scripts.postprocess(copy.copy(p), self.host.processing.Processed(p, [], ""))
        super().postprocess_image(p, pp)
        if p.batch_index == p.batch_size - 1:
            p.scripts.process(copy.copy(p))


def own_request(host: SimpleNamespace, p: Any, picture: Any) -> Any:
    inner = host.make(p.script_args[1:], init_images=[picture], do_not_save_samples=True, denoising_strength=0.4)
    inner.extra_generation_params = dict(p.extra_generation_params)
    inner.scripts = copy.copy(p.scripts)
    return inner


def marked(host: SimpleNamespace, p: Any, picture: Any) -> Any:
    inner = own_request(host, p, picture)
    inner._ad_disabled = inner._ad_inner = True
    return copy.copy(inner)


def copied(host: SimpleNamespace, p: Any, picture: Any) -> Any:
    inner = copy.copy(p)
    inner.init_images, inner.batch_size, inner.n_iter, inner.do_not_save_samples = [picture], 1, 1, True
    return inner


def copied_without_scripts(host: SimpleNamespace, p: Any, picture: Any) -> Any:
    inner = copied(host, p, picture)
    inner.scripts = None
    return inner


MAKERS = [own_request, marked, copied, copied_without_scripts]


def names(host: SimpleNamespace) -> list[str]:
    return sorted(path.name for path in host.out.iterdir()) if host.out.exists() else []


@pytest.mark.parametrize("kind", [Other, Detailer])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("output", [EVERYTHING, {"output": ["frames", "contact sheet"]}], ids=["init", "frames"])
@pytest.mark.one_of(3)
def test_an_inner_request_gives_its_one_picture(
    host: SimpleNamespace, kind: type[Other], make: Callable[..., Any], output: dict[str, Any]
) -> None:
    alone, expected = host.run(output, batch_size=2, n_iter=2)
    written, grid = len(names(host)), alone.do_not_save_grid
    host.runner.others = [other := kind(host, make)]
    reset_state(host.shared.state)
    p = host.make((output,), batch_size=2, n_iter=2)
    processed = host.processing.process_images(p)
    assert [len(answer.images) for answer in other.answers] == [1] * 4 and host.runner.swallowed == []
    ours = len(expected.extra_generation_params["Unsampler images"])
    assert pixels(processed)[:ours] == pixels(expected)[:ours] and len(processed.images) == len(expected.images)
    for key in ("Unsampler images", "Unsampler sigmas", "Unsampler settings"):
        assert processed.extra_generation_params[key] == expected.extra_generation_params[key]
    assert processed.infotexts[:ours] == expected.infotexts[:ours]
    assert len(names(host)) == 2 * written and p.do_not_save_grid == grid
    if "init" in output["output"]:
        assert pixels(processed)[ours:] == [pixels(answer)[0] for answer in other.answers]


@pytest.mark.parametrize("kind", [Other, Detailer])
def test_no_grid_of_the_black_pictures_that_stand_in_for_samples(host: SimpleNamespace, kind: type[Other]) -> None:
    """The host makes its grid at the end: nobody may have given the request its own setting back before."""
    p, seen = host.make(({"output": ["frames"]},), batch_size=2, n_iter=2), []
    watcher = Other(host, own_request)
    watcher.postprocess_image = lambda request, _: seen.append(p.do_not_save_grid) if request is p else None
    host.runner.others = [kind(host, copied), watcher]
    host.processing.process_images(p)
    assert seen == [True] * 4 and not p.do_not_save_grid


@pytest.mark.parametrize("make", MAKERS)
def test_an_inner_request_within_a_plain_one_is_the_inner_one_alone(
    host: SimpleNamespace, make: Callable[..., Any]
) -> None:
    """Ours ticked in the inner request only, as an extension's copy of the page's controls may have it."""
    plain = host.run()[1]

    def ticked(host: SimpleNamespace, p: Any, picture: Any) -> Any:
        inner = make(host, p, picture)
        inner.script_args = (0, {"output": ["frames"]})
        return inner

    host.runner.others = [other := Other(host, ticked)]
    processed = host.run()[1]
    assert [len(answer.images) for answer in other.answers] == [1] and len(processed.images) == len(plain.images)


def test_a_request_after_one_that_failed_inside_is_no_inner_one(host: SimpleNamespace) -> None:
    def broken(host: SimpleNamespace, p: Any, picture: Any) -> Any:
        inner = own_request(host, p, picture)
        inner.sample = lambda *_, **__: 1 / 0
        return inner

    host.runner.others = [Other(host, broken)]
    expected = pixels(host.run({"output": ["frames"]})[1])
    assert len(host.runner.swallowed) == 1
    host.runner.others = []
    assert pixels(host.run({"output": ["frames"]})[1]) == expected
