"""The page of `tercet demo` in a real browser: strokes, fields, a count, and a service that stops and restarts.

`python -m tests.web.test_page docs/page.png` takes the picture in the README with the models in this folder.
"""

import base64
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tercet.card import read_card
from tercet.client import Client

from tests.conftest import BIN, REPOSITORY, run, serving

pytest.importorskip("gradio", reason="the page needs the extra `demo`")
pytest.importorskip("playwright", reason="its tests need playwright")
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright
from tercet.web.page import FIELDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (Debian: chromium)")]

expect.set_options(timeout=30_000)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK, PHONE = ViewportSize(width=1280, height=960), ViewportSize(width=390, height=844)
STEADY = """() => {  // true once the words have not changed for half a second
  const words = document.querySelectorAll(".words span").length;
  if (window.words !== words) Object.assign(window, {words, since: performance.now()});
  return performance.now() - window.since > 500;
}"""
LOW_CONTRAST = """() => {  // the texts with a contrast below 4.5
  const read = (colour) => (colour.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const light = (colour) => colour.slice(0, 3).map((c) => c / 255)
    .map((c) => c > 0.04045 ? ((c + 0.055) / 1.055) ** 2.4 : c / 12.92)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    const colour = read(getComputedStyle(node).backgroundColor);
    return colour[3] === 0 ? (node.parentElement ? behind(node.parentElement) : [255, 255, 255]) : colour;
  };
  const ratio = (node) => {
    const [dark, bright] = [light(read(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => a - b);
    return (bright + 0.05) / (dark + 0.05);
  };
  const texts = (node) => [...node.childNodes].filter((child) => child.nodeType === Node.TEXT_NODE);
  const own = (node) => node.value ?? texts(node).map((child) => child.data).join("");
  return [...document.querySelectorAll(".gradio-container *")]
    .filter((node) => node.checkVisibility() && own(node).trim() && ratio(node) < 4.5)
    .map((node) => `${own(node)}: ${ratio(node)}`);
}"""
Stroke = Sequence[tuple[float, float]]  # (x, y) from the top left corner, in fractions of the side of the sheet


def arc(x: float, y: float, width: float, height: float, start: int, stop: int) -> list[tuple[float, float]]:
    """Part of an ellipse, in degrees: 0 is right, 90 below."""
    step = 15 if stop > start else -15
    angles = [math.radians(degrees) for degrees in range(start, stop + step, step)]
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


DIGITS: dict[str, list[Stroke]] = {
    "0": [arc(0.5, 0.5, 0.22, 0.33, -90, 270)],
    "1": [[(0.5, 0.15), (0.5, 0.85)]],
    "2": [[*arc(0.48, 0.33, 0.2, 0.17, -170, 40), (0.28, 0.82), (0.75, 0.82)]],
    "3": [[*arc(0.47, 0.32, 0.2, 0.16, -150, 90), *arc(0.47, 0.66, 0.22, 0.18, -90, 150)]],
    "4": [[(0.35, 0.15), (0.27, 0.53), (0.72, 0.53)], [(0.65, 0.15), (0.62, 0.87)]],
    "7": [[(0.25, 0.2), (0.75, 0.2), (0.42, 0.85)]],
}


@contextmanager
def demo(*flags: str) -> Iterator[str]:
    """Run `tercet demo` on a free port and yield its address. SIGTERM must end it, and all that it started, with 0."""
    command = [str(BIN / "tercet"), "demo", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().rpartition(" ")[2].strip()
        finally:
            process.terminate()
        assert process.stdout.read() == ""
    assert process.returncode == 0


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS) as browser:
        yield browser


@contextmanager
def visiting(browser: Browser, url: str, viewport: ViewportSize = DESK, scheme: str = "light") -> Iterator[Page]:
    """Yield the loaded page, which must not contact another host or have a script that fails."""
    urls: list[str] = []
    touch = viewport == PHONE
    with browser.new_context(viewport=viewport, has_touch=touch, is_mobile=touch, color_scheme=scheme) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.on("request", lambda request: urls.append(request.url))
        page.goto(url)
        expect(page.get_by_role("button", name="Count")).to_be_visible()
        yield page
        assert page.page_errors() == []
    assert {address for address in urls if not address.startswith((url, "data:", "blob:"))} == set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def url(workspace: Path) -> Iterator[str]:
    """The address of a page with a service of its own."""
    with demo("--models", str(workspace / "models")) as address:
        yield address


@pytest.fixture(scope="module")
def page(browser: Browser, url: str) -> Iterator[Page]:
    """One page for most tests, since loading it takes longer than using it."""
    with visiting(browser, url) as visited:
        yield visited


@pytest.fixture(scope="module")
def client(page: Page) -> Iterator[Client]:
    """A client of the service that the page uses."""
    with Client(page.get_by_text("behind one gRPC service").inner_text().rpartition(" ")[2]) as opened:
        yield opened


def draw(page: Page, strokes: Sequence[Stroke]) -> None:
    """Clear the sheet and draw with the mouse."""
    page.get_by_role("button", name="Clear").click()
    box = page.locator("canvas").bounding_box()
    assert box
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
            if i == 0:
                page.mouse.down()
        page.mouse.up()


def touch(page: Page, strokes: Sequence[Stroke]) -> None:
    """Draw with a finger."""
    box, finger = page.locator("canvas").bounding_box(), page.context.new_cdp_session(page)
    assert box
    for stroke in strokes:
        for i, (x, y) in enumerate(stroke):
            point = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            finger.send("Input.dispatchTouchEvent", {"type": "touchMove" if i else "touchStart", "touchPoints": [point]})
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def column(page: Page, heading: str) -> Locator:
    """One of the three parts of the page."""
    return page.locator(".column", has=page.get_by_role("heading", name=heading)).last


def fill(page: Page, **values: str) -> None:
    """Fill in the form and send it."""
    for title, _ in FIELDS.values():
        page.get_by_label(title).fill(values.get(title.replace(" ", "_"), ""))
    page.get_by_role("button", name="Assess").click()


@pytest.mark.parametrize("digit", DIGITS)
def test_a_drawn_digit_is_recognised(page: Page, client: Client, digit: str) -> None:
    """A digit drawn with the mouse is recognised, and the ten probabilities are those of the service for the same picture."""
    draw(page, DIGITS[digit])
    expect(column(page, "Draw").get_by_role("status")).to_have_text(digit)
    drawing = page.evaluate("document.querySelector('canvas').toDataURL()")
    [expected] = client.classify([base64.b64decode(drawing.partition(",")[2])])
    expect(column(page, "Draw").get_by_role("definition")).to_have_text([f"{p:.1%}" for p in expected.probabilities])


def test_the_probabilities_move_while_a_digit_is_drawn(page: Page) -> None:
    """There is an answer before the pen leaves the sheet, another at the end, and none when the sheet is cleared."""
    answer, probabilities = (column(page, "Draw").get_by_role(role) for role in ("status", "definition"))
    box = page.locator("canvas").bounding_box()
    assert box
    page.get_by_role("button", name="Clear").click()
    expect(probabilities).to_have_text(["0.0%"] * 10)
    page.mouse.move(box["x"] + 140, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 240, steps=5)
    expect(answer).to_have_text("1")
    before = probabilities.nth(1).inner_text()
    page.mouse.move(box["x"] + 230, box["y"] + 240, steps=5)
    expect(probabilities.nth(1)).not_to_have_text(before)
    page.mouse.up()
    page.get_by_role("button", name="Clear").click()
    expect(answer).to_have_text("")
    expect(probabilities).to_have_text(["0.0%"] * 10)


def test_a_click_draws_a_dot(page: Page) -> None:
    """A click without a movement leaves a mark on the sheet."""
    draw(page, [[(0.5, 0.5)]])
    dark = "document.querySelector('canvas').getContext('2d').getImageData(140, 140, 1, 1).data[0] < 128"
    page.wait_for_function(dark)


def test_a_phone(browser: Browser, url: str) -> None:
    """On a phone nothing is wider than the screen, and a finger draws instead of moving the page."""
    with visiting(browser, url, PHONE) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        touch(page, DIGITS["7"])
        expect(column(page, "Draw").get_by_role("status")).to_have_text("7")
        assert page.evaluate("scrollY") == 0


@pytest.mark.parametrize(
    "values",
    [
        {"Pregnancies": "6", "Glucose": "148", "Blood_pressure": "72", "Skin_thickness": "35", "Insulin": "90"}
        | {"Body_mass_index": "33.6", "Pedigree": "0.627", "Age": "50"},
        {"Glucose": "99", "Age": " 25 "},
        {},
    ],
)
def test_measurements_are_assessed(page: Page, client: Client, workspace: Path, values: dict[str, str]) -> None:
    """The form, complete or not, gives what the client gives, and shows the warning of the model's card."""
    fill(page, **values)
    names = {title.replace(" ", "_"): name for name, (title, _) in FIELDS.items()}
    [expected] = client.assess([{names[title]: float(value) for title, value in values.items()}])
    form = column(page, "Diabetes")
    expect(form.get_by_role("status")).to_have_text(expected.label)
    expect(form.get_by_role("definition")).to_have_text(f"{expected.probability:.1%}")
    expect(form.get_by_text(read_card(workspace / "models" / "diabetes").warning)).to_be_visible()


def test_fields_show_units_and_ranges(page: Page, workspace: Path) -> None:
    """Each field shows the unit and the range from the model's card, and the normal range."""
    for feature in read_card(workspace / "models" / "diabetes").input.features:
        title, normal = FIELDS[feature.name]
        field = page.locator("label", has=page.get_by_label(title))
        expect(field).to_contain_text(feature.unit)
        expect(field).to_contain_text(normal)
        expect(field).to_contain_text(f"accepted {feature.minimum:g} to {feature.maximum:g}")


@pytest.mark.parametrize(
    ("value", "text"),
    [("high", r"^'high' is not a number"), ("<b>", r"^'<b>' is not a number"), ("-1", r"^Glucose must be .*-1")],
)
def test_a_bad_measurement_is_explained(page: Page, value: str, text: str) -> None:
    """A value that is not a valid measurement is never treated as missing."""
    fill(page, Glucose=value)
    expect(column(page, "Diabetes").get_by_text(re.compile(text))).to_be_visible()
    expect(column(page, "Diabetes").get_by_role("definition")).to_have_count(0)


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("15", "fizzbuzz model: fizzbuzz"),
        ("-9223372036854775805", "buzz model: fizzbuzz_any"),
        ("9223372036854775807", "9223372036854775807 model: fizzbuzz_any"),
        ("9223372036854775808", "'9223372036854775808' is not a whole number from -9223372036854775808 to 9223372036854775807"),
        ("2.5", "'2.5' is not a whole number from -9223372036854775808 to 9223372036854775807"),
    ],
)
def test_one_number(page: Page, number: str, answer: str) -> None:
    """Enter sends any 64-bit integer, and the answer names the model."""
    page.get_by_label("A whole number").fill(number)
    page.get_by_label("A whole number").press("Enter")
    expect(column(page, "FizzBuzz")).to_contain_text(answer)


def count(page: Page, start: int, stop: int) -> Locator:
    """Start a count and return its words."""
    page.get_by_label("From").fill(str(start))
    page.get_by_label("To", exact=True).fill(str(stop))
    page.get_by_role("button", name="Count").click()
    return page.locator(".words span")


def test_a_count(page: Page) -> None:
    """The page shows the words of a count in order, with the model that gave the last one."""
    words = [fizzbuzz(number) for number in range(1020, 1027)]
    expect(count(page, 1020, 1026)).to_have_text(words)
    expect(column(page, "FizzBuzz")).to_contain_text("model: fizzbuzz_any")


def test_a_count_can_be_stopped(page: Page) -> None:
    """The words of an endless count appear one by one until Stop, which does not show an error."""
    words = count(page, 1, 2**63 - 1)
    expect(words.nth(14)).to_have_text("fizzbuzz")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function(STEADY, polling=100)
    assert words.all_inner_texts() == [fizzbuzz(number) for number in range(1, words.count() + 1)]
    for error in page.get_by_text("Error").all():
        expect(error).not_to_be_visible()


def fizzbuzz(number: int) -> str:
    return "fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or str(number)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(browser: Browser, workspace: Path, url: str, scheme: str) -> None:
    """Every text has a contrast of 4.5 to its background (WCAG 2.2, 1.4.3), every field a label, and Tab reaches everything."""
    with visiting(browser, url, scheme=scheme) as page:
        fill(page, Age="high")
        expect(page.get_by_text("is not a number")).to_be_visible()
        fill(page, Age="50")
        expect(count(page, 1, 15)).to_have_count(15)
        expect(page.get_by_text(read_card(workspace / "models" / "diabetes").warning)).to_be_visible()
        assert page.evaluate(LOW_CONTRAST) == []
        assert (
            page.evaluate("[...document.querySelectorAll('input, textarea')].filter((field) => !field.labels.length).length") == 0
        )
        page.get_by_role("button", name="Clear").focus()
        order = [
            *(title for title, _ in FIELDS.values()),
            "Assess",
            "A whole number",
            "Answer",
            "From",
            "To",
            "Step",
            "Count",
            "Stop",
        ]
        for name in order:
            page.keyboard.press("Tab")
            assert page.evaluate("(document.activeElement.labels?.[0] ?? document.activeElement).innerText").startswith(name)


def test_the_service_stops_and_restarts(browser: Browser, workspace: Path, tmp_path: Path) -> None:
    """Without its service the page says what to do, and reconnects when the service is back; the token is sent."""
    token = tmp_path / "token"
    token.write_text("secret")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with demo("--server", f"127.0.0.1:{port}", "--token", "secret") as url, visiting(browser, url) as page:
        banner = page.get_by_role("alert")
        expect(banner).to_contain_text(f"does not answer; start it with `tercet serve --port {port}`")
        draw(page, DIGITS["7"])
        fill(page, Glucose="99")
        with serving(workspace / "models", "--port", port, "--token-file", str(token)):
            expect(banner).to_have_count(0)
            expect(column(page, "Draw").get_by_role("status")).to_have_text("7")
            expect(page.get_by_text("accepted 0 to 1000")).to_be_visible()
            fill(page, Age="25")
            expect(column(page, "Diabetes").get_by_role("status")).to_have_text("negative")
            expect(count(page, 1, 5)).to_have_count(5)
        expect(banner).to_be_visible()
        expect(page.locator(".toast-body")).to_have_count(0)


def test_the_picture_in_the_readme(page: Page, tmp_path: Path) -> None:
    """The picture in the README can be taken again, and is small."""
    take_picture(page, tmp_path / "page.png")
    for path in (tmp_path / "page.png", REPOSITORY / "docs" / "page.png"):
        assert path.stat().st_size < 200_000
    assert "docs/page.png" in (REPOSITORY / "README.md").read_text()


def take_picture(page: Page, path: Path) -> None:
    """Use each part of the page, and take a picture."""
    draw(page, DIGITS["3"])
    fill(page, Glucose="148", Body_mass_index="33.6", Age="50")
    page.get_by_role("button", name="Answer").click()
    for part in column(page, "Draw"), column(page, "Diabetes"):
        expect(part.get_by_role("status")).not_to_have_text("")
    expect(count(page, 1, 30)).to_have_count(30)
    page.screenshot(path=path)


def test_a_port_in_use(url: str) -> None:
    """When the page's port is in use, the command ends with one line."""
    command = ("tercet", "demo", "--server", "127.0.0.1:1", "--port", url.rpartition(":")[2])
    done = run(*command, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "choose another port with --port" in done.stdout


def test_without_models(tmp_path: Path) -> None:
    """When its service does not start, the page does not start either."""
    done = run("tercet", "demo", "--port", "0", "--models", str(tmp_path), cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout


def test_without_gradio(tmp_path: Path) -> None:
    """Where Gradio is not installed, the command ends with one line that says what to install."""
    (tmp_path / "gradio.py").write_text("raise ImportError('not installed')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("tercet", "demo", cwd=REPOSITORY, check=False, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["tercet: `tercet demo` needs more packages: pip install '.[serve,demo]' (not installed)"]


if __name__ == "__main__":
    with demo() as address, chromium() as opened, visiting(opened, address) as visited:
        take_picture(visited, Path(sys.argv[1]))
