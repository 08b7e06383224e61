"""Runs a command for GPUs that are not there, up to the compilation; prints the graph.

A process of its own: virtual devices are a setting of the process.
"""

from __future__ import annotations

import json
import sys

from graph_texts import Built, nothing_compiled
from max.driver import (
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)

from unispec.cli import main

command, arch, *arguments = sys.argv[1:]
if command == "generate":
    set_virtual_device_api("cuda")
    set_virtual_device_target_arch(arch)
    set_virtual_device_count(1)
    arguments += ["--devices", "gpu", "--prompt", "x"]
else:
    # It makes its own devices.
    arguments += ["--target", f"cuda:{arch}"]
sys.argv = ["unispec", command, *arguments]
with nothing_compiled():
    try:
        main()
    except Built as built:
        print(json.dumps({"text": built.text, "weights": built.weights}))
