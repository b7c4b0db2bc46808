import re

EDIT = re.compile(r"\[(.*?):(.*?):(\d+)\]")


class MulticondLearnedConditioning:
    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


def schedule(prompt, steps):
    """[before:after:n] changes after n model calls; what is left of the host's prompt editing."""
    found = EDIT.search(prompt)
    if not found:
        return [(steps, prompt)]
    before, after, when = found.groups()
    return [(int(when), EDIT.sub(before, prompt)), (steps, EDIT.sub(after, prompt))]


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return [schedule(prompt, steps) for prompt in prompts]


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    return MulticondLearnedConditioning((len(prompts),), get_learned_conditioning(model, prompts, steps))


def reconstruct(c, current_step):
    return [next((prompt for end, prompt in schedule if current_step <= end), schedule[0][1]) for schedule in c]
