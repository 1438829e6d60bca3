"""KServe's InferenceGRPCClient against a service: `python kserve_cases.py ADDRESS FOLDER`, in KServe's environment."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

DTYPES = {"UINT8": np.uint8, "INT64": np.int64, "FP32": np.float32}


async def main(address: str, cards: list[dict[str, Any]]) -> None:
    """Ask for everything that the client can, for every model; raise when an answer is not right."""
    async with InferenceGRPCClient(address) as client:
        check(await client.is_server_live() and await client.is_server_ready(), "the server is live and ready")
        for card in cards:
            check(await client.is_model_ready(card["name"]), f"{card['name']} is ready")
            for raw in (False, True):
                await infer(client, card, raw=raw)
        for call in (client.is_model_ready("nope"), client.infer(InferRequest("nope", []))):
            try:
                await call
                check(condition=False, what="a model that there is not is refused")
            except grpc.aio.AioRpcError as error:
                check(error.code() == grpc.StatusCode.NOT_FOUND, f"a model that there is not is refused: {error.details()}")


async def infer(client: InferenceGRPCClient, card: dict[str, Any], *, raw: bool) -> None:
    """Ask for the answers of a card."""
    rows = np.array([example["input"] for example in card["examples"]], DTYPES[card["input"]["datatype"]])
    tensor = InferInput(card["input"]["name"], list(rows.shape), card["input"]["datatype"])
    tensor.set_data_from_numpy(rows, binary_data=raw)
    response = await client.infer(InferRequest(card["name"], [tensor], request_id="7"))
    [output] = response.outputs
    answers = output.as_numpy().reshape(output.shape)
    right = np.allclose(answers, [example["output"] for example in card["examples"]], rtol=0, atol=1e-5)
    check(right and response.id == "7", f"{card['name']} answers {'raw' if raw else 'typed'} contents")


def check(condition: bool, what: str) -> None:  # noqa: FBT001  the condition is the point
    """Print what was found right, or end."""
    print(f"{'ok' if condition else 'WRONG'}: {what}", flush=True)
    if not condition:
        sys.exit(1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [json.loads(path.read_text()) for path in sorted(Path(sys.argv[2]).glob("*/card.json"))]))
