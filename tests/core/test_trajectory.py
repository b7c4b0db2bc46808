"""Trajectory files: everything comes back, nothing else is taken for one, and no pickle is ever read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib_unsampler.core.noising import SeededDraws, unsample
from lib_unsampler.core.replay import Recording, record
from lib_unsampler.core.schedule import levels
from lib_unsampler.core.trajectory import Trajectory, TrajectoryError, cut, load, save
from lib_unsampler.standalone.sampling import kd

Latent = Callable[..., Tensor]
SCHEDULE = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.0])


def make(source: Tensor, mask: Tensor | None = None, maps: bool = False) -> Trajectory:
    """A real run of two images, from its source; with ``maps``, of a replay that skips a step."""
    plan = levels(SCHEDULE, 1, 2)
    z = unsample(source, plan, SeededDraws((1, 2), source.shape[1:]), "path", "eps")
    return Trajectory(
        z=z,
        sigmas=plan.sigmas,
        schedule=plan.schedule,
        start=plan.kept[-1],
        source=source,
        prediction="eps",
        seeds=(1, 2**63 - 1),
        mask=mask,
        handoff=None if mask is None else z[-1] + 1,
        replay=recorded(source) if maps else None,
        settings={"steps": 4, "noise": "path", "positive": 'a "quoted", ünïcode: text'},
        info={"model": "gaussian"},
    )


def recorded(source: Tensor) -> Recording:
    """The source as Euler a's noises from sigma 2 on; the model knows only black."""
    states, sigmas = torch.stack([source + 0.5, source - 2]), SCHEDULE[2:]
    return record(
        kd.sample_euler_ancestral, lambda z, s: 0 * z, sigmas, states, source, iter(()), "eps", eta=0.5, disable=True
    )


@pytest.fixture
def file(tmp_path: Path, latent: Latent) -> Path:
    path = tmp_path / "some name.safetensors"
    save(make(latent(2, 3, 4, 5)), path)
    return path


def assert_refused(path: Path, *said: str) -> None:
    """It is refused in one line that names the file."""
    with pytest.raises(TrajectoryError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in said)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def assert_same(name: str, one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    elif isinstance(one, Recording):
        for f in fields(Recording):
            assert_same(f.name, getattr(one, f.name), getattr(other, f.name))
    else:
        assert one == other, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 5)], ids=["rank4", "rank5"])
@pytest.mark.parametrize("mask", [None, torch.linspace(0, 1, 20).reshape(1, 1, 4, 5)], ids=["whole", "masked"])
@pytest.mark.parametrize("maps", [False, True], ids=["noised", "replay"])
def test_everything_comes_back(
    shape: tuple[int, ...], dtype: torch.dtype, mask: Tensor | None, maps: bool, tmp_path: Path, latent: Latent
) -> None:
    wanted = make(latent(*shape, dtype=dtype), mask, maps)
    save(wanted, tmp_path / "new folder" / "t.safetensors")
    got = load(tmp_path / "new folder" / "t.safetensors")
    for f in fields(Trajectory):
        assert_same(f.name, getattr(wanted, f.name), getattr(got, f.name))
    assert torch.equal(got.latent, wanted.z[-1] if mask is None else wanted.handoff)
    assert got.remaining.tolist() == [5.0, 2.0, 0.5, 0.0]


def test_the_file_is_as_documented(file: Path, latent: Latent) -> None:
    """DESIGN 6: tensors z, sigmas, source; format version, prediction type, settings and seeds as text."""
    tensors, metadata = contents(file)
    assert tensors["z"].shape == (2, 2, 3, 4, 5) and tensors["sigmas"].tolist() == [0.5, 5.0]
    assert torch.equal(tensors["source"], latent(2, 3, 4, 5))
    assert metadata["version"] == "2" and metadata["prediction"] == "eps"
    assert json.loads(metadata["seeds"]) == [1, 2**63 - 1] and json.loads(metadata["settings"])["steps"] == 4


def test_a_truncated_file_is_refused_at_every_length(file: Path) -> None:
    whole = file.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, *range(0, len(whole), 97), len(whole) - 1}:
        file.write_bytes(whole[:length])
        assert_refused(file)


@pytest.mark.parametrize("maps", [False, True], ids=["noised", "replay"])
def test_any_damaged_byte_of_the_head_is_refused_or_harmless(maps: bool, file: Path, latent: Latent) -> None:
    """Never another exception than TrajectoryError, whichever byte of the header is damaged."""
    save(make(latent(2, 3, 4, 5), maps=maps), file)
    whole = file.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in range(head):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            load(file)
        except TrajectoryError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_refused(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(np.random.default_rng(seed).bytes(4096))
    assert_refused(path)


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"z": torch.zeros(3)}, path)
    assert_refused(path, "not a Batch Unsampler trajectory")
    save_file({"z": torch.zeros(3)}, path, {"format": "pt"})
    assert_refused(path, "not a Batch Unsampler trajectory")


def test_a_newer_version_says_so(file: Path) -> None:
    tensors, metadata = contents(file)
    save_file(tensors, file, {**metadata, "version": "3"})
    assert_refused(file, "newer", "update")


@pytest.mark.parametrize(
    "damage",
    [
        {"version": "one"},
        {"start": "x"},
        {"start": "4"},
        {"start": "-1"},
        {"start": "0"},
        {"seeds": "7"},
        {"seeds": "[1]"},
        {"seeds": "[1,"},
        {"settings": "[" * 100_000},
        {"settings": "3"},
        {"info": "x"},
        {"prediction": "const"},
    ],
    ids=lambda d: str(d)[:30],
)
def test_damaged_metadata_is_refused(damage: dict[str, str], file: Path) -> None:
    tensors, metadata = contents(file)
    save_file(tensors, file, {**metadata, **damage})
    assert_refused(file)


@pytest.mark.parametrize("name", ["version", "prediction", "start", "seeds", "settings", "info"])
def test_missing_metadata_is_refused(name: str, file: Path) -> None:
    tensors, metadata = contents(file)
    save_file(tensors, file, {k: v for k, v in metadata.items() if k != name})
    assert_refused(file, name)


MISFITS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "other picture size": lambda t: {"source": t["source"][..., :-1]},
    "other batch": lambda t: {"source": t["source"][:1]},
    "one level less": lambda t: {"z": t["z"][1:]},
    "no level": lambda t: {"z": t["z"][:0], "sigmas": t["sigmas"][:0]},
    "rank 3": lambda t: {"z": t["z"][..., 0], "source": t["source"][..., 0]},
    "one sigma more": lambda t: {"sigmas": torch.tensor([0.5, 2.0, 5.0])},
    "falling sigmas": lambda t: {"sigmas": torch.tensor([9.0, 5.0])},
    "foreign sigma": lambda t: {"sigmas": torch.tensor([0.7, 5.0])},
    "other last sigma": lambda t: {"sigmas": torch.tensor([0.5, 2.0])},
    "rising schedule": lambda t: {"schedule": t["schedule"].flip(0)},
    "nan in schedule": lambda t: {"schedule": torch.tensor([torch.nan, 5.0, 2.0, 0.5, 0.0])},
    "schedule of rank 2": lambda t: {"schedule": t["schedule"][None]},
    "scalar schedule": lambda t: {"schedule": t["schedule"][0]},
    "scalar source": lambda t: {"source": t["schedule"][0]},
    "small handoff": lambda t: {"handoff": t["source"][:1], "mask": torch.ones(1, 1, 4, 5)},
    "small mask": lambda t: {"handoff": t["source"], "mask": torch.ones(1, 1, 4, 4)},
    "mask of rank 5": lambda t: {"handoff": t["source"], "mask": torch.ones(1, 2, 1, 4, 5)},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_together_are_refused(misfit: str, file: Path) -> None:
    tensors, metadata = contents(file)
    changed = {k: v.clone().contiguous() for k, v in MISFITS[misfit](tensors).items()}
    save_file({**tensors, **changed}, file, metadata)
    assert_refused(file)


@pytest.mark.parametrize("name", ["z", "sigmas", "schedule", "source"])
def test_a_missing_tensor_is_refused_by_name(name: str, file: Path) -> None:
    tensors, metadata = contents(file)
    save_file({k: v for k, v in tensors.items() if k != name}, file, metadata)
    assert_refused(file, name)


MAP_MISFITS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "one map less": lambda t: {"maps": t["maps"][1:]},
    "smaller maps": lambda t: {"maps": t["maps"][..., 1:]},
    "no state": lambda t: {"states": t["states"][:0], "maps": t["maps"][:0]},
    "scalar states": lambda t: {"states": t["sigmas"][0]},
    "states from before the start": lambda t: {"states": torch.cat([t["states"], t["states"]])},
    "another batch": lambda t: {name: t[name][..., :1, :, :, :] for name in ("states", "maps", "residual")},
}


@pytest.mark.parametrize("misfit", MAP_MISFITS)
def test_maps_that_do_not_fit_are_refused(misfit: str, file: Path, latent: Latent) -> None:
    save(make(latent(2, 3, 4, 5), maps=True), file)
    tensors, metadata = contents(file)
    changed = {k: v.clone().contiguous() for k, v in MAP_MISFITS[misfit](tensors).items()}
    save_file({**tensors, **changed}, file, metadata)
    assert_refused(file)


@pytest.mark.parametrize(
    "about",
    ["[]", "{}", "x", '{"sampler": "a", "options": {}, "steps": [7]}', '{"sampler": "a", "options": 3, "steps": [0]}'],
)
def test_damaged_words_about_maps_are_refused(about: str, file: Path, latent: Latent) -> None:
    save(make(latent(2, 3, 4, 5), maps=True), file)
    tensors, metadata = contents(file)
    save_file(tensors, file, {**metadata, "replay": about})
    assert_refused(file)


def test_maps_of_another_schedule_are_refused(latent: Latent) -> None:
    whole = make(latent(2, 3, 4, 5), maps=True)
    assert whole.replay is not None
    with pytest.raises(TrajectoryError, match="another schedule"):
        replace(whole, replay=replace(whole.replay, sigmas=torch.tensor([3.0, 0.5, 0.0])))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("writer", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_never_read(writer: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    path, mark = tmp_path / "t.safetensors", tmp_path / "it ran"
    writer({"z": Payload(mark)}, path)
    assert_refused(path)
    assert not mark.exists()
    if writer is not torch.save:
        pickle.loads(path.read_bytes())
        assert mark.exists()  # so the payload would have shown


def test_tensors_may_be_views_of_one_another(tmp_path: Path, latent: Latent) -> None:
    whole = make(latent(2, 3, 4, 5))
    whole = replace(whole, z=whole.z.sigmoid())  # a mask's values are 0 to 1
    shared = replace(whole, mask=whole.z[0, :, :1], handoff=whole.z[-1], source=whole.z[0])
    save(shared, tmp_path / "t")
    assert torch.equal(load(tmp_path / "t").latent, whole.z[-1])


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_no_file_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / name)


def test_a_failing_save_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    broken = replace(load(file), settings={"steps": object()})
    with pytest.raises(TypeError):
        save(broken, file)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_saved_file_is_as_readable_as_any_new_file(file: Path) -> None:
    plain = file.with_name("plain")
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


# What no run makes


def damaged(file: Path, about: dict[str, Any], **changed: Tensor) -> None:
    tensors, metadata = contents(file)
    save_file({**tensors, **{k: v.contiguous() for k, v in changed.items()}}, file, {**metadata, **about})


def a_replay(file: Path, latent: Latent) -> dict[str, Tensor]:
    """A whole file, masked and with a replay; returns its tensors."""
    save(make(latent(2, 3, 4, 5), torch.linspace(0, 1, 20).reshape(1, 1, 4, 5), maps=True), file)
    return contents(file)[0]


EVERY = ("z", "source", "mask", "handoff", "states", "maps", "residual", "sigmas", "schedule")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
@pytest.mark.parametrize("name", EVERY)
def test_a_tensor_that_is_not_floating_is_refused_by_name(
    name: str, dtype: torch.dtype, file: Path, latent: Latent
) -> None:
    tensors = a_replay(file, latent)
    damaged(file, {}, **{name: tensors[name].to(dtype)})
    assert_refused(file, f"{name} is of type {str(dtype)[6:]}, not floating")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", EVERY)
def test_a_value_that_is_not_finite_is_refused(name: str, value: float, file: Path, latent: Latent) -> None:
    tensor = a_replay(file, latent)[name].clone()
    tensor.view(-1)[-1] = value
    damaged(file, {}, **{name: tensor})
    assert_refused(file, *([f"{name} holds values that are not finite"] if name in EVERY[:7] else []))


def test_every_error_is_named_at_once(file: Path, latent: Latent) -> None:
    tensors = a_replay(file, latent)
    broken = {name: tensors[name] * float("nan") for name in ("z", "residual")}
    damaged(file, {}, mask=tensors["mask"] * 5, **broken)
    assert_refused(file, "z holds", "residual holds", "mask holds values from 0 to 5, not from 0 to 1")
    damaged(file, {"prediction": "x", "seeds": '["a", 2]'}, z=tensors["z"].int(), handoff=tensors["handoff"][:1])
    assert_refused(file, "z is of type", "prediction 'x'", "seeds ['a', 2]", "handoff (1, 3, 4, 5)")


SCHEDULES = {
    "rising": ([5.0, 9.0, 2.0, 0.5, 0.0], "does not descend"),
    "negative": ([9.0, 5.0, 2.0, 0.5, -1.0], "ends at -1"),
    "no end": ([9.0, 5.0, 2.0, 0.5, 0.1], "the schedule ends at 0.1, and sampling ended at 0"),
    "short": ([9.0], "the schedule ends at 9"),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_schedule_that_no_sampler_has_is_refused(case: str, file: Path) -> None:
    damaged(file, {}, schedule=torch.tensor(SCHEDULES[case][0]))
    assert_refused(file, SCHEDULES[case][1])


def test_a_schedule_may_end_above_0_where_it_says_so(file: Path) -> None:
    """As of *KL Optimal*; a file of 0.1.0 names no end, and its schedule ends at 0."""
    ending = torch.tensor([9.0, 5.0, 2.0, 0.5, 0.1])
    damaged(file, {"end": repr(float(ending[-1]))}, schedule=ending)
    again = load(file)
    assert again.remaining.tolist() == ending[1:].tolist()
    save(again, file)
    assert torch.equal(load(file).schedule, ending)
    damaged(file, {"end": "0.2"}, schedule=ending)
    assert_refused(file, "the schedule ends at 0.1, and sampling ended at 0.2")


def test_a_flow_model_has_no_sigma_above_1(file: Path) -> None:
    damaged(file, {"prediction": "flow"})
    assert_refused(file, "begins at sigma 9, above the 1 of a flow model")


@pytest.mark.parametrize("version", ["0", "-1", "1.5", ""])
def test_a_version_that_never_was_is_refused(version: str, file: Path) -> None:
    damaged(file, {"version": version})
    assert_refused(file)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": [0.5]}, "steps [0.5] are not whole numbers"),
        ({"steps": [True]}, "not whole numbers"),
        ({"steps": ["0"]}, "not whole numbers"),
        ({"steps": [1]}, "no map belongs to step 0 of 2"),
        ({"steps": [0, 0]}, "do not fit residual"),
        ({"steps": [-1]}, "do not rise"),
        ({"options": {"eta": None}}, "the replay's eta None is neither number nor word"),
        ({"options": {"eta": [1]}}, "neither number nor word"),
        ({"options": {"eta": float("nan")}}, "the replay's eta nan is not finite"),
    ],
)
def test_what_is_told_of_a_replay_is_checked(changed: dict[str, Any], said: str, file: Path, latent: Latent) -> None:
    a_replay(file, latent)
    told = json.loads(contents(file)[1]["replay"])
    damaged(file, {"replay": json.dumps({**told, **changed})})
    assert_refused(file, said)


def test_a_walk_is_cut_at_a_level_that_it_holds(latent: Latent) -> None:
    whole = make(latent(2, 3, 4, 5), mask=torch.ones(2, 1, 4, 5))  # of steps 3 and 1
    same, shorter = cut(whole, 1), cut(whole, 3)
    assert same.handoff is whole.handoff and torch.equal(same.z, whole.z) and same.start == 1
    assert shorter.handoff is None and torch.equal(shorter.z, whole.z[:1]) and shorter.start == 3
    assert cut(make(latent(2, 3, 4, 5), maps=True), 3).replay is None, "it samples from step 2 on"
    for step in (0, 2, 4, 5):
        with pytest.raises(TrajectoryError, match=f"step {step} is not one of the levels that were kept"):
            cut(whole, step)
