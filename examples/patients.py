"""Patients from a table: `python examples/patients.py [HOST:PORT]`, beside a service that `tercet serve` has started."""

# %% [markdown]
# # Patients
# The model estimates the probability of a positive diabetes test from up to eight measurements. It was learned from 768 women of
# one community: no basis for a diagnosis.

# %%
import csv
import sys
from pathlib import Path

import grpc
from tercet.client import MEASUREMENTS, Client

client = Client(sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001")
print(*MEASUREMENTS)

# %% [markdown]
# ## A table with gaps
# Tables have gaps. What was not measured is left out, or None: the model knows what to make of that, and nothing is filled in here.

# %%
with Path(__file__).with_name("patients.csv").open() as file:
    table = list(csv.DictReader(file))
patients = [{name: float(row[name]) if row[name] else None for name in MEASUREMENTS} for row in table]
for row, assessment in zip(table, client.assess(patients), strict=True):
    measured = sum(row[name] != "" for name in MEASUREMENTS)
    print(f"{row['id']:5} {measured} of {len(MEASUREMENTS)} measured: {assessment.probability:.1%}, {assessment.label}")

# %% [markdown]
# ## What a measurement does
# A table of any length is answered, here one patient at every level of glucose.

# %%
levels = range(60, 200, 20)
for level, assessment in zip(levels, client.assess({**patients[1], "glucose_mg_per_dl": level} for level in levels), strict=True):
    print(f"{level:3} mg/dl {'#' * round(40 * assessment.probability)}")

# %% [markdown]
# ## What cannot be
# An unknown name is refused before any row is sent; a value that nobody can have is refused by the service, which says where.

# %%
try:
    client.assess([{"glucose": 100}])
except ValueError as error:
    print(error)
try:
    client.assess([*patients, {"age_years": 500}])
except grpc.RpcError as error:
    print(error.code().name, error.details())
