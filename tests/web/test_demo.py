"""The page of `tercet demo` in a real browser: strokes, fields, a count, and a service that goes and comes back.

`python -m tests.web.test_demo docs/page.png` takes the picture in the README, of the models in this folder.
"""

import base64
import math
import os
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
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")

expect.set_options(timeout=30_000)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE = ViewportSize(width=1280, height=960), ViewportSize(width=390, height=844)
REST = """() => {  // true once the words have stood still for half a second
  const words = document.querySelectorAll(".words span").length;
  if (window.words !== words) Object.assign(window, {words, since: performance.now()});
  return performance.now() - window.since > 500;
}"""
CONTRAST = """() => {  // the texts that are hard to read
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
Stroke = Sequence[tuple[float, float]]  # parts of the sheet's side, from its top left corner


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
    """Run `tercet demo` on a free port; its address. SIGTERM must end it, and all that it started, with 0."""
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
    """A browser."""
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET) as browser:
        yield browser


@contextmanager
def visiting(browser: Browser, url: str, viewport: ViewportSize = DESK, scheme: str = "light") -> Iterator[Page]:
    """The page, once it is there; it must ask no other host for anything, and its scripts must not fail."""
    asked: list[str] = []
    touch = viewport == PHONE
    with browser.new_context(viewport=viewport, has_touch=touch, is_mobile=touch, color_scheme=scheme) as context:  # type: ignore[arg-type]
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        expect(page.get_by_role("button", name="Count")).to_be_visible()
        yield page
        assert page.page_errors() == []
    assert {address for address in asked if not address.startswith((url, "data:", "blob:"))} == set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests."""
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def url(workspace: Path) -> Iterator[str]:
    """A page with a service of its own."""
    with demo("--models", str(workspace / "models")) as address:
        yield address


@pytest.fixture(scope="module")
def page(browser: Browser, url: str) -> Iterator[Page]:
    """One visit for most tests: to load the page takes longer than to use it."""
    with visiting(browser, url) as visited:
        yield visited


@pytest.fixture(scope="module")
def client(page: Page) -> Iterator[Client]:
    """A client of the service that the page names."""
    with Client(page.get_by_text("behind one gRPC service").inner_text().rpartition(" ")[2]) as opened:
        yield opened


def draw(page: Page, strokes: Sequence[Stroke]) -> None:
    """Draw with the mouse, on a clean sheet."""
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
def test_a_drawn_digit_is_read(page: Page, client: Client, digit: str) -> None:
    """A digit drawn with the mouse is read, and the ten probabilities are those that the service gives the picture."""
    draw(page, DIGITS[digit])
    expect(column(page, "Draw").get_by_role("status")).to_have_text(digit)
    drawing = page.evaluate("document.querySelector('canvas').toDataURL()")
    [read] = client.classify([base64.b64decode(drawing.partition(",")[2])])
    expect(column(page, "Draw").get_by_role("definition")).to_have_text([f"{p:.1%}" for p in read.probabilities])


def test_the_probabilities_move_while_a_digit_is_drawn(page: Page) -> None:
    """There is an answer before the pen leaves the sheet, another at the end, and none when the sheet is clean again."""
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
def test_measurements_are_assessed(page: Page, client: Client, values: dict[str, str]) -> None:
    """The form, with gaps or without, gives what the client gives, and the warning of the model's card stands beside it."""
    fill(page, **values)
    names = {title.replace(" ", "_"): name for name, (title, _) in FIELDS.items()}
    [expected] = client.assess([{names[title]: float(value) for title, value in values.items()}])
    form = column(page, "Eight")
    expect(form.get_by_role("status")).to_have_text(expected.label)
    expect(form.get_by_role("definition")).to_have_text(f"{expected.probability:.1%}")
    expect(form.get_by_text("no basis for a diagnosis")).to_be_visible()


def test_fields_tell_units_and_ranges(page: Page, workspace: Path) -> None:
    """Beside each field stand the unit and the range in the card of the model, and what is normal."""
    for feature in read_card(workspace / "models" / "diabetes").input.features:
        title, normal = FIELDS[feature.name]
        field = page.locator("label", has=page.get_by_label(title))
        expect(field).to_contain_text(feature.unit)
        expect(field).to_contain_text(normal)
        expect(field).to_contain_text(f"accepted {feature.minimum:g} to {feature.maximum:g}")


@pytest.mark.parametrize(
    ("value", "sentence"), [("high", "'high' is no number"), ("<b>", "'<b>' is no number"), ("-1", "glucose_mg_per_dl must be")]
)
def test_bad_measurements_are_answered_with_a_sentence(page: Page, value: str, sentence: str) -> None:
    """What cannot be a measurement is never taken for a gap."""
    fill(page, Glucose=value)
    expect(column(page, "Eight").get_by_text(sentence)).to_be_visible()
    expect(column(page, "Eight").get_by_role("definition")).to_have_count(0)


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("15", "fizzbuzz said by fizzbuzz"),
        ("-9223372036854775805", "buzz said by fizzbuzz_any"),
        ("9223372036854775807", "9223372036854775807 said by fizzbuzz_any"),
        ("9223372036854775808", "'9223372036854775808' is no whole number of 64 bits"),
        ("2.5", "'2.5' is no whole number of 64 bits"),
    ],
)
def test_one_number(page: Page, number: str, answer: str) -> None:
    """Any whole number of 64 bits is answered, with the model that said so, at a press of Enter."""
    page.get_by_label("Any integer").fill(number)
    page.get_by_label("Any integer").press("Enter")
    expect(column(page, "FizzBuzz")).to_contain_text(answer)


def count(page: Page, start: int, stop: int) -> Locator:
    """Start a count; its words."""
    page.get_by_label("From").fill(str(start))
    page.get_by_label("To", exact=True).fill(str(stop))
    page.get_by_role("button", name="Count").click()
    return page.locator(".words span")


def test_a_count(page: Page) -> None:
    """The words of a count stand on the page in order, with the model that spoke last."""
    words = [fizzbuzz(number) for number in range(1020, 1027)]
    expect(count(page, 1020, 1026)).to_have_text(words)
    expect(column(page, "FizzBuzz")).to_contain_text("Said by fizzbuzz_any:")


def test_a_count_can_be_stopped(page: Page) -> None:
    """The words of an endless count appear as they come, and after Stop no more do; to stop is no error."""
    words = count(page, 1, 2**63 - 1)
    expect(words.nth(14)).to_have_text("fizzbuzz")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_function(REST, polling=100)
    assert words.all_inner_texts() == [fizzbuzz(number) for number in range(1, words.count() + 1)]
    for error in page.get_by_text("Error").all():
        expect(error).not_to_be_visible()


def fizzbuzz(number: int) -> str:
    """What is right to say."""
    return "fizz" * (number % 3 == 0) + "buzz" * (number % 5 == 0) or str(number)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_read_it(browser: Browser, url: str, scheme: str) -> None:
    """Every text has a contrast of 4.5 to its background (WCAG 2.2, 1.4.3), every field a label, and the keyboard reaches all."""
    with visiting(browser, url, scheme=scheme) as page:
        fill(page, Age="high")
        expect(page.get_by_text("is no number")).to_be_visible()
        fill(page, Age="50")
        expect(count(page, 1, 15)).to_have_count(15)
        expect(page.get_by_text("no basis for a diagnosis")).to_be_visible()
        assert page.evaluate(CONTRAST) == []
        assert (
            page.evaluate("[...document.querySelectorAll('input, textarea')].filter((field) => !field.labels.length).length") == 0
        )
        page.get_by_role("button", name="Clear").focus()
        order = [*(title for title, _ in FIELDS.values()), "Assess", "Any integer", "Say it", "From", "To", "Step", "Count", "Stop"]
        for name in order:
            page.keyboard.press("Tab")
            assert page.evaluate("(document.activeElement.labels?.[0] ?? document.activeElement).innerText").startswith(name)


def test_the_service_goes_and_comes_back(browser: Browser, workspace: Path, tmp_path: Path) -> None:
    """Without its service the page says so and what to do, and goes on by itself when the service is back; the token is sent."""
    token = tmp_path / "token"
    token.write_text("secret")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    with demo("--server", f"127.0.0.1:{port}", "--token", "secret") as url, visiting(browser, url) as page:
        away = page.get_by_role("alert")
        expect(away).to_contain_text(f"does not answer; start it with `tercet serve --port {port}`")
        draw(page, DIGITS["7"])
        fill(page, Glucose="99")
        with serving(workspace / "models", "--port", port, "--token-file", str(token)):
            expect(away).to_have_count(0)
            expect(column(page, "Draw").get_by_role("status")).to_have_text("7")
            expect(page.get_by_text("accepted 0 to 1000")).to_be_visible()
            fill(page, Age="25")
            expect(column(page, "Eight").get_by_role("status")).to_have_text("negative")
            expect(count(page, 1, 5)).to_have_count(5)
        expect(away).to_be_visible()
        expect(page.locator(".toast-body")).to_have_count(0)


def test_the_picture_in_the_readme(page: Page, tmp_path: Path) -> None:
    """The picture that the README shows can be taken again, and is small."""
    portray(page, tmp_path / "page.png")
    for path in (tmp_path / "page.png", REPOSITORY / "docs" / "page.png"):
        assert path.stat().st_size < 200_000
    assert "(docs/page.png)" in (REPOSITORY / "README.md").read_text()


def portray(page: Page, path: Path) -> None:
    """Play a little, and take a picture."""
    draw(page, DIGITS["3"])
    fill(page, Glucose="148", Body_mass_index="33.6", Age="50")
    page.get_by_role("button", name="Say it").click()
    for text in column(page, "Draw"), column(page, "Eight"):
        expect(text.get_by_role("status")).not_to_have_text("")
    expect(count(page, 1, 30)).to_have_count(30)
    page.screenshot(path=path)


def test_a_taken_port_is_answered_with_a_sentence(url: str) -> None:
    """When the page's port is taken, the command ends in one sentence."""
    command = ("tercet", "demo", "--server", "127.0.0.1:1", "--port", url.rpartition(":")[2])
    done = run(*command, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "choose another with --port" in done.stdout


def test_no_models_no_page(tmp_path: Path) -> None:
    """When its service does not start, the page does not either."""
    done = run("tercet", "demo", "--port", "0", "--models", str(tmp_path), cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout


def test_without_its_packages_it_says_what_to_install(tmp_path: Path) -> None:
    """Where Gradio is not installed, the command ends in one sentence."""
    (tmp_path / "gradio.py").write_text("raise ImportError('not installed')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("tercet", "demo", cwd=REPOSITORY, check=False, PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["tercet: the page needs more packages: pip install 'tercet[serve,demo]' (not installed)"]


if __name__ == "__main__":
    with demo() as address, chromium() as opened, visiting(opened, address) as visited:
        portray(visited, Path(sys.argv[1]))
