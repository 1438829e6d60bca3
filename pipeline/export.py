"""Export a trained network to the files that are served: model.onnx and card.json, next to model.pt."""

import json
import subprocess
from typing import Any

import msgspec
import numpy as np
import onnx
import torch

import models
from models.contract import Contract
from models.dataset import Dataset
from models.files import atomic_write, sha256
from models.network import Predictor
from pipeline.common import Paths, PipelineError, Positive, Section, load_params, load_rows, load_sections
from pipeline.metrics import is_classification, measure
from pipeline.train import load_network, predict

EXAMPLES = 8  # first test rows in the card; the first row of each class is added


class Params(Section, frozen=True, kw_only=True):
    opset: Positive


def to_onnx(network: Predictor, contract: Contract, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    """Export a network as an ONNX graph with a dynamic batch axis; equal networks give equal bytes.

    `example` is an input batch of at least two rows. Raises PipelineError when the batch axis is fixed.
    """
    model: onnx.ModelProto = torch.onnx.export(  # type: ignore[union-attr]
        network,
        (example,),
        dynamo=True,
        external_data=False,
        opset_version=opset,
        input_names=[contract.input.name],
        output_names=[contract.output.name],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    ).model_proto
    graph = model.graph
    for value in (*graph.input, *graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise PipelineError(
                f"the ONNX graph fixes the batch axis of {value.name!r}; `forward` must not depend on the batch size"
            )
    # Stack traces, source positions and documentation differ between exports of equal networks.
    parts: list[Any] = [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.checker.check_model(model, full_check=True)
    return model


def git_commit() -> str:
    """The commit of the code, with `-dirty` when code or parameters have changed since; `unknown` outside a repository."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607
    changes = ["git", "diff", "--quiet", "HEAD", "--", "models/**.py", "pipeline", "params.yaml", "dvc.yaml"]
    dirty = commit and subprocess.run(changes, capture_output=True, check=False).returncode  # noqa: S603
    return (commit or "unknown") + ("-dirty" if dirty else "")


def build_card(model: str, network: Predictor, data: Dataset) -> dict[str, Any]:
    """The card without `files`: contract, metrics, origin, and test rows with their predictions."""
    contract: Contract = models.load(model, "contract").CONTRACT
    targets, predictions = data.test_targets, predict(network, data.test_inputs)
    rows, shown = [*range(len(targets))][:EXAMPLES], targets
    if is_classification(targets):
        rows, shown = sorted({*rows, *np.unique(targets, return_index=True)[1].tolist()}), np.array(contract.labels)[targets]
    sections, cross_validation = load_sections(model), {}
    params = {section: sections[section] for section in ("prepare", "train", "export")}
    if "cross_validate" in sections:
        report = json.loads((Paths(model).training / "cross_validation.json").read_text())
        cross_validation = {key: report[key] for key in ("rows", "repeats", "folds", "chosen_by")} | report["models"]["served"]
    return {
        "name": model,
        "version": "1",
        **msgspec.to_builtins(contract),
        "metrics": measure(predictions, targets),
        "cross_validation": cross_validation,
        "data": {"source": data.source, "sha256": sha256(Paths(model).prepared.read_bytes())},
        "params": params,
        "params_sha256": sha256(msgspec.json.encode(params, order="sorted")),
        "git_commit": git_commit(),
        "examples": [
            {"input": data.test_inputs[row].tolist(), "target": shown[row].tolist(), "output": predictions[row].tolist()}
            for row in rows
        ],
    }


def add_metadata(graph: onnx.ModelProto, card: dict[str, Any]) -> None:
    """Add origin, labels, units and metrics to an ONNX graph, as text or JSON."""
    metadata = {
        "git_commit": card["git_commit"],
        "data_sha256": card["data"]["sha256"],
        "params_sha256": card["params_sha256"],
        "labels": card["labels"],
        "units": {feature["name"]: feature["unit"] for feature in card["input"]["features"]},
        "metrics": card["metrics"],
    }
    onnx.helper.set_model_props(graph, {name: v if isinstance(v, str) else json.dumps(v) for name, v in metadata.items()})


def export(model: str) -> None:
    """Stage: model.pt -> model.onnx, card.json."""
    params, folder = load_params(model, "export", Params), Paths(model).trained
    network, data = load_network(model), load_rows(model)
    graph = to_onnx(network, models.load(model, "contract").CONTRACT, torch.from_numpy(data.test_inputs[:2]), params.opset)
    card = build_card(model, network, data)
    add_metadata(graph, card)
    atomic_write(folder / "model.onnx", graph.SerializeToString(deterministic=True))
    card["files"] = {name: sha256((folder / name).read_bytes()) for name in ("model.onnx", "model.pt")}
    atomic_write(folder / "card.json", msgspec.json.format(msgspec.json.encode(card), indent=1))
