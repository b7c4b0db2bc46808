"""A small double of the WebUI's ``modules``, written from what was seen in A1111 v1.10.1.

Real torch, k-diffusion, gradio and Pillow; the order of one img2img request, its hooks that swallow
exceptions, its generators and its start state are the host's. ``tests/test_contract.py`` holds its
signatures and the facts it rests on to a real checkout.
"""
