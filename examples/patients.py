"""Patients from a table: `python examples/patients.py [HOST:PORT]`, while `tercet serve` is running."""

# %% [markdown]
# # Patients
# The model estimates the probability of a positive diabetes test from up to eight measurements. It was trained on data from 768
# Pima women: for teaching and benchmarking only, not for medical decisions.

# %%
import csv
import sys
from pathlib import Path

import grpc
from tercet import Client
from tercet.client import MEASUREMENTS

client = Client(sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001")
print(*MEASUREMENTS)

# %% [markdown]
# ## A table with missing values
# Measurements that were not taken are None or left out. The model handles them; nothing is filled in here.

# %%
with Path(__file__).with_name("patients.csv").open() as file:
    table = list(csv.DictReader(file))
patients = [{name: float(row[name]) if row[name] else None for name in MEASUREMENTS} for row in table]
for row, assessment in zip(table, client.assess(patients), strict=True):
    measured = sum(row[name] != "" for name in MEASUREMENTS)
    print(f"{row['id']:5} {measured} of {len(MEASUREMENTS)} measured: {assessment.probability:.1%}, {assessment.label}")

# %% [markdown]
# ## The effect of one measurement
# A batch may have any length; here it is one patient at several levels of glucose.

# %%
levels = range(60, 200, 20)
for level, assessment in zip(levels, client.assess({**patients[1], "glucose_mg_per_dl": level} for level in levels), strict=True):
    print(f"{level:3} mg/dl {'#' * round(40 * assessment.probability)}")

# %% [markdown]
# ## Invalid values
# The client rejects an unknown name before it sends any row; the service rejects a value out of range and names its place.

# %%
try:
    client.assess([{"glucose": 100}])
except ValueError as error:
    print(error)
try:
    client.assess([*patients, {"age_years": 500}])
except grpc.RpcError as error:
    print(error.code().name, error.details())
