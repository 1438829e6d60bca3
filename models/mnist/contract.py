"""Handwritten digits: 28 x 28 pixels of ink in, ten probabilities out."""

from models.contract import Contract, Feature, Input, Output

CONTRACT = Contract(
    description="Recognises a handwritten digit in a picture of 28 x 28 pixels, centred as MNIST's are.",
    input=Input(
        name="image",
        datatype="UINT8",
        shape=(28, 28),
        features=(Feature(name="pixel", unit="ink (0 = paper, 255 = ink)", minimum=0, maximum=255),),
    ),
    output=Output(name="probabilities", datatype="FP32", shape=(10,)),
    labels=tuple("0123456789"),
)
