"""tercet.v1.Diabetes."""

import numpy as np
import pytest
from tercet.card import Card
from tercet.client import MEASUREMENTS, Client

from tests.conftest import Service
from tests.server.support import answers, labels

pytestmark = pytest.mark.slow


def test_diabetes(service: Service, cards: dict[str, Card]) -> None:
    """Patients get the probability and label of their row; a missing measurement is NaN, and so is an impossible 0."""
    card, column = cards["diabetes"], cards["diabetes"].labels.index("positive")
    patients = [dict(zip(MEASUREMENTS, row.tolist(), strict=True)) for row in card.example_rows()]
    with Client(service.address) as client:
        found = client.assess(patients)
        np.testing.assert_allclose([each.probability for each in found], answers(card)[:, column], rtol=0, atol=1e-5)
        assert [each.label for each in found] == labels(card)
        for missing in ([name] for name in MEASUREMENTS):
            rows = np.where(np.isin(MEASUREMENTS, missing), np.nan, card.example_rows())
            left_out = client.assess([{k: v for k, v in patient.items() if k not in missing} for patient in patients])
            expected = client.infer("diabetes", rows)[:, column]
            np.testing.assert_allclose([each.probability for each in left_out], expected, rtol=0, atol=1e-6)
        [nothing] = client.assess([{}])
        zeros = {"glucose_mg_per_dl", "blood_pressure_mm_hg", "skin_thickness_mm", "insulin_mu_u_per_ml", "bmi_kg_per_m2"}
        assert client.assess([dict.fromkeys(zeros, 0.0)]) == [nothing]
