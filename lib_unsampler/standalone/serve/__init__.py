"""``python -m lib_unsampler serve``: the form, curve and player of the WebUI's page over the embedded models."""
