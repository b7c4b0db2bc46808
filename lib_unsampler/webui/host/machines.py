"""Several machines: the engine that shares a request's images out among WebUIs (stable-diffusion-webui-distributed).

Its master sends every always-on script's arguments to its workers as JSON, before any script's ``process``. Of a
worker's reply it takes one picture for each image (of a single image's, every picture) and puts them behind the
pictures of its own last batch; of the texts it takes the pictures' parameters, and puts them where it counts the
pictures to be.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from modules import shared

ENGINE = "Distribute"


def engine(p: Any) -> Any | None:
    """The engine's script, where it is installed."""
    scripts = getattr(p.scripts, "alwayson_scripts", ())
    return next((s for s in scripts if hasattr(s, "world") and s.title() == ENGINE), None)


def jobs(p: Any) -> list[Any]:
    """The parts of this request that other machines were given, in the order in which their pictures come."""
    found = engine(p)
    if found is None or found.world.p is not p:
        return []
    return [job for job in found.world.jobs if job.thread is not None]


def pictures(p: Any) -> int:
    """How many pictures of other machines were put behind our own."""
    return sum(len(job.gallery_map) for job in jobs(p))


def place(p: Any, own: int) -> None:
    """Has the engine put parameters where its pictures are: it counts a grid also where none is made.

    Arguments:
        own: The pictures that this machine makes.
    """
    several = own + pictures(p) > 1 or not shared.opts.grid_only_if_multiple
    grid = shared.opts.return_grid and not p.do_not_save_grid and several
    places = count(own + grid)
    for job in jobs(p):
        job.gallery_map[:] = [next(places) for _ in job.gallery_map]


def missing(p: Any) -> list[str]:
    """What other machines were asked for and did not give, in words."""
    told = [(job.worker.label, job.batch_size * p.n_iter, len(job.gallery_map)) for job in jobs(p)]
    return [
        f"{wanted - came} of {wanted} images did not come from {name}" for name, wanted, came in told if came < wanted
    ]
