"""FizzBuzz: any 64-bit integer -> the probabilities of the four answers."""

from models.contract import Contract, Feature, Input, Output

NUMBER = Feature(name="number", unit="", minimum=-(2**63), maximum=2**63 - 1)

CONTRACT = Contract(
    description="Answers number, fizz, buzz or fizzbuzz for any 64-bit integer; the sign is ignored, so -15 is fizzbuzz.",
    input=Input(name="number", datatype="INT64", shape=(), features=(NUMBER,)),
    output=Output(name="probabilities", datatype="FP32", shape=(4,)),
    labels=("number", "fizz", "buzz", "fizzbuzz"),
)
