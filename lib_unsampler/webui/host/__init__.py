"""The WebUI: the only folder that knows ``modules``. Everything asked of the host is asked here, a topic a file.

Hosts are told apart by what they have, never by a version string. Nothing global is patched: a
request's own ``p`` and its own sampler carry instance attributes that are taken off again.
"""
