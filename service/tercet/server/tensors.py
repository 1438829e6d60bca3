"""Tensors of the Open Inference Protocol: from a request to an array, and from an array to a response."""

from math import prod

import numpy as np

from tercet.card import DATATYPES, Card, Rows, Tensor
from tercet.errors import InvalidInputError
from tercet.proto import inference_pb2 as pb

MAX_QUOTED_ENTRIES = 4  # of a list that may be very long, in an error message
NO_SHARED_MEMORY = "shared memory is not supported; send the contents in the request"
INPUT_FIELD = "inputs[0][{row}].{feature}"  # for Model.infer


def decode_request(request: pb.ModelInferRequest, card: Card) -> Rows:
    """The input tensor of a request, (batch, *shape), in the dtype of the card. Raises InvalidInputError."""
    expected, inputs = card.input, request.inputs
    if len(inputs) != 1 or inputs[0].name != expected.name:
        names = [tensor.name for tensor in inputs[:MAX_QUOTED_ENTRIES]]
        raise InvalidInputError("inputs", f"{card.name}: expected one tensor {expected.name!r}, got {len(inputs)}: {names}")
    tensor = inputs[0]
    shape = tuple(tensor.shape[: MAX_QUOTED_ENTRIES + len(expected.shape)])  # a longer one is wrong anyway
    if tensor.datatype != expected.datatype:
        raise InvalidInputError("inputs[0].datatype", f"{expected.name!r} is {expected.datatype}, got {tensor.datatype!r}")
    if shape[1:] != expected.shape or not shape or shape[0] < 0:
        raise InvalidInputError("inputs[0].shape", f"{expected.name!r} is {[-1, *expected.shape]}, got {list(shape)}")
    if "shared_memory_region" in tensor.parameters:
        raise InvalidInputError("inputs[0].parameters", NO_SHARED_MEMORY)
    if request.outputs:
        check_outputs(request, card)
    contents = request.raw_input_contents  # each access to an entry copies it
    if not contents:
        return _from_typed(tensor.contents, expected, prod(shape)).reshape(shape)
    if tensor.HasField("contents") and tensor.contents.ListFields():  # MLServer sends it empty
        raise InvalidInputError("inputs[0].contents", "must be empty when raw_input_contents is used")
    if len(contents) != 1:
        raise InvalidInputError("raw_input_contents", f"expected one entry per input, 1 in all; got {len(contents)}")
    content, size = contents[0], prod(shape) * expected.dtype.itemsize
    if len(content) != size:
        text = f"expected {size} bytes of {expected.datatype} for this shape, got {len(content)}"
        raise InvalidInputError("raw_input_contents[0]", text)
    return np.frombuffer(content, expected.dtype).reshape(shape)


def check_outputs(request: pb.ModelInferRequest, card: Card) -> None:
    """Raise InvalidInputError unless the model's one output is requested, once."""
    for i, output in enumerate(request.outputs):
        if "shared_memory_region" in output.parameters:
            raise InvalidInputError(f"outputs[{i}].parameters", NO_SHARED_MEMORY)
        if output.name != card.output.name:
            raise InvalidInputError(f"outputs[{i}].name", f"{card.name}: expected {card.output.name!r}, got {output.name!r}")
        if i:
            raise InvalidInputError("outputs", f"{card.output.name!r} must be requested only once")


def _from_typed(contents: pb.InferTensorContents, expected: Tensor, size: int) -> Rows:
    """(size,) from the typed field of the datatype."""
    field = DATATYPES[expected.datatype].contents_field
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise InvalidInputError(f"inputs[0].contents.{descriptor.name}", f"expected {expected.datatype} values in {field}")
    values = getattr(contents, field)
    if len(values) != size:
        raise InvalidInputError(f"inputs[0].contents.{field}", f"expected {size} values for this shape, got {len(values)}")
    array = np.array(values, dtype=np.uint32 if expected.datatype == "UINT8" else expected.dtype)
    if expected.datatype == "UINT8" and array.size and array.max() > np.iinfo(np.uint8).max:
        raise InvalidInputError(f"inputs[0].contents.{field}", f"UINT8 must be 0 to 255, got {array.max()}")
    return array.astype(expected.dtype, copy=False)


def encode_response(output: Rows, request: pb.ModelInferRequest, card: Card) -> pb.ModelInferResponse:
    """The response with the output tensor, (batch, *shape): raw contents for a raw request, typed contents for a typed one."""
    response = pb.ModelInferResponse(model_name=card.name, model_version=card.version, id=request.id)
    tensor = response.outputs.add(name=card.output.name, datatype=card.output.datatype, shape=output.shape)
    if request.raw_input_contents:
        response.raw_output_contents.append(output.tobytes())
    else:
        getattr(tensor.contents, DATATYPES[card.output.datatype].contents_field).extend(output.ravel().tolist())
    return response
