import torch
from k_diffusion import sampling


def kl_optimal(n, sigma_min, sigma_max, table):
    """n + 1 sigmas, evenly spaced in their arctangent: the last is sigma_min, no 0 follows."""
    low, high = torch.atan(torch.tensor([sigma_min, sigma_max]))
    parts = torch.arange(n + 1) / n
    return torch.tan(parts * low + (1 - parts) * high)


def ddim(n, sigma_min, sigma_max, table):
    """Every so many of the table's sigmas from the second on: as many as there are, whatever n is."""
    every = table[1 :: max(len(table) // n, 1)]
    return torch.cat([every.flip(0), torch.zeros(1)])


def karras(n, sigma_min, sigma_max, table):
    return sampling.get_sigmas_karras(n, sigma_min, sigma_max)


schedulers_map = {"Automatic": karras, "Karras": karras, "KL Optimal": kl_optimal, "DDIM": ddim}
