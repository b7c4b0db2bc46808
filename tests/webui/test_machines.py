"""A request that an engine shares out among machines: every image's own picture comes back, and all is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from doubled import pixels
from named import named_files

MADE = {
    "init": {"output": ["init"]},
    "path": {"output": ["init"], "noise": "path"},
    "guide": {"output": ["guide"]},
    "invert": {"output": ["init"], "mode": "invert"},
    "replay": {"output": ["init"], "mode": "replay"},
    "sweep": {"output": ["strength sweep"], "step_increment": 2},
    "frames": {"output": ["frames", "animation"]},
    "beside": {"output": ["init", "frames", "animation"]},
    "film": {"output": ["init", "animation"], "film": "both"},
    "latents": {"output": ["latents"]},
}


class Engine:
    """stable-diffusion-webui-distributed 2.3.0 (8fd65ebd, scripts/distributed.py): the steps by which it shares out a
    request and takes the workers' replies, here with one worker that is the same doubled host in another thread."""

    def __init__(self, host: SimpleNamespace, share: int) -> None:
        self.host, self.share = host, share
        self.world = SimpleNamespace(p=None, jobs=[])
        self.alive = True
        self.counted = 0
        self.failed: list[Exception] = []

    def title(self) -> str:
        return "Distribute"

    def before_process(self, p: Any) -> None:
        master = SimpleNamespace(worker=SimpleNamespace(master=True), batch_size=p.batch_size - self.share, thread=None)
        job = SimpleNamespace(worker=SimpleNamespace(label="second", master=False), batch_size=self.share)
        job.gallery_map, job.response = [], None
        args = json.loads(json.dumps(p.script_args[1:]))
        own = {"batch_size": self.share, "seed": p.seed + master.batch_size * p.n_iter, "n_iter": p.n_iter}
        own |= {"sampler_name": p.sampler_name, "is_api": True, "do_not_save_samples": True, "do_not_save_grid": True}
        job.thread = Thread(target=self._request, args=(job, args, own))
        job.thread.start()
        job.thread.join()
        self.world.p, self.world.jobs = p, [master, job]
        p.batch_size = master.batch_size

    def _request(self, job: Any, args: list[Any], own: dict[str, Any]) -> None:
        if not self.alive:
            return
        self.host.runner.others.remove(self)
        try:
            p = self.host.make(tuple(args), **own)
            job.response = self.host.processing.process_images(p), p
        except Exception as error:
            self.failed.append(error)
        finally:
            self.host.runner.others.append(self)

    def postprocess_batch_list(self, p: Any, pp: Any, batch_number: int) -> None:
        if p is not self.world.p or batch_number != p.n_iter - 1:
            return
        job = self.world.jobs[1]
        if job.response is None:
            return
        made, asked = job.response
        several = len(asked.all_seeds) > 1
        taken = made.images[: len(asked.all_seeds)] if several else made.images
        first = p.n_iter * p.batch_size + self.host.shared.opts.return_grid + len(pp.images) - p.batch_size
        for number, image in enumerate(taken):
            p.seeds.append(asked.all_seeds[number if several else 0])
            p.subseeds.append(asked.all_subseeds[number if several else 0])
            p.prompts.append(p.prompt)
            p.negative_prompts.append(p.negative_prompt)
            job.gallery_map.append(first + number)
            pp.images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
        p.batch_size = len(pp.images)

    def postprocess(self, p: Any, processed: Any) -> None:
        job = self.world.jobs[1]
        if job.response is not None:
            for number, place in enumerate(job.gallery_map):
                processed.infotexts[place] = job.response[0].infotexts[number] + ", Worker Label: second"


@pytest.fixture
def engine(host: SimpleNamespace) -> Iterator[Callable[[int], Engine]]:
    """Installs the engine: ``engine(n)`` gives n images of each request to the worker."""

    def installed(share: int) -> Engine:
        host.runner.others = [made := Engine(host, share)]
        return made

    yield installed
    assert host.runner.swallowed == []


def alone(host: SimpleNamespace, settings: Any, **fields: Any) -> list[bytes]:
    """The own pictures of the same request on one machine."""
    _, made = host.run({**settings, "reply": "own only"}, **fields)
    return pixels(made)


@pytest.mark.parametrize("case", MADE)
@pytest.mark.parametrize(("batch", "share", "n_iter", "grid"), [(4, 2, 1, False), (2, 1, 1, True), (3, 1, 2, False)])
@pytest.mark.one_of(4)
def test_every_image_has_its_own_picture_its_own_text_and_all_its_files(
    host: SimpleNamespace, engine: Any, case: str, batch: int, share: int, n_iter: int, grid: bool
) -> None:
    settings = MADE[case]
    fields = {"n_iter": n_iter, "sampler_name": "Euler a" if case == "replay" else "Euler", "is_api": True}
    fields |= {"do_not_save_grid": not grid}
    expected = alone(host, settings, batch_size=batch, **fields)
    host.shared.opts.return_grid = True
    made = engine(share)
    _, processed = host.run(settings, batch_size=batch, **fields)
    assert made.failed == []
    first, count = processed.index_of_first_image, batch * n_iter
    assert first == (grid and bool({"init", "guide", "strength sweep"} & set(settings["output"])))
    pictures, texts = processed.images[first:][:count], processed.infotexts[first:][:count]
    far = [np.abs(np.int16(p) - np.frombuffer(e, np.uint8).reshape(64, 64, 3)) for p, e in zip(pictures, expected)]
    assert max(map(np.max, far)) <= 1
    assert [re.search(r"Seed: (\d+)", text).group(1) for text in texts] == [str(5 + i) for i in range(count)]
    local = count - share * n_iter
    assert ["Worker Label" in text for text in texts] == [False] * local + [True] * share * n_iter
    kinds = {"sweep": {".png", ".gif"}, "frames": {".png", ".gif"}, "beside": {".png", ".gif"}, "film": {".gif"}}
    for text in texts:
        files = named_files(text)
        assert {f.suffix for f in files} == {"latents": {".safetensors"}, **kinds}.get(case, set())
        assert all(file.exists() for file in files)
    assert len(processed.images) == len(processed.infotexts)
    notes = processed.extra_generation_params["Unsampler images"]
    assert [n["kind"] for n in notes][: first + count] == ["grid"] * first + ["own"] * count
    assert len(notes) == len(processed.images)


def test_files_of_different_images_are_named_apart(host: SimpleNamespace, engine: Any) -> None:
    engine(2)
    _, processed = host.run({"output": ["frames", "animation"]}, batch_size=4)
    named = [set(named_files(text)) for text in processed.infotexts[:4]]
    assert all(named) and len(set().union(*named)) == sum(map(len, named))


def test_what_a_worker_did_not_give_is_said(host: SimpleNamespace, engine: Any) -> None:
    expected = alone(host, MADE["beside"], batch_size=4)
    engine(2).alive = False
    p, processed = host.run(MADE["beside"], batch_size=4, do_not_save_samples=True)
    assert [picture.tobytes() for picture in processed.images[:2]] == expected[:2]
    assert "2 of 2 images did not come from second" in p.comments
    assert "2 of 2 images did not come from second" in processed.extra_generation_params["Unsampler messages"]


def test_a_refused_request_is_refused_on_both(host: SimpleNamespace, engine: Any) -> None:
    made = engine(2)
    with pytest.raises(Exception, match="noise: 'pink'"):
        host.run({"noise": "pink"}, batch_size=4)
    assert "noise: 'pink'" in str(made.failed[0])


def test_pasted_arguments_behind_a_dict_are_no_contradiction_for_a_worker(host: SimpleNamespace, engine: Any) -> None:
    """JSON loses the mark of parameters that were pasted."""
    from lib_unsampler.settings import Pasted

    made = engine(1)
    p = host.make(({"output": ["init"]}, Pasted(["latents"]), 0, 3), batch_size=2)
    host.processing.process_images(p)
    assert made.failed == []


def test_a_plain_request_is_as_it_was(host: SimpleNamespace, engine: Any) -> None:
    made = engine(2)
    p = host.make((False, ["init"]), batch_size=4)
    host.processing.process_images(p)
    assert made.failed == [] and not any(key.startswith("Unsampler") for key in p.extra_generation_params)


def test_without_an_engine_no_argument_is_changed(host: SimpleNamespace) -> None:
    args = ({"output": ["init"]},)
    assert host.make(args).script_args[1:] == args


@pytest.mark.parametrize("case", MADE)
def test_any_client_may_ask_for_own_pictures_first_or_alone(host: SimpleNamespace, case: str) -> None:
    settings = MADE[case]
    fields = {"sampler_name": "Euler a" if case == "replay" else "Euler", "batch_size": 2, "is_api": True}
    fields["do_not_save_samples"] = True
    made = {reply: host.run({**settings, "reply": reply}, **fields)[1] for reply in ("all", "own first", "own only")}
    own = made["own only"].images
    assert len(own) == 2 and [i.tobytes() for i in own] == [i.tobytes() for i in made["own first"].images[:2]]
    samples = bool({"init", "guide", "strength sweep"} & set(settings["output"]))
    last = [i.tobytes() for i in made["all"].images[-2:]]  # img2img's own, or the noisiest level's frames
    assert [i.tobytes() for i in own] == last
    others = {
        reply: [note for note in one.extra_generation_params["Unsampler images"] if note["kind"] not in ("own", "grid")]
        for reply, one in made.items()
    }
    assert others["own only"] == [] and (others["own first"] == others["all"] or case == "latents")
    assert len(made["own first"].images) == 2 + len(others["own first"])
    made_files = bool(set(settings["output"]) - {"init", "guide"})
    assert all(bool(named_files(text)) == made_files for text in made["own only"].infotexts)
    assert samples or made_files
