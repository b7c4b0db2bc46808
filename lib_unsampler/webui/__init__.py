"""The extension inside a Stable Diffusion WebUI: one request, its page and routes; ``host`` alone knows ``modules``."""
