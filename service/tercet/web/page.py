"""The page of `tercet demo`: draw a digit, enter measurements, play FizzBuzz. It is a client of the service like any other."""

import base64
import json
import re
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import grpc
import numpy as np
import uvicorn
from fastapi import FastAPI

from tercet.client import Client
from tercet.errors import StartupError

FOLDER = Path(__file__).parent
SHEET, SHEET_SCRIPT, BANNER, ANSWER = (
    (FOLDER / name).read_text() for name in ["sheet.html", "sheet.js", "banner.html", "answer.html"]
)
RECONNECTS = 5  # attempts to classify a drawing while the service is away
HEALTH_CHECK_SECONDS = 2.0  # between two health checks of the service
COUNT_PAUSE_SECONDS, COUNT_MAX_WORDS = 0.1, 100  # between two words of a count, and how many are shown
NO_DIGIT = {"text": " ", "bars": {str(digit): "0.0%" for digit in range(10)}}
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}
DIRECT: Any = {**QUIET, "queue": False}  # one request, one response; only a count needs the queue, which can cancel it
INTEGER = f"a whole number from {-(2**63)} to {2**63 - 1}"
FIELDS = {  # title and normal range: American Diabetes Association (glucose), ACC/AHA (blood pressure), Medscape (insulin), WHO
    "pregnancies": ("Pregnancies", ""),
    "glucose_mg_per_dl": ("Glucose", "normal below 140"),
    "blood_pressure_mm_hg": ("Blood pressure", "normal below 80"),
    "skin_thickness_mm": ("Skin thickness", ""),
    "insulin_mu_u_per_ml": ("Insulin", "normal 16 to 166"),
    "bmi_kg_per_m2": ("Body mass index", "normal 18.5 to 24.9"),
    "pedigree": ("Pedigree", ""),
    "age_years": ("Age", ""),
}


@dataclass(frozen=True)
class Page:
    """The layout of the page and its event handlers."""

    address: str  # of the service
    connect: Callable[[], Client]  # each event opens a client: a channel that stays open would back off while the service is away

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="tercet", analytics_enabled=False) as blocks:
            gr.HTML(f"<h1>tercet</h1><p>Small PyTorch models behind one gRPC service, {escape(self.address)}</p>")
            banner = gr.HTML("", html_template=BANNER)
            with gr.Row():
                with gr.Column(min_width=300):
                    gr.HTML("<h2>Draw a digit</h2>")
                    sheet = gr.HTML("", html_template=SHEET, js_on_load=SHEET_SCRIPT)
                    answer = gr.HTML(NO_DIGIT, html_template=ANSWER)
                described = self._add_diabetes()
                self._add_fizzbuzz()
            sheet.input(self.classify, sheet, answer, trigger_mode="always_last", **DIRECT)
            banner.change(self.classify, sheet, answer, **DIRECT)  # apart: a drawing may still wait for the service
            gr.on([blocks.load, banner.change], self.describe_diabetes, None, described, **DIRECT)
            gr.on([blocks.load, gr.Timer(HEALTH_CHECK_SECONDS).tick], self.check_health, None, banner, **DIRECT)
            blocks.queue(default_concurrency_limit=None)
        return blocks  # type: ignore[no-any-return]

    def _add_diabetes(self) -> list[gr.Component]:
        """Return the components that `describe_diabetes` fills in."""
        with gr.Column(min_width=300, scale=2):
            gr.HTML("<h2>Diabetes risk</h2>")
            description = gr.HTML(html_template="<p>{{value}}</p>")
            with gr.Row(elem_id="measurements"):  # not gr.Number: it starts at 0 and treats text that is not a number as empty
                fields = [gr.Textbox(label=title, min_width=200, max_lines=1) for title, _ in FIELDS.values()]
            button = gr.Button("Assess", variant="primary")
            answer, warning = (gr.HTML({}, html_template=ANSWER) for _ in range(2))
            gr.on([button.click, *(field.submit for field in fields)], self.assess, fields, answer, **DIRECT)
        return [description, warning, *fields]

    def _add_fizzbuzz(self) -> None:
        with gr.Column(min_width=300):
            gr.HTML("<h2>FizzBuzz</h2>")
            number = gr.Textbox("15", label="A whole number", max_lines=1)  # not gr.Number: JavaScript has no 64-bit integers
            button, answer = gr.Button("Answer", variant="primary"), gr.HTML({}, html_template=ANSWER)
            with gr.Row():
                span = [gr.Textbox(v, label=k, min_width=60, max_lines=1) for k, v in (("From", "1"), ("To", "30"), ("Step", "1"))]
            with gr.Row():
                count, stop = gr.Button("Count", variant="primary", min_width=60), gr.Button("Stop", min_width=60)
            words = gr.HTML({}, html_template=ANSWER)
            gr.on([button.click, number.submit], self.answer, number, answer, **DIRECT)
            counting = gr.on([count.click, *(field.submit for field in span)], self.count, span, words, **QUIET)
            stop.click(None, cancels=counting, api_visibility="private")

    def check_health(self) -> str:
        """Return the text of the banner while the service does not answer, else nothing."""
        try:
            with self.connect() as client:
                client.health()
        except grpc.RpcError:
            command = f"tercet serve --port {self.address.rpartition(':')[2]}"
            return f"The service at {self.address} does not answer; start it with `{command}`. This page reconnects automatically."
        return ""

    def describe_diabetes(self) -> list[Any]:
        """Return what the service says about the model: its description, a warning, and each field's unit and range."""
        try:
            with self.connect() as client:
                card = {name: parameter.string_value for name, parameter in client.config("diabetes").parameters.items()}
        except grpc.RpcError:
            return [gr.skip()] * (2 + len(FIELDS))
        ranges = {f["name"]: (f["unit"], f"accepted {f['minimum']:g} to {f['maximum']:g}") for f in json.loads(card["features"])}
        infos = ["; ".join(filter(None, (ranges[name][0], normal, ranges[name][1]))) for name, (_, normal) in FIELDS.items()]
        warning = {"note": f"{card['warning']} {card['intended_use']}"}
        return [f"{card['description']} Leave empty what was not measured.", warning, *(gr.Textbox(info=info) for info in infos)]

    def classify(self, drawing: str) -> dict[str, Any]:
        """Classify a drawing: a PNG file as a data URL, or empty."""
        if not drawing:
            return NO_DIGIT
        for _ in range(RECONNECTS):
            with self._answer() as (client, answer):
                [digit] = client.classify([base64.b64decode(drawing.partition(",")[2])])
                answer |= {"text": str(digit.digit), "bars": {str(i): f"{p:.1%}" for i, p in enumerate(digit.probabilities)}}
            if "text" in answer or (answer["note"] and "failed to connect" not in answer["note"]):
                break
            time.sleep(HEALTH_CHECK_SECONDS)
        return answer

    def assess(self, *values: str) -> dict[str, Any]:
        """Assess one patient; an empty value was not measured."""
        with self._answer() as (client, answer):
            measured = [(name, text) for name, text in zip(FIELDS, values, strict=True) if text.strip()]
            [assessment] = client.assess([{name: parse(text, np.float64, "a number such as 33.6") for name, text in measured}])
            answer |= {"text": assessment.label, "bars": {"positive test": f"{assessment.probability:.1%}"}}
        return answer

    def answer(self, text: str) -> dict[str, Any]:
        with self._answer() as (client, answer):
            [word] = client.answer([parse(text)])
            answer |= {"text": word, "remark": f"model: {word.model}"}
        return answer

    def count(self, *span: str) -> Iterator[dict[str, Any]]:
        """Yield the words so far of a count, each from a call of its own: a stream would end at the deadline."""
        words = deque[str](maxlen=COUNT_MAX_WORDS)
        with self._answer() as (client, answer):
            start, stop, step = map(parse, span)
            if step == 0:
                raise ValueError("Step must not be 0.")
            for number in range(start, stop + (1 if step > 0 else -1), step):
                [word] = client.answer([number])
                words.append(word)
                answer |= {"model": word.model, "words": [*words]}
                yield {**answer}  # a copy: Gradio sends the difference to the previous value
                time.sleep(COUNT_PAUSE_SECONDS)
        yield answer

    @contextmanager
    def _answer(self) -> Iterator[tuple[Client, dict[str, Any]]]:
        """Yield a client and the value of an answer, which gets a note on an error, unless the banner says the same."""
        answer: dict[str, Any] = {}
        try:
            with self.connect() as client:
                yield client, answer
        except ValueError as error:
            answer["note"] = str(error)
        except grpc.RpcError as error:
            text = re.sub(r"^\w+\[0\](\.\w+)?: ", "", str(error.details()))  # without the path, such as `patients[0].age_years: `
            answer["note"] = "" if self.check_health() else re.sub("|".join(FIELDS), lambda name: FIELDS[name[0]][0], text)


def parse(text: str, kind: Callable[[str], Any] = np.int64, expected: str = INTEGER) -> Any:
    """Parse a number with a numpy type. Raises ValueError with a sentence for the visitor."""
    try:
        return kind(text).item()
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not {expected}.") from None


@contextmanager
def service(models: Path) -> Iterator[str]:
    """Run `tercet serve` as a child process and yield its address. Raises StartupError when it does not start."""
    command = [sys.argv[0], "serve", "--port", "0", "--models", str(models), "--grace", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  our own program
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise StartupError("the service of the page did not start; see above, or name a running one with --server")
            yield line.split()[-1]
        finally:
            process.terminate()


def run(page: Page, host: str, port: int) -> None:
    """Serve the page until a signal comes. Raises StartupError when the port is taken."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise StartupError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port with --port") from None
    theme = gr.themes.Base(primary_hue="green", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    options: Any = {"footer_links": [], "run_history": False, "ssr_mode": False, "theme": theme, "css_paths": FOLDER / "page.css"}
    app = gr.mount_gradio_app(FastAPI(), page.build(), "/", **options)
    print(f"tercet demo at http://{host}:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listener])
