"""tercet.v1.Diabetes: measurements of patients."""

from typing import Any

import numpy as np

from tercet.card import Card, Rows
from tercet.proto import diabetes_pb2 as pb
from tercet.proto import diabetes_pb2_grpc
from tercet.server.rpc import BaseServicer


class DiabetesServicer(BaseServicer, diabetes_pb2_grpc.DiabetesServicer):
    """Answers with the model `diabetes`."""

    async def Assess(self, request: pb.AssessRequest, _context: Any) -> pb.AssessResponse:
        model = self.repository.get("diabetes")
        model.check_row_count(request.patients, "patients")  # before decoding, which is slow for very many
        rows = np.array([decode_patient(patient, model.card) for patient in request.patients], dtype=np.float32)
        return encode_response(await model.infer(rows, "patients[{row}].{feature}"), model.card)


def decode_patient(patient: pb.Patient, card: Card) -> list[float]:
    """The measurements in the order of the card; NaN where there is none."""
    names = [feature.name for feature in card.input.features]
    return [getattr(patient, name) if patient.HasField(name) else np.nan for name in names]


def encode_response(probabilities: Rows, card: Card) -> pb.AssessResponse:
    """(batch, 2) -> the response."""
    positive = probabilities[:, card.labels.index("positive")].tolist()
    labels = [card.labels[i] for i in probabilities.argmax(axis=1)]
    return pb.AssessResponse(
        assessments=[pb.Assessment(probability=p, label=name) for p, name in zip(positive, labels, strict=True)]
    )
