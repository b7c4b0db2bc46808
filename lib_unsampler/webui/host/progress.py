"""The host's progress bar, live preview and buttons."""

from __future__ import annotations

from modules import shared
from PIL import Image


def stopped() -> bool:
    """Whether the user pressed Interrupt or Skip."""
    state = shared.state
    return state.interrupted or state.skipped or getattr(state, "stopping_generation", False)


class Progress:
    """The host's progress bar, live preview and buttons, while frames are made."""

    def __init__(self, total: int, own_job: bool, writes: bool = False) -> None:
        """Begins the bar.

        Arguments:
            total: Parts of this job: frames, or levels.
            own_job: Whether this is a job of its own, beside the sampling.
            writes: Whether files are written at its end, which is one more part of it.
        """
        self._state = shared.state
        if own_job:
            self._state.nextjob()
            self._state.current_latent = None  # the sampling's last: the host would show it again every few steps
        self._state.sampling_steps = total + writes
        self._state.sampling_step = 0
        self._total = total

    def at(self, number: int, text: str) -> None:
        """``number`` of the job's parts (from 1) are done."""
        self._state.sampling_step = number
        self._state.textinfo = text

    def step(self, number: int, picture: Image.Image | None) -> None:
        """Frame ``number`` (from 1) is done; there may be no picture of it."""
        self.at(number, f"Unsampling: frame {number} of {self._total}")
        if picture is not None and shared.opts.live_previews_enable:
            self._state.assign_current_image(picture)

    def writing(self) -> None:
        """The last frame is made; files are not."""
        self._state.textinfo = "Unsampling: writing files"

    def done(self) -> None:
        """Takes the text under the bar away."""
        self._state.textinfo = None


def add_jobs(count: int) -> None:
    """Tells the progress bar that more jobs than the host's own will run."""
    if shared.state.job_count > 0:
        shared.state.job_count += count


def next_job() -> None:
    """One of the jobs is done: the host's bar begins the next one's part."""
    shared.state.nextjob()
