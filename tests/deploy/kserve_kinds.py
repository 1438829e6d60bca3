# Runs in the environment of KServe, which `python -m benchmarks.peers --install` makes.
# mypy: ignore-errors
"""Read a resource of KServe as JSON from stdin and write the part that KServe's own classes define.

Objects of Kubernetes inside it are kept as they are.
"""

import json
import re
import sys
from typing import Any

import kserve.models

KINDS = {"ServingRuntime": "V1alpha1ServingRuntime", "InferenceService": "V1beta1InferenceService"}


def keep_defined(value: Any, kind: str) -> Any:
    """Keep the part of a value that its `kind`, in the notation of these classes, defines."""
    if entries := re.fullmatch(r"list\[(.*)\]", kind):
        return [keep_defined(entry, entries[1]) for entry in value]
    if kind in ("str", "bool", "int", "float"):
        return value if type(value).__name__ == kind else None
    if model := getattr(kserve.models, kind, None):
        types = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
        return {key: keep_defined(entry, types[key]) for key, entry in value.items() if key in types}
    return value


resource = json.load(sys.stdin)
json.dump(keep_defined(resource, KINDS[resource["kind"]]), sys.stdout)
