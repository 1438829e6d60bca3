"""Any model, by its tensors: `python examples/any_model.py [HOST:PORT]`, while `tercet serve` is running."""

# %% [markdown]
# # Any model
# Every model of the service speaks the Open Inference Protocol: a tensor in, a tensor out. `infer` requests the model's input
# contract once and sends the rows as a numpy array; a model of your own (docs/add-a-model.md) needs no other client.

# %%
import sys

import numpy as np
from tercet import Client

client = Client(sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001")

# %% [markdown]
# ## A batch
# The first axis is the batch; the output has probabilities, in the order of the labels in the model's card.json.

# %%
labels = np.array(["number", "fizz", "buzz", "fizzbuzz"])
probabilities = client.infer("fizzbuzz", range(1, 16))  # (15,) -> (15, 4)
print(*labels[probabilities.argmax(axis=1)])

# %% [markdown]
# ## A large batch
# A batch with more rows than the service accepts per request is sent in chunks and comes back as one array.

# %%
noise = np.random.default_rng(0).integers(0, 256, (6000, 28, 28), np.uint8)
probabilities = client.infer("mnist", noise)  # (6000, 28, 28) -> (6000, 10)
print(f"{len(probabilities)} pictures of noise, of which {(probabilities.max(axis=1) > 0.9).sum()} look like a digit")

# %% [markdown]
# ## A stream of rows
# Rows are read from a generator as the predictions are consumed.

# %%
random = np.random.default_rng(0)
patients = ([4, random.uniform(60, 200), 70, np.nan, np.nan, 32, 0.5, 40] for _ in range(1000))
positive = [probabilities[1] for probabilities in client.infer_each("diabetes", patients, ahead=100)]
print(f"{len(positive)} made-up patients: {np.mean(positive):.0%} of tests would be positive")

# %% [markdown]
# ## Invalid rows
# The client knows the model's tensor and rejects an invalid row before it sends it.

# %%
for rows in ([[1, 2, 3]], [1.5]):
    try:
        client.infer("fizzbuzz", rows)
    except ValueError as error:
        print(error)
