"""Pictures of digits: `python examples/pictures.py [HOST:PORT]`, while `tercet serve` is running."""

# %% [markdown]
# # Pictures
# The service recognises one handwritten digit per picture. It does all the preprocessing: it finds the ink, dark or light, crops
# and scales it, and centres it like the digits of MNIST. So a client sends pictures as they are.

# %%
import sys
from pathlib import Path

import grpc
import numpy as np
from PIL import Image, ImageDraw
from tercet import Client

SEVEN = Path(__file__).with_name("seven.png")
client = Client(sys.argv[1] if sys.argv[1:] else "127.0.0.1:8001")

# %% [markdown]
# ## Files
# A path, or the bytes of a PNG or JPEG file of any size.

# %%
[path, content] = client.classify([SEVEN, SEVEN.read_bytes()])
print(f"{SEVEN.name} shows a {path.digit}, with probability {path.probabilities[path.digit]:.3f}")
print(f"its bytes show a {content.digit}")

# %% [markdown]
# ## PIL
# Any image that was opened or drawn with Pillow.

# %%
drawn = Image.new("RGB", (200, 300), "ivory")
ImageDraw.Draw(drawn).ellipse((50, 60, 150, 240), outline="navy", width=24)
print(f"drawn: {client.classify([drawn])[0].digit}")

# %% [markdown]
# ## numpy
# Pixels as in MNIST, (28, 28) uint8, 0 = paper, 255 = ink, are used as they are. An array of them is a batch, which may have more
# rows than the service accepts per request.

# %%
strokes = np.zeros((10_000, 28, 28), np.uint8)
strokes[:, 4:24, 13:15] = 255
digits = client.classify(strokes)
print(f"{len(digits)} strokes, read as {sorted({digit.digit for digit in digits})}")

# %% [markdown]
# ## More pictures than fit into memory
# `classify_each` reads pictures from an iterator, here at most 32 past the last digit that was consumed.

# %%
turned = (Image.open(SEVEN).rotate(angle, fillcolor=255) for angle in range(-40, 41, 10))
print("turned by -40° to 40°:", *(digit.digit for digit in client.classify_each(turned, ahead=32)))

# %% [markdown]
# ## Invalid pictures
# The client rejects other objects before it sends them; the service rejects an unreadable or blank picture and names its place.

# %%
try:
    client.classify([SEVEN, np.zeros((28, 28))])
except ValueError as error:
    print(error)
try:
    client.classify([SEVEN, Image.new("L", (100, 100), "white")])
except grpc.RpcError as error:
    print(error.code().name, error.details())
