"""The page of `tercet demo`: draw a digit, fill in measurements, play fizzbuzz. A client of the service like any other."""

import base64
import json
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import grpc
import uvicorn
from fastapi import FastAPI

from tercet.client import Client
from tercet.client.codecs import Digit, Word
from tercet.errors import StartupError

LOOK_EVERY = 2.0  # seconds between two looks whether the service is there
LONGEST = 3600.0  # seconds that a count may take
PACE = 0.1  # seconds between two numbers of a count, so that a person can follow
SHOWN = 100  # the last words of a count, which may go on for ever
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}
DIRECT: Any = {**QUIET, "queue": False}  # one request, one response; a count wants the queue: many, that can be cancelled

# Units, and the ranges that are accepted, are told by the service. What is normal, where there is such a thing: American Diabetes
# Association (glucose), ACC/AHA 2017 (blood pressure), Medscape (insulin), WHO (body mass index).
FIELDS = {
    "pregnancies": ("Pregnancies", ""),
    "glucose_mg_per_dl": ("Glucose", "normal below 140"),
    "blood_pressure_mm_hg": ("Blood pressure", "normal below 80"),
    "skin_thickness_mm": ("Skin thickness", ""),
    "insulin_mu_u_per_ml": ("Insulin", "normal 16 to 166"),
    "bmi_kg_per_m2": ("Body mass index", "normal 18.5 to 24.9"),
    "pedigree": ("Pedigree", ""),
    "age_years": ("Age", ""),
}
COUNT = {"From": "1", "To": "30", "Step": "1"}

SHEET = """
<canvas width="280" height="280" role="img" aria-label="A sheet of paper: draw a digit with mouse, finger or pen"></canvas>
<button type="button">Clear</button>
"""
DRAW = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const clear = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, canvas.width, canvas.height); };
const show = (drawing) => { props.value = drawing; trigger("input"); };
const draw = (event) => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  pen.lineTo(x, y);
  pen.stroke();
  pen.beginPath();
  pen.moveTo(x, y);
  show(canvas.toDataURL());
};
clear();
Object.assign(pen, {lineWidth: 22, lineCap: "round", lineJoin: "round"});
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pen.beginPath();
  draw(event);
  draw(event);  // a dot
});
canvas.addEventListener("pointermove", (event) => { if (canvas.hasPointerCapture(event.pointerId)) draw(event); });
element.querySelector("button").addEventListener("click", () => { clear(); show(""); });
"""
STYLE = """
.gradio-container { max-width: 84rem !important; margin: 0 auto; }
.html-container { padding: 0 !important; }
[data-testid="status-tracker"] { display: none !important; }  /* Gradio writes "Error" over a count that was stopped */
h1, h2, h1 + p { margin: 0 !important; }
#measurements label { height: 100%; display: flex; flex-direction: column; }
#measurements .input-container { margin-top: auto; }
canvas { width: 100%; max-width: 280px; aspect-ratio: 1; display: block; margin: 0 auto .6rem; background: white;
  border: 1px solid var(--body-text-color-subdued); border-radius: 8px; touch-action: none; cursor: crosshair; }
canvas + button { display: block; margin: 0 auto; padding: .3rem 1.2rem; color: var(--body-text-color);
  border: 1px solid var(--body-text-color-subdued); border-radius: 6px; background: none; cursor: pointer; }
.bars { display: grid; grid-template-columns: max-content 1fr 4rem; gap: .25rem .6rem; align-items: center; margin: 0; }
.bars dt { margin: 0; }
.bars dd { display: contents; font-variant-numeric: tabular-nums; }
.bars span { text-align: right; }
.bars i { height: .8rem; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.bars b { display: block; height: 100%; background: #15803d; transition: width .15s; }
.said { font-size: 1.6rem; font-weight: 600; margin: 0 0 .4rem; min-height: 2.4rem; }
.said small { font-size: 1rem; font-weight: 400; }
.words { display: flex; flex-direction: column-reverse; max-height: 16rem; overflow-y: auto; }
.words p { display: flex; flex-wrap: wrap; gap: .25rem; margin: 0; }
.words span { padding: 0 .4rem; border-radius: 4px; border: 1px solid var(--border-color-primary); }
.words .fizz { background: #bbf7d0; color: #14532d; }
.words .buzz { background: #bfdbfe; color: #1e3a8a; }
.words .fizzbuzz { background: #fde68a; color: #78350f; }
.note { border-left: 4px solid #d97706; padding: .2rem .8rem; margin: 0; }
.away { border: 2px solid #dc2626; border-radius: 6px; padding: .6rem 1rem; margin: 0; font-weight: 600; }
"""
DECIMAL = "() => document.querySelectorAll('#measurements input').forEach((input) => { input.inputMode = 'decimal'; })"  # on phones


class Page:
    """What the page asks, each question over a channel of its own: one that lasts waits ever longer for a service that is away."""

    def __init__(self, address: str, connect: Callable[..., Client]) -> None:
        """`connect` opens a client of the service at `address`; `timeout` in seconds may be given."""
        self._address, self._connect = address, connect

    def build(self) -> gr.Blocks:
        """Lay out the fields and bind them to the questions."""
        blocks = gr.Blocks(title="tercet", analytics_enabled=False)
        with blocks:
            gr.HTML(f"<h1>tercet</h1><p>Small PyTorch models behind one gRPC service, {escape(self._address)}</p>")
            banner = gr.HTML()
            with gr.Row():
                with gr.Column(min_width=300):
                    self._digits(banner)
                with gr.Column(min_width=300, scale=2):
                    described = self._diabetes(banner)
                with gr.Column(min_width=300):
                    self._fizzbuzz(banner)
            gr.on([blocks.load, banner.change], self.describe, None, described, **DIRECT)
            gr.on([blocks.load, gr.Timer(LOOK_EVERY).tick], self.look, None, banner, **DIRECT)
            blocks.load(js=DECIMAL)
            blocks.queue(default_concurrency_limit=None)
        return blocks

    def _digits(self, banner: gr.HTML) -> None:
        """A sheet of paper, and ten bars that move while it is drawn on."""
        gr.HTML("<h2>Draw a digit</h2>")
        sheet = gr.HTML("", html_template=SHEET, js_on_load=DRAW)
        answer = gr.HTML(read_as())
        sheet.input(self.read, sheet, [answer, banner], trigger_mode="always_last", **DIRECT)
        banner.change(self.read, sheet, [answer, banner], **DIRECT)

    def _diabetes(self, banner: gr.HTML) -> list[gr.Component]:
        """Eight fields, the answer, and a warning beside it; what `describe` fills in."""
        gr.HTML("<h2>Eight measurements</h2>")
        about = gr.HTML()
        with gr.Row(elem_id="measurements"):  # no gr.Number: it starts with 0, and takes what it cannot read for empty
            fields = [gr.Textbox(label=title, min_width=200, max_lines=1) for title, _ in FIELDS.values()]
        assess = gr.Button("Assess", variant="primary")
        answer, warning = gr.HTML(), gr.HTML()
        gr.on([assess.click, *(field.submit for field in fields)], self.assess, fields, [answer, banner], **DIRECT)
        return [about, warning, *fields]

    def _fizzbuzz(self, banner: gr.HTML) -> None:
        """One number, or a count that can be stopped."""
        gr.HTML("<h2>FizzBuzz</h2>")
        number = gr.Textbox("15", label="Any integer of 64 bits", max_lines=1)
        say, answer = gr.Button("Say it", variant="primary"), gr.HTML()
        with gr.Row():
            ends = [gr.Textbox(text, label=label, min_width=60, max_lines=1) for label, text in COUNT.items()]
        with gr.Row():
            count, stop = gr.Button("Count", variant="primary", min_width=60), gr.Button("Stop", min_width=60)
        words = gr.HTML()
        gr.on([say.click, number.submit], self.say, number, [answer, banner], **DIRECT)
        counting = gr.on([count.click, *(end.submit for end in ends)], self.count, ends, [words, banner], **QUIET)
        stop.click(None, cancels=counting, api_visibility="private")

    def look(self) -> str:
        """A sentence when the service does not answer, nothing when it does."""
        try:
            with self._connect() as client:
                client.health()
        except grpc.RpcError:
            command = f"tercet serve --port {self._address.rpartition(':')[2]}"
            sentence = (
                f"The service at {self._address} does not answer; start it with `{command}`, and this page goes on by itself."
            )
            return f'<p class="away" role="alert">{escape(sentence)}</p>'
        return ""

    def describe(self) -> list[Any]:
        """What the service tells of the model: what it does, a warning, and of each field unit and range."""
        try:
            with self._connect() as client:
                parameters = client.config("diabetes").parameters
        except grpc.RpcError:
            return [gr.skip()] * (2 + len(FIELDS))
        told = {name: parameter.string_value for name, parameter in parameters.items()}
        features = {feature["name"]: feature for feature in json.loads(told["features"])}
        return [
            f"<p>{escape(told['description'])} Leave empty what was not measured.</p>",
            note(f"{told['warning']} {told['intended_use']}"),
            *(gr.Textbox(info=explain(features[name], normal)) for name, (_, normal) in FIELDS.items()),
        ]

    def read(self, drawing: str) -> tuple[str, Any]:
        """The probabilities of ten digits, of a PNG file as a data URL or of nothing; what `look` says."""
        if not drawing:
            return read_as(), gr.skip()
        picture = base64.b64decode(drawing.partition(",")[2])
        return self._ask(lambda client: read_as(*client.classify([picture])))

    def assess(self, *values: str) -> tuple[str, Any]:
        """The probability of a positive test, of eight measurements or gaps; what `look` says."""

        def question(client: Client) -> str:
            measured = {name: value for name, value in zip(FIELDS, values, strict=True) if value.strip()}
            [assessment] = client.assess([{name: number(value) for name, value in measured.items()}])
            return said(assessment.label) + bars({"positive test": assessment.probability})

        return self._ask(question)

    def say(self, text: str) -> tuple[str, Any]:
        """What to say for a number, and which model says so; what `look` says."""

        def question(client: Client) -> str:
            [word] = client.answer([whole(text)])
            return said(word, f"said by {word.model}")

        return self._ask(question)

    def count(self, start: str, stop: str, step: str) -> Iterator[tuple[str, Any]]:
        """The words of a count so far, and which model speaks; what `look` says."""
        words: deque[Word] = deque(maxlen=SHOWN)
        try:
            with self._connect(timeout=LONGEST) as client:
                for _, word in client.count(whole(start), whole(stop), whole(step)):
                    words.append(word)
                    yield counted(words), ""
                    time.sleep(PACE)
        except (grpc.RpcError, ValueError) as error:
            reason, away = self._explain(error)
            yield counted(words) + reason, away

    def _ask(self, question: Callable[[Client], str]) -> tuple[str, Any]:
        """The answer, or why there is none; what `look` says."""
        try:
            with self._connect() as client:
                return question(client), ""
        except (grpc.RpcError, ValueError) as error:
            return self._explain(error)

    def _explain(self, error: Exception) -> tuple[str, Any]:
        """Why there is no answer; what `look` says."""
        if not isinstance(error, grpc.RpcError):
            return note(str(error)), gr.skip()
        away = self.look()
        return "" if away else note(str(error.details())), away


def number(text: str) -> float:
    """Read a number. Raises ValueError with a sentence."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number, such as 33.6; leave empty what was not measured.") from None


def whole(text: str) -> int:
    """Read a whole number of 64 bits. Raises ValueError with a sentence."""
    try:
        value = int(text)
    except ValueError:
        value = 2**63
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{text!r} is no whole number of 64 bits: give one from {-(2**63)} to {2**63 - 1}.")
    return value


def read_as(digit: Digit | None = None) -> str:
    """A digit that was read and the probabilities of all ten, or their blank places."""
    probabilities = digit.probabilities if digit else [0.0] * 10
    return said(str(digit.digit) if digit else "") + bars({str(i): p for i, p in enumerate(probabilities)})


def bars(probabilities: Mapping[str, float]) -> str:
    """Names, bars and percents."""
    rows = (
        f'<dt>{name}</dt><dd><i><b style="width:{p:.1%}"></b></i><span>{p:.1%}</span></dd>' for name, p in probabilities.items()
    )
    return f'<dl class="bars">{"".join(rows)}</dl>'


def said(answer: str, remark: str = "") -> str:
    """An answer, read aloud to those who do not see it."""
    return f'<p class="said" role="status">{escape(answer)} <small>{escape(remark)}</small></p>'


def counted(words: deque[Word]) -> str:
    """The words of a count."""
    spans = (f'<span class="{word}">{word}</span>' for word in words)  # the class of a number has no style
    speaker = f"<p>Said by {words[-1].model}:</p>" if words else ""
    return f'{speaker}<div class="words" tabindex="0"><p>{" ".join(spans)}</p></div>'


def note(text: str) -> str:
    """A sentence that explains."""
    return f'<p class="note">{escape(text)}</p>'


def explain(feature: Mapping[str, Any], normal: str) -> str:
    """Unit, normal range and accepted range of a measurement."""
    accepted = f"accepted {feature['minimum']:g} to {feature['maximum']:g}"
    return "; ".join(filter(None, (feature["unit"], normal, accepted)))


@contextmanager
def service(models: Path) -> Iterator[str]:
    """Run `tercet serve` beside this process; the address. Raises StartupError when it does not start."""
    command = [sys.argv[0], "serve", "--port", "0", "--models", str(models), "--grace", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  our own program
        try:
            line = process.stdout.readline().split() if process.stdout else []
            if not line:
                raise StartupError("the page has no service; see above, or name one with --server")
            yield line[-1]
        finally:
            process.terminate()


def run(page: Page, host: str, port: int) -> None:
    """Show the page until a signal comes. Raises StartupError when the port is taken."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise StartupError(
            f"the page cannot be at {host}:{port}: {error.strerror}; choose another with --port, or 0 for a free one"
        ) from None
    theme = gr.themes.Base(primary_hue="green", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(  # what can be read: a contrast of 4.5 or more
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_title_text_color="*neutral_800",
        input_border_width="1px",
        input_border_color="*neutral_500",
        input_border_color_dark="*neutral_400",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )
    app = gr.mount_gradio_app(
        FastAPI(), page.build(), "/", footer_links=[], run_history=False, ssr_mode=False, theme=theme, css=STYLE
    )
    print(f"tercet demo at http://{host}:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listening])
