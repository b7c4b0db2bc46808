"""Noise levels as tensors: schedules, noising, inversion, replay and the file that keeps them.

Torch, numpy and safetensors only.
"""
