"""Tensors of the Open Inference Protocol: from a request to an array, and from an array to a response."""

from collections.abc import Mapping
from math import prod

import numpy as np

from tercet.card import Card, Rows, Tensor
from tercet.errors import InvalidInputError
from tercet.proto.inference_pb2 import InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse

CONTENTS = {"UINT8": "uint_contents", "INT64": "int64_contents", "FP32": "fp32_contents"}  # datatype -> typed field
MENTIONED = 4  # of a list that may be very long, in an error
WHERE = "inputs[0][{row}].{feature}"


def decode(request: ModelInferRequest, card: Card) -> Rows:
    """The input tensor of a request, (batch, *shape), in the dtype of the card. Raises InvalidInputError."""
    expected, inputs = card.input, request.inputs
    if len(inputs) != 1 or inputs[0].name != expected.name:
        raise InvalidInputError(
            "inputs", f"{card.name} takes one tensor {expected.name!r}, got {len(inputs)}: {[t.name for t in inputs[:MENTIONED]]}"
        )
    tensor = inputs[0]
    shape = tuple(tensor.shape[: MENTIONED + len(expected.shape)])  # a longer one is wrong, and may be very long
    if tensor.datatype != expected.datatype:
        raise InvalidInputError("inputs[0].datatype", f"{expected.name!r} is {expected.datatype}, got {tensor.datatype!r}")
    if shape[1:] != expected.shape or not shape or shape[0] < 0:
        raise InvalidInputError("inputs[0].shape", f"{expected.name!r} is {[-1, *expected.shape]}, got {list(shape)}")
    if tensor.parameters:
        check_parameters("inputs[0]", tensor.parameters)
    if request.outputs:
        check_outputs(request, card)
    content = request.raw_input_contents  # each access to an entry copies it
    if not content:
        return _from_typed(tensor.contents, expected, prod(shape)).reshape(shape)
    if tensor.HasField("contents") and tensor.contents.ListFields():  # MLServer sends it empty
        raise InvalidInputError("inputs[0].contents", "must be empty when raw_input_contents is used")
    if len(content) != 1:
        raise InvalidInputError("raw_input_contents", f"one entry an input: 1, got {len(content)}")
    return _from_raw(content[0], expected, shape)


def check_parameters(where: str, parameters: Mapping[str, InferParameter]) -> None:
    """Tolerate parameters of a tensor, but for those that say that its contents are elsewhere. Raises InvalidInputError."""
    if "shared_memory_region" in parameters:
        raise InvalidInputError(f"{where}.parameters", "shared memory is not offered; send the contents in the request")


def check_outputs(request: ModelInferRequest, card: Card) -> None:
    """Raise InvalidInputError unless the requested outputs are the one that there is, once."""
    for i, output in enumerate(request.outputs):
        check_parameters(f"outputs[{i}]", output.parameters)
        if output.name != card.output.name:
            raise InvalidInputError(f"outputs[{i}].name", f"{card.name} has no output {output.name!r}; it has {card.output.name!r}")
        if i:
            raise InvalidInputError("outputs", f"{card.output.name!r} is asked for more than once; once is enough")


def _from_raw(content: bytes, expected: Tensor, shape: tuple[int, ...]) -> Rows:
    """The values of an entry of raw_input_contents."""
    wanted = prod(shape) * expected.dtype.itemsize
    if len(content) != wanted:
        raise InvalidInputError(
            "raw_input_contents[0]", f"the shape needs {wanted} bytes of {expected.datatype}, got {len(content)}"
        )
    return np.frombuffer(content, expected.dtype).reshape(shape)


def _from_typed(contents: InferTensorContents, expected: Tensor, wanted: int) -> Rows:
    """The flat values of a typed field."""
    field = CONTENTS[expected.datatype]
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InvalidInputError(f"inputs[0].contents.{descriptor.name}", f"{expected.datatype} goes into {field}")
    sent = getattr(contents, field)
    if len(sent) != wanted:
        raise InvalidInputError(f"inputs[0].contents.{field}", f"the shape needs {wanted} values, got {len(sent)}")
    values = np.array(sent, dtype=np.uint32 if expected.datatype == "UINT8" else expected.dtype)
    if expected.datatype == "UINT8" and values.size and values.max() > np.iinfo(np.uint8).max:
        raise InvalidInputError(f"inputs[0].contents.{field}", f"{values.max()} is no UINT8; use 0 to 255")
    return values.astype(expected.dtype, copy=False)


def encode(rows: Rows, request: ModelInferRequest, card: Card) -> ModelInferResponse:
    """The response with the output tensor, (batch, *shape). Raw contents in, raw contents out; typed in, typed out."""
    output = ModelInferResponse.InferOutputTensor(name=card.output.name, datatype=card.output.datatype, shape=rows.shape)
    raw = []
    if request.raw_input_contents:
        raw.append(rows.tobytes())
    else:
        getattr(output.contents, CONTENTS[card.output.datatype]).extend(rows.ravel().tolist())
    return ModelInferResponse(
        model_name=card.name, model_version=card.version, id=request.id, outputs=[output], raw_output_contents=raw
    )
