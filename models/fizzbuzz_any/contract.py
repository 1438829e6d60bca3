"""FizzBuzz for every integer of 64 bits: an integer in, the probabilities of the four things to say out."""

from models.contract import Contract, Feature, Input, Output

CONTRACT = Contract(
    description="Says what to say for any integer of 64 bits; a negative one is read by its magnitude, so -15 is fizzbuzz.",
    input=Input(
        name="number",
        datatype="INT64",
        shape=(),
        features=(Feature(name="number", unit="", minimum=-(2**63), maximum=2**63 - 1),),
    ),
    output=Output(name="probabilities", datatype="FP32", shape=(4,)),
    labels=("number", "fizz", "buzz", "fizzbuzz"),
)
