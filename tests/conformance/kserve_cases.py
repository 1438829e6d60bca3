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
    """Call everything that the client offers, for every model; exit with 1 at the first wrong response."""
    async with InferenceGRPCClient(address) as client:
        check(await client.is_server_live() and await client.is_server_ready(), "the server is live and ready")
        for card in cards:
            check(await client.is_model_ready(card["name"]), f"{card['name']} is ready")
            for raw in (False, True):
                await infer(client, card, raw=raw)
        for call in (client.is_model_ready("nope"), client.infer(InferRequest("nope", []))):
            try:
                await call
                check(condition=False, what="an unknown model is NOT_FOUND")
            except grpc.aio.AioRpcError as error:
                check(error.code() == grpc.StatusCode.NOT_FOUND, f"an unknown model is NOT_FOUND: {error.details()}")


async def infer(client: InferenceGRPCClient, card: dict[str, Any], *, raw: bool) -> None:
    """Infer the examples in a card."""
    rows = np.array([example["input"] for example in card["examples"]], DTYPES[card["input"]["datatype"]])
    tensor = InferInput(card["input"]["name"], list(rows.shape), card["input"]["datatype"])
    tensor.set_data_from_numpy(rows, binary_data=raw)
    response = await client.infer(InferRequest(card["name"], [tensor], request_id="7"))
    [output] = response.outputs
    values = output.as_numpy().reshape(output.shape)
    right = np.allclose(values, [example["output"] for example in card["examples"]], rtol=0, atol=1e-5)
    check(right and response.id == "7", f"{card['name']} infers {'raw' if raw else 'typed'} contents")


def check(condition: bool, what: str) -> None:  # noqa: FBT001  the condition is the point
    """Print a check that passed, or exit with 1."""
    print(f"{'ok' if condition else 'WRONG'}: {what}", flush=True)
    if not condition:
        sys.exit(1)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [json.loads(path.read_text()) for path in sorted(Path(sys.argv[2]).glob("*/card.json"))]))
