import torch

from modules import devices, shared


def create_generator(seed):
    return torch.Generator(devices.cpu).manual_seed(int(seed))


def randn(seed, shape, generator=None):
    torch.manual_seed(seed)  # the host reseeds the global generator too
    return torch.randn(shape, generator=generator)


def slerp(val, low, high):
    dot = (low / low.norm(dim=1, keepdim=True) * high / high.norm(dim=1, keepdim=True)).sum(1)
    omega = torch.acos(dot)
    part = (torch.sin((1.0 - val) * omega) / torch.sin(omega)).unsqueeze(1) * low
    return part + (torch.sin(val * omega) / torch.sin(omega)).unsqueeze(1) * high


class ImageRNG:
    def __init__(self, shape, seeds, subseeds=None, subseed_strength=0.0, seed_resize_from_h=0, seed_resize_from_w=0):
        self.shape, self.seeds, self.subseeds = tuple(map(int, shape)), seeds, subseeds
        self.subseed_strength = subseed_strength
        self.generators = [create_generator(seed) for seed in seeds]
        self.is_first = True

    def first(self):
        drawn = []
        for i, (seed, generator) in enumerate(zip(self.seeds, self.generators)):
            sub = randn(self.subseeds[i], self.shape) if self.subseed_strength else None
            noise = randn(seed, self.shape, generator=generator)
            drawn.append(noise if sub is None else slerp(self.subseed_strength, noise, sub))
        if shared.opts.eta_noise_seed_delta:
            self.generators = [create_generator(s + shared.opts.eta_noise_seed_delta) for s in self.seeds]
        return torch.stack(drawn)

    def next(self):
        if self.is_first:
            self.is_first = False
            return self.first()
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
