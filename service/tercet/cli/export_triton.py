"""Trained folders as a model repository of NVIDIA Triton Inference Server, for those who move there.

DIR/<name>/config.pbtxt          tensors, batching
DIR/<name>/labels.txt            one label a line, for Triton's classification extension
DIR/<name>/<version>/model.onnx  the bytes that the card describes
DIR/<name>/<version>/model.py    with the backend `python` only
"""

import json
import shutil
from pathlib import Path

from tercet.card import Card, Tensor, find_models, is_trained, read_card, verify_file
from tercet.errors import StartupError
from tercet.server.config import Config

BACKENDS = ("onnxruntime", "python")


def export(models: Path, target: Path, *, backend: str = "onnxruntime", config: Config | None = None) -> list[str]:
    """Write every trained model of a folder into a new or empty one; return their names.

    `backend` is one of BACKENDS; batches and threads are those of `config`. Raises StartupError when a file is damaged, a version
    is not one that Triton knows, nothing is trained, or there is something in `target`.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StartupError(f"{target} is not empty: name a new folder")
    cards = {name: read_card(models / name) for name in find_models(models) if is_trained(models / name)}
    if not cards:
        raise StartupError(f"no trained model in {models}: run `dvc repro`, or name another folder with --models")
    for name, card in cards.items():
        if not card.version.isdecimal() or int(card.version) < 1:
            raise StartupError(f"{name}: version {card.version!r} is none for Triton, whose versions are 1, 2, 3 ...")
        content = verify_file(models / name, card, "model.onnx")
        (files := target / name / card.version).mkdir(parents=True)
        (files / "model.onnx").write_bytes(content)
        if backend == "python":
            shutil.copyfile(Path(__file__).with_name("triton_model.py"), files / "model.py")
        (target / name / "config.pbtxt").write_text(describe(card, backend, config or Config()))
        if card.labels:
            (target / name / "labels.txt").write_text("".join(f"{label}\n" for label in card.labels))
    return list(cards)


def describe(card: Card, backend: str, config: Config) -> str:
    """A model's config.pbtxt."""
    labels = ' label_filename: "labels.txt"' if card.labels else ""
    return (
        f"name: {json.dumps(card.name)}\n"
        f'backend: "{backend}"\n'
        f"max_batch_size: {config.max_request_rows}\n"
        f"input [ {{ {tensor(card.input)} }} ]\n"
        f"output [ {{ {tensor(card.output)}{labels} }} ]\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {round(config.max_delay * 1e6)} }}\n"
        f'parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{config.threads}" }} }}\n'
    )


def tensor(described: Tensor) -> str:
    """A tensor. Triton knows no rows without axes: a row of a single number gets one there, which the graph does not see."""
    reshape = "" if described.shape else " reshape: { shape: [ ] }"
    dims = list(described.shape) or [1]
    return f"name: {json.dumps(described.name)} data_type: TYPE_{described.datatype} dims: {dims}{reshape}"
