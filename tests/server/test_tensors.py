"""Tensors of the Open Inference Protocol: broken requests, raw and typed contents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from grpc import StatusCode
from tercet.card import DATATYPES, Card, read_card
from tercet.errors import InvalidInputError
from tercet.proto.inference_pb2 import ModelInferRequest
from tercet.proto.inference_pb2_grpc import GRPCInferenceServiceStub
from tercet.server.tensors import decode_request, encode_response

import models
from tests.server.support import MOST, answers, fields, infer_request, refused


def typed(request: ModelInferRequest, field: str) -> None:
    """Send a single zero in a typed field and no raw contents."""
    request.ClearField("raw_input_contents")
    getattr(request.inputs[0].contents, field).append(0)


def batch(request: ModelInferRequest, card: Card, size: int) -> None:
    """Send `size` rows of zeros."""
    request.CopyFrom(infer_request(card, np.zeros((size, *card.input.shape), card.input.dtype)))


def other_field(card: Card) -> str:
    """A typed field of another datatype than the card's."""
    return next(
        field
        for field in sorted(datatype.contents_field for datatype in DATATYPES.values())
        if field != DATATYPES[card.input.datatype].contents_field
    )


Break = Callable[[ModelInferRequest, Card], Any]


# How to break a request (r) for the model of a card (c), the field in the error (none: NOT_FOUND), and a part of its message.
BROKEN: dict[str, tuple[Break, str, str]] = {
    "model": (lambda r, _: setattr(r, "model_name", "nope"), "", "the models are {names}"),
    "version": (lambda r, _: setattr(r, "model_version", "nope"), "", "version {version!r} is served"),
    "no tensor": (lambda r, _: r.ClearField("inputs"), "inputs", "one tensor {input!r}"),
    "two tensors": (lambda r, _: r.inputs.append(r.inputs[0]), "inputs", "one tensor {input!r}"),
    "tensor": (lambda r, _: setattr(r.inputs[0], "name", "nope"), "inputs", "one tensor {input!r}"),
    "datatype": (lambda r, _: setattr(r.inputs[0], "datatype", "FP64"), "inputs[0].datatype", "{input!r} is {datatype}"),
    "rank": (lambda r, _: r.inputs[0].shape.append(1), "inputs[0].shape", "{input!r} is {shape}"),
    "no shape": (lambda r, _: r.inputs[0].ClearField("shape"), "inputs[0].shape", "{input!r} is {shape}"),
    "negative batch": (lambda r, _: r.inputs[0].shape.__setitem__(0, -1), "inputs[0].shape", "{input!r} is {shape}"),
    "batch 0": (lambda r, c: batch(r, c, 0), "inputs[0]", "1 to {most}"),
    "batch too large": (lambda r, c: batch(r, c, MOST + 1), "inputs[0]", "1 to {most}"),
    "batch of 2^62": (lambda r, _: r.inputs[0].shape.__setitem__(0, 2**62), "raw_input_contents[0]", "bytes of {datatype}"),
    "raw too short": (
        lambda r, _: r.raw_input_contents.__setitem__(0, b"."),
        "raw_input_contents[0]",
        "{bytes} bytes of {datatype}",
    ),
    "too many raw": (lambda r, _: r.raw_input_contents.append(b""), "raw_input_contents", "one entry per input, 1 in all"),
    "too few raw": (lambda r, _: r.ClearField("raw_input_contents"), "inputs[0].contents.{field}", "expected {values} values"),
    "raw and typed": (lambda r, _: r.inputs[0].contents.fp32_contents.append(0), "inputs[0].contents", "must be empty"),
    "typed too short": (
        lambda r, c: typed(r, DATATYPES[c.input.datatype].contents_field),
        "inputs[0].contents.{field}",
        "expected {values} values",
    ),
    "wrong typed": (lambda r, c: typed(r, other_field(c)), "inputs[0].contents.{other}", "expected {datatype} values in {field}"),
    "shared": (
        lambda r, _: r.inputs[0].parameters["shared_memory_region"].SetInParent(),
        "inputs[0].parameters",
        "send the contents",
    ),
    "output": (lambda r, _: r.outputs.add(name="nope"), "outputs[0].name", "expected {output!r}"),
    "output twice": (lambda r, c: [r.outputs.add(name=c.output.name) for _ in range(2)], "outputs", "only once"),
}


def card(datatype: str) -> Card:
    """A card whose input has a datatype."""
    tensor = {"name": "x", "datatype": datatype, "shape": [2]}
    feature = {"name": "value", "unit": "", "minimum": 0, "maximum": 9}
    origin = {"params": {}, "params_sha256": "", "git_commit": "", "files": {}, "data": {}, "metrics": {}}
    return msgspec.convert(
        {
            "name": "small",
            "version": "1",
            "description": "",
            "labels": ["a", "b"],
            "examples": [],
            **origin,
            "input": {**tensor, "features": [feature]},
            "output": {**tensor, "name": "y", "datatype": "FP32"},
        },
        Card,
    )


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("raw", [False, True])
def test_contents(datatype: str, *, raw: bool) -> None:
    """Raw and typed contents of every datatype become the same array, and the output comes back in the same form."""
    contract, rows = card(datatype), np.arange(6).reshape(3, 2)
    request = infer_request(contract, rows.astype(contract.input.dtype))
    if not raw:
        request.ClearField("raw_input_contents")
        getattr(request.inputs[0].contents, DATATYPES[datatype].contents_field).extend(rows.ravel().tolist())
    decoded = decode_request(request, contract)
    assert decoded.dtype == contract.input.dtype
    np.testing.assert_array_equal(decoded, rows)
    response = encode_response(rows.astype(np.float32), request, contract)
    [output] = response.outputs
    values = np.frombuffer(response.raw_output_contents[0], "<f4") if raw else output.contents.fp32_contents
    assert list(values) == list(range(6))
    assert bool(output.contents.ListFields()) is not raw


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("case", [case for case, (_, field, _) in BROKEN.items() if field and not case.startswith("batch ")])
def test_broken_requests_are_not_decoded(datatype: str, case: str) -> None:
    """The error names the broken field, for every datatype."""
    contract = card(datatype)
    break_request, field, _ = BROKEN[case]
    request = infer_request(contract, np.zeros((3, 2), contract.input.dtype))
    break_request(request, contract)
    with pytest.raises(InvalidInputError) as caught:
        decode_request(request, contract)
    assert caught.value.field == field.format(field=DATATYPES[datatype].contents_field, other=other_field(contract))


def test_typed_bytes_out_of_range() -> None:
    """Typed UINT8 values, which are 32 bits long on the wire, must be 0 to 255."""
    contract = card("UINT8")
    request = infer_request(contract, np.zeros((1, 2), np.uint8))
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.uint_contents.extend([0, 256])
    with pytest.raises(InvalidInputError, match="must be 0 to 255, got 256"):
        decode_request(request, contract)


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("case", BROKEN)
def test_broken_requests(channel: grpc.Channel, workspace: Path, name: str, case: str) -> None:
    """The client gets the code, the field, and what would be right, whatever is wrong with a request for any model."""
    card = read_card(workspace / "models" / name)
    rows = card.example_rows()
    request = infer_request(card, rows)
    break_request, field, text = BROKEN[case]
    break_request(request, card)
    error = refused(lambda: GRPCInferenceServiceStub(channel).ModelInfer(request))
    right = {
        "names": ", ".join(models.names()),
        "version": card.version,
        "input": card.input.name,
        "output": card.output.name,
        "datatype": card.input.datatype,
        "shape": [-1, *card.input.shape],
        "bytes": rows.nbytes,
        "values": rows.size,
        "field": DATATYPES[card.input.datatype].contents_field,
        "other": other_field(card),
        "most": MOST,
    }
    assert error.code() == (StatusCode.INVALID_ARGUMENT if field else StatusCode.NOT_FOUND)
    assert fields(error) == ([field.format(**right)] if field else [])
    assert text.format(**right) in error.details()


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_typed_contents(channel: grpc.Channel, cards: dict[str, Card], name: str) -> None:
    """Typed contents in, typed contents out, with the outputs in the card."""
    card, rows = cards[name], cards[name].example_rows()
    request = ModelInferRequest(model_name=name)
    given = request.inputs.add(name=card.input.name, datatype=card.input.datatype, shape=rows.shape)
    getattr(given.contents, DATATYPES[card.input.datatype].contents_field).extend(rows.ravel().tolist())
    response = GRPCInferenceServiceStub(channel).ModelInfer(request)
    [output] = response.outputs
    assert not response.raw_output_contents
    values = np.reshape(getattr(output.contents, DATATYPES[card.output.datatype].contents_field), tuple(output.shape))
    np.testing.assert_allclose(values, answers(card), rtol=0, atol=1e-5)
