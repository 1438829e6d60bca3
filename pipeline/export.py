"""Turn a checkpoint into the files that are served: model.onnx, model.pt and card.json."""

import hashlib
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch

import models
from models.contract import Contract
from models.network import Predictor
from pipeline.metrics import is_classified, measure
from pipeline.stage import PipelineError, Positive, Section, folder, load_params, load_rows, main, prepared
from pipeline.train import Params as TrainParams
from pipeline.train import build

EXAMPLES = 8  # the card shows the first test rows, and the first of each class


class Params(Section, frozen=True, kw_only=True):
    """Section `export` of params.yaml."""

    opset: Positive


def to_onnx(network: Predictor, contract: Contract, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    """Export a network as one ONNX graph with a dynamic batch axis; equal networks give equal bytes.

    `example` is an input batch of at least two rows. Raises PipelineError when the batch axis would be fixed.
    """
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        external_data=False,
        opset_version=opset,
        input_names=[contract.input.name],
        output_names=[contract.output.name],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    if program is None:
        raise PipelineError("torch.onnx.export gave no program")
    graph = program.model_proto
    for value in (*graph.graph.input, *graph.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise PipelineError(
                f"the batch axis of {value.name!r} is fixed in the ONNX graph: let no shape in forward depend on it"
            )
    strip(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def strip(graph: onnx.ModelProto) -> None:
    """Remove what varies between equal networks: stack traces, source positions, documentation."""
    holders: list[Any] = [
        graph,
        graph.graph,
        *graph.functions,
        *graph.graph.node,
        *graph.graph.value_info,
        *graph.graph.initializer,
    ]
    holders += [*graph.graph.input, *graph.graph.output, *(node for function in graph.functions for node in function.node)]
    for holder in holders:
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")


def git_commit() -> str:
    """The commit of the code, with `-dirty` when code or parameters differ from it; `unknown` outside a repository."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()  # noqa: S607
    changes = ["git", "diff", "--quiet", "HEAD", "--", "models/**.py", "pipeline", "params.yaml", "dvc.yaml"]
    dirty = commit and subprocess.run(changes, capture_output=True, check=False).returncode  # noqa: S603
    return (commit or "unknown") + ("-dirty" if dirty else "")


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file whole: a reader sees the old bytes or the new ones."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def cross_validation(model: str) -> dict[str, Any]:
    """What the stage cross_validate found of the served model; empty where there was none."""
    found = json.loads((folder(model) / "cross_validation.json").read_text())
    return {**{key: found[key] for key in ("rows", "repeats", "folds", "chosen_by")}, **found["models"]["served"]} if found else {}


def describe(model: str, network: Predictor) -> dict[str, Any]:
    """The card but for its `files`: the contract, the figures, where the model comes from, and test rows with their answers."""
    contract: Contract = models.load(model, "contract").CONTRACT
    data = load_rows(model)
    inputs, targets = data["test_inputs"], data["test_targets"]
    with torch.inference_mode():
        answers = network(torch.from_numpy(inputs)).numpy()
    firsts = np.unique(targets, return_index=True)[1].tolist() if is_classified(targets) else []
    params = {section: load_params(model, section, dict[str, Any]) for section in ("prepare", "train", "export")}
    return {
        "name": model,
        "version": "1",
        **asdict(contract),
        "metrics": measure(answers, targets),
        "cross_validation": cross_validation(model),
        "data": {"source": str(data["source"]), "sha256": sha256(prepared(model))},
        "params": params,
        "params_sha256": hashlib.sha256(msgspec.json.encode(params, order="sorted")).hexdigest(),
        "git_commit": git_commit(),
        "examples": [
            {
                "input": inputs[row].tolist(),
                "target": contract.labels[targets[row]] if is_classified(targets) else targets[row].tolist(),
                "output": answers[row].tolist(),
            }
            for row in sorted({*range(min(EXAMPLES, len(targets))), *firsts})
        ],
    }


def label(graph: onnx.ModelProto, card: dict[str, Any]) -> None:
    """Write into an ONNX file where it comes from, what its columns mean and how good it is, as text or JSON."""
    facts = {
        "git_commit": card["git_commit"],
        "data_sha256": card["data"]["sha256"],
        "params_sha256": card["params_sha256"],
        "labels": card["labels"],
        "units": {feature["name"]: feature["unit"] for feature in card["input"]["features"]},
        "metrics": card["metrics"],
    }
    onnx.helper.set_model_props(graph, {name: v if isinstance(v, str) else json.dumps(v) for name, v in facts.items()})


def export(model: str) -> None:
    """Stage: checkpoint.pt -> model.pt, model.onnx, card.json."""
    network = build(model, load_params(model, "train", TrainParams).network).eval()
    network.load_state_dict(torch.load(folder(model) / "checkpoint.pt", weights_only=True))
    torch.save(network.state_dict(), folder(model) / "model.pt")
    example = torch.from_numpy(load_rows(model)["test_inputs"][:2])
    graph = to_onnx(network, models.load(model, "contract").CONTRACT, example, load_params(model, "export", Params).opset)
    card = describe(model, network)
    label(graph, card)
    replace(folder(model) / "model.onnx", graph.SerializeToString(deterministic=True))
    card["files"] = {name: sha256(folder(model) / name) for name in ("model.onnx", "model.pt")}
    replace(folder(model) / "card.json", msgspec.json.format(msgspec.json.encode(card), indent=1))


if __name__ == "__main__":
    main(export)
