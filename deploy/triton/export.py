"""`tercet export-triton`.

DIR/<name>/config.pbtxt          tensors, batching
DIR/<name>/labels.txt            one label per line, for Triton's classification extension
DIR/<name>/<version>/model.onnx  the file that the card describes
DIR/<name>/<version>/model.py    only with --backend python
"""

import json
import shutil
from pathlib import Path

import click
from tercet.card import Card, Tensor, find_models, is_trained, read_card, verify_file
from tercet.cli.options import models_option
from tercet.errors import StartupError
from tercet.server.config import Config


@click.command()
@click.argument("target", metavar="DIR", type=Path)
@click.option("--backend", type=click.Choice(["onnxruntime", "python"]), default="onnxruntime", show_default=True)
@models_option
def export_triton(target: Path, backend: str, folder: Path) -> None:
    """Write a model repository for NVIDIA Triton.

    The trained models go into DIR, which must be new or empty. With --backend python Triton runs them in its own Python, with
    onnxruntime from there, for installations without the onnxruntime backend.

    \b
    Examples:
      tercet export-triton triton
      tercet export-triton triton --backend python
    """  # noqa: D301
    names = export(folder, target, backend)
    click.echo(f"{target}: {', '.join(names)}; try: tritonserver --model-repository={target}")


def export(models: Path, target: Path, backend: str) -> list[str]:
    """Write every trained model of a folder into a new or empty one; return their names.

    Batching and threads are the defaults of `tercet serve`. Raises StartupError when nothing is trained, a file is damaged, a
    version is not a positive integer, or `target` is not empty.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise StartupError(f"{target} is not empty: name a new folder")
    cards = [read_card(models / name) for name in find_models(models) if is_trained(models / name)]
    if not cards:
        raise StartupError(f"no trained model in {models}: run `dvc repro`, or name another folder with --models")
    for card in cards:
        if not card.version.isdecimal() or int(card.version) < 1:
            raise StartupError(f"{card.name}: expected a version of 1, 2, 3 ... for Triton, got {card.version!r}")
        content = verify_file(models / card.name, card, "model.onnx")
        (files := target / card.name / card.version).mkdir(parents=True)
        (files / "model.onnx").write_bytes(content)
        if backend == "python":
            shutil.copyfile(Path(__file__).with_name("model.py"), files / "model.py")
        (files.parent / "config.pbtxt").write_text(model_config(card, backend))
        if card.labels:
            (files.parent / "labels.txt").write_text("".join(f"{label}\n" for label in card.labels))
    return [card.name for card in cards]


def model_config(card: Card, backend: str) -> str:
    """The config.pbtxt of a model."""
    config = Config()
    labels = ' label_filename: "labels.txt"' if card.labels else ""
    return f"""\
name: {json.dumps(card.name)}
backend: "{backend}"
max_batch_size: {config.max_request_rows}
input [ {{ {tensor_config(card.input)} }} ]
output [ {{ {tensor_config(card.output)}{labels} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {round(config.max_delay * 1e6)} }}
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{config.threads}" }} }}
"""


def tensor_config(tensor: Tensor) -> str:
    """A tensor; a row of a single number gets an axis, which Triton requires and the graph does not see."""
    reshape = "" if tensor.shape else " reshape: { shape: [ ] }"
    return f"name: {json.dumps(tensor.name)} data_type: TYPE_{tensor.datatype} dims: {list(tensor.shape) or [1]}{reshape}"
