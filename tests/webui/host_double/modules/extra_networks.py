import re

LORA = re.compile(r"<lora:(\w+):[\d.]+>")
active = []


def parse_prompts(prompts):
    data = {"lora": sorted(set(LORA.findall(prompts[0])))} if prompts and LORA.search(prompts[0]) else {}
    return [LORA.sub("", prompt) for prompt in prompts], data


def activate(p, extra_network_data):
    active[:] = extra_network_data.get("lora", [])
    if p.scripts is not None:
        p.scripts.after_extra_networks_activate(p, prompts=p.prompts, extra_network_data=extra_network_data)
