"""Start the service on a free port, predict test rows of every model, print the predictions next to the truth, stop it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tercet import Client
from tercet.card import Card, find_models, read_card
from tercet.client import MEASUREMENTS

MODELS = Path("models")


def digits(client: Client, card: Card) -> list[str]:
    """Predict with tercet.v1.Digits."""
    return [str(answer.digit) for answer in client.classify(list(card.example_rows()))]


def diabetes(client: Client, card: Card) -> list[str]:
    """Predict with tercet.v1.Diabetes."""
    rows = card.example_rows().tolist()
    return [answer.label for answer in client.assess([dict(zip(MEASUREMENTS, row, strict=True)) for row in rows])]


def fizzbuzz(client: Client, card: Card) -> list[str]:
    """Predict with tercet.v1.FizzBuzz."""
    return ["number" if word.isdigit() else word for word in client.answer(card.example_rows().tolist())]


TYPED: dict[str, Callable[[Client, Card], list[str]]] = {"mnist": digits, "diabetes": diabetes, "fizzbuzz": fizzbuzz}


def show(client: Client, name: str) -> None:
    """Print the predictions of one model for the test rows in its card."""
    card = read_card(MODELS / name)
    rows = card.example_rows()
    probabilities = client.infer(name, rows)
    inferred = [card.labels[i] for i in probabilities.argmax(axis=1)]
    typed = TYPED[name](client, card) if name in TYPED else inferred
    figures = ", ".join(f"{key} {value:.4g}" for key, value in card.metrics.items())
    print(f"\n{name} (data set: {card.data['source']}; {figures})")
    print(f"  {'truth':10} {'typed':10} {'open inference':15} probability")
    for i, example in enumerate(card.examples):
        row = f"{rows[i]}" if np.ndim(rows[i]) == 0 else ""
        mark = "" if inferred[i] == example.target else "  <- wrong"
        print(f"  {example.target:10} {typed[i]:10} {inferred[i]:15} {probabilities[i].max():.3f} {row}{mark}")


def main() -> int:
    """Run the demonstration; return the service's exit code."""
    command = [str(Path(sys.executable).with_name("tercet")), "serve", "--port", "0", "--models", str(MODELS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:  # noqa: S603  our own program
        line = service.stdout.readline().strip() if service.stdout else ""
        if not line:
            return service.wait()
        print(line)
        try:
            with Client(line.rpartition(" ")[2]) as client:
                for name in find_models(MODELS):
                    show(client, name)
                print("\nfizzbuzz 1 30:", " ".join(word for _, word in client.count(1, 30)))
        finally:
            service.terminate()
    return service.returncode


if __name__ == "__main__":
    sys.exit(main())
