# Runs in the environment of KServe that benchmarks/peers.py makes.
# mypy: ignore-errors
"""Reads a resource of KServe as JSON from stdin, writes what KServe's own classes know of it.

What is Kubernetes' own inside is passed on as it is.
"""

import json
import re
import sys
from typing import Any

import kserve.models

KINDS = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}


def keep(value: Any, kind: str) -> Any:
    """What `kind`, as these classes write it, knows of a value."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        return [keep(entry, inner[1]) for entry in value]
    if kind in ("str", "bool", "int", "float"):
        return value if type(value).__name__ == kind else None
    if known := getattr(kserve.models, kind, None):
        types = {known.attribute_map[name]: inner for name, inner in known.openapi_types.items()}
        return {key: keep(entry, types[key]) for key, entry in value.items() if key in types}
    return value


resource = json.load(sys.stdin)
json.dump(keep(resource, KINDS[resource["kind"]]), sys.stdout)
