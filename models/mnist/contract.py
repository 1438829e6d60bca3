"""Handwritten digits: 28 x 28 pixels -> ten probabilities."""

from models.contract import Contract, Feature, Input, Output

INK = Feature(name="pixel", unit="ink (0 = paper, 255 = ink)", minimum=0, maximum=255)

CONTRACT = Contract(
    description="Classifies a handwritten digit in an image of 28 x 28 pixels, centred as in MNIST.",
    input=Input(name="image", datatype="UINT8", shape=(28, 28), features=(INK,)),
    output=Output(name="probabilities", datatype="FP32", shape=(10,)),
    labels=tuple("0123456789"),
)
