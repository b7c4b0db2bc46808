"""Batch Unsampler: every noise level of a diffusion schedule, from one picture, as one batch.

Importing the package costs nothing; the modules import torch when they are used.
"""

__version__ = "0.1.0"
