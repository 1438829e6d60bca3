"""FizzBuzz: an integer in, the probabilities of the four things to say out."""

from models.contract import Contract, Feature, Input, Output

CONTRACT = Contract(
    description="Says what to say for a number from 0 to 1023: the number itself, fizz, buzz or fizzbuzz.",
    input=Input(
        name="number",
        datatype="INT64",
        shape=(),
        features=(Feature(name="number", unit="", minimum=0, maximum=1023),),
    ),
    output=Output(name="probabilities", datatype="FP32", shape=(4,)),
    labels=("number", "fizz", "buzz", "fizzbuzz"),
)
