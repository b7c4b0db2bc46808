from modules import shared


class SamplerData:
    def __init__(self, options):
        self.options = options

    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order") else steps


def setup_img2img_steps(p, steps=None):
    if shared.opts.img2img_fix_steps or steps is not None:
        requested = steps or p.steps
        total = int(requested / min(p.denoising_strength, 0.999)) if p.denoising_strength > 0 else 0
        return total, requested - 1
    return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)
