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


class Mirrored:
    """The host's bar while model calls mirror a forward run's: other extensions are shown the mirrored step.

    The host reckons ``(job_no + sampling_step / sampling_steps) / job_count``, and the step belongs to the callbacks,
    which take it for the sampling's. So the bar is moved by ``job_no`` alone: by the part of the job that is done,
    less what the step shown adds to it.
    """

    def __init__(self, total: int) -> None:
        """``total`` is the number of parts of the present job: levels."""
        self._state = shared.state
        self._job = self._state.job_no
        self._total = total
        self._part = 0

    def show(self, step: int) -> None:
        """The next model call mirrors one at which the host shows this step."""
        state = self._state
        state.current_image_sampling_step += step - state.sampling_step  # the preview's clock does not go by it
        share = step / state.sampling_steps if state.sampling_steps else 0
        state.job_no, state.sampling_step = self._job + self._part / self._total - share, step

    def at(self, part: int, text: str) -> None:
        """``part`` of the job's parts (from 1) are done."""
        if part > self._part:
            self._state.current_image_sampling_step -= part - self._part
            self._part = part
            self.show(self._state.sampling_step)
        self._state.textinfo = text

    def done(self) -> None:
        """The job is over, finished or not: the bar stands at its end."""
        state = self._state
        state.job_no, state.sampling_step, state.current_image_sampling_step = self._job + 1, 0, 0
        state.textinfo = None


def show_step(step: int) -> None:
    """The next model call is the one at which the host shows this step."""
    shared.state.sampling_step = step


def add_jobs(count: int) -> None:
    """Tells the progress bar that more jobs than the host's own will run; it goes on from where it stands.

    A part r of J jobs is done, and :math:`R = J (1 - r) + count` are left: the same part of :math:`R / (1 - r)`.
    """
    state = shared.state
    if state.job_count > 0 and count:
        done = min(state.job_no / state.job_count, 1 - 1e-6)
        total = (state.job_count - state.job_no + count) / (1 - done)
        state.job_count, state.job_no = (total, done * total) if state.job_no else (state.job_count + count, 0)


def next_job(count: int = 1) -> None:
    """So many of the jobs are done: the host's bar begins the next one's part."""
    for _ in range(count):
        shared.state.nextjob()


def quiet() -> None:
    """The text beside the host's bar is no longer ours, whatever has happened."""
    shared.state.textinfo = None
