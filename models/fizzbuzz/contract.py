"""FizzBuzz: an integer from 0 to 1023 -> the probabilities of the four answers."""

from models.contract import Contract, Feature, Input, Output

CONTRACT = Contract(
    description="Answers number, fizz, buzz or fizzbuzz for an integer from 0 to 1023.",
    input=Input(name="number", datatype="INT64", shape=(), features=(Feature(name="number", unit="", minimum=0, maximum=1023),)),
    output=Output(name="probabilities", datatype="FP32", shape=(4,)),
    labels=("number", "fizz", "buzz", "fizzbuzz"),
)
