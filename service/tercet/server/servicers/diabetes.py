"""tercet.v1.Diabetes: measurements of patients."""

from typing import Any

import numpy as np

from tercet.card import Card, Rows
from tercet.errors import answers
from tercet.proto import diabetes_pb2_grpc
from tercet.proto.diabetes_pb2 import Assessment, AssessRequest, AssessResponse, Patient
from tercet.server.servicers import Face

POSITIVE = "positive"


class DiabetesServicer(Face, diabetes_pb2_grpc.DiabetesServicer):
    """Answers with the model `diabetes`."""

    @answers
    async def Assess(self, request: AssessRequest, _context: Any) -> AssessResponse:  # noqa: N802
        """Estimate each patient's probability."""
        model = self._repository.get("diabetes")
        model.admit(request.patients, "patients")  # before they are decoded, which takes long for very many
        patients = np.array([decode(patient, model.card) for patient in request.patients], dtype=np.float32)
        return encode(await model.infer(patients, "patients[{row}].{feature}"), model.card)


def decode(patient: Patient, card: Card) -> list[float]:
    """One patient's measurements in the order of the card; NaN where there is none."""
    names = [feature.name for feature in card.input.features]
    return [getattr(patient, name) if patient.HasField(name) else np.nan for name in names]


def encode(probabilities: Rows, card: Card) -> AssessResponse:
    """(batch, 2) -> the response."""
    positive = probabilities[:, card.labels.index(POSITIVE)].tolist()
    labels = [card.labels[i] for i in probabilities.argmax(axis=1)]
    return AssessResponse(assessments=[Assessment(probability=p, label=name) for p, name in zip(positive, labels, strict=True)])
