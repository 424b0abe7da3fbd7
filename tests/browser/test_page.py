"""The page for people in a real browser: every panel, keyboard alone, a phone, errors, keys, and accessibility."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from tests.browser.conftest import CONTROL, INFER, ROOT, Opened
from training.evaluation.served import started

pytestmark = pytest.mark.browser
MOST_BYTES = 120_000
STROKE_MS = 150
MOST_PICTURE_BYTES = 290_000
EXAMPLES = ROOT / "examples"
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}
PICTURES = os.environ.get("BROWSER_PICTURES", "")

Room = Callable[..., Opened]
Open = Callable[..., AbstractContextManager[Opened]]
Expect = Callable[..., Any]


def pixels(page: Any, selector: str) -> NDArray[np.uint8]:
    """What a canvas holds, as (height, width, 3)."""
    script = "selector => document.querySelector(selector).toDataURL('image/png').split(',')[1]"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(page.evaluate(script, selector)))).convert("RGB"))


def picture(content: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(content)))


def saved_by(page: Any, button: str) -> tuple[str, bytes]:
    """Name and content of the file that a button saves."""
    with page.expect_download() as saved:
        page.click(button)
    return saved.value.suggested_filename, Path(saved.value.path()).read_bytes()


def radio(page: Any, name: str) -> Any:
    return page.get_by_role("radio", name=name)


def restored(page: Any, expect: Expect) -> str:
    """Wait for the answer; return what the page says of it."""
    expect(page.locator("#busy")).to_be_hidden()
    expect(page.locator("#restore-status")).to_contain_text(re.compile(r"\d s"))
    return str(page.inner_text("#restore-status"))


def take(page: Any, expect: Expect, name: str) -> str:
    """Take an example and wait for its restoration."""
    page.click(f"[data-example='{name}']")
    expect(page.locator("#file-name")).to_contain_text(name)
    return restored(page, expect)


def snippet(page: Any, place: str, language: str) -> str:
    """The call of a panel in a language."""
    details = page.locator(f"{place} details.call").first
    if details.get_attribute("open") is None:
        details.locator("summary").click()
    details.get_by_role("radio", name=language, exact=True).check()
    return str(details.locator("code").inner_text())


def run(code: str, language: str, folder: Path) -> None:
    """Run a call as a person does who pastes it."""
    if language == "JavaScript":
        if not shutil.which("node"):
            pytest.skip("needs node")
        (folder / "call.mjs").write_text(code)
        command = ["node", "call.mjs"]
    else:
        command = ["bash", "-euc", code] if language == "curl" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + code


def test_the_page_loads_in_little(room: Room, expect: Expect) -> None:
    """Less than 120 KB for everything, the list of models too, and its first room is there."""
    found = room("")
    expect(found.page.get_by_role("heading", name="Restore a picture")).to_be_visible()
    found.page.wait_for_load_state("networkidle")
    sizes = found.page.evaluate(
        "() => [...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
        ".map(one => [one.transferSize, one.decodedBodySize])"
    )
    sent, held = (sum(column) for column in zip(*sizes, strict=True))
    assert 10_000 < sent < MOST_BYTES
    print(f"page: {sent} bytes sent, {held} without compression, {len(sizes)} files")  # noqa: T201  # `make browser-test` shows it


def test_a_photograph_is_restored(room: Room, expect: Expect, photo: str) -> None:
    """An example shows its answer with the level found; the right side is less noisy than the left one."""
    page = room("restore").page
    told = take(page, expect, "photograph.png")
    assert told.startswith(photo)
    level = float(page.inner_text("#level-text"))
    assert 0.07 < level < 0.12, "its noise has a deviation of 25 levels"
    expect(page.locator("#level-hint")).to_contain_text("gaussian")
    page.locator("#divide").fill("100")
    before = pixels(page, "#view")
    page.locator("#divide").fill("0")
    after = pixels(page, "#view")
    assert roughness(after) < roughness(before) / 2


def roughness(image: NDArray[np.uint8]) -> float:
    """Mean difference of neighbours, where the picture is."""
    seen = image[:, np.flatnonzero(image.any((0, 2)))].astype(float)
    return float(np.abs(np.diff(seen, axis=1)).mean())


def test_both_sides_keep_in_step(room: Room, expect: Expect, photo: str) -> None:
    """Zoomed and moved, what is before lies exactly where what is after does; the samples show the same part."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    page.locator("#view").focus()
    for key in ("+", "+", "+", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    assert int(page.inner_text("#zoom").split()[0]) > 150
    page.locator("#divide").fill("100")
    before = pixels(page, "#view").astype(float)
    page.locator("#divide").fill("0")
    after = pixels(page, "#view").astype(float)

    def apart(shift: int) -> float:
        return float(np.square(before[:, 40:-40] - np.roll(after, shift, 1)[:, 40:-40]).mean())

    here = apart(0)
    assert all(here < apart(shift) for shift in (-24, -12, 12, 24))
    page.locator("#view").press("0")
    expect(page.locator("#zoom")).to_have_text("100 %")


def test_the_divider_follows_pointer_and_keys(room: Room, expect: Expect, photo: str) -> None:
    """A drag on the picture and the arrow keys on the slider move the same divider."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    box = page.locator("#view").bounding_box()
    middle = box["y"] + box["height"] / 3
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, middle, steps=4)
    page.mouse.up()
    expect(page.locator("#divide")).to_have_value("25")
    page.locator("#divide").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#divide")).to_have_value("26")


def test_the_level_can_be_changed(room: Room, expect: Expect, photo: str) -> None:
    """The slider sends its level with the kind that was found; `find it again` leaves both out."""
    found = room("restore")
    page = found.page
    take(page, expect, "photograph.png")
    page.locator("#divide").fill("0")
    first = pixels(page, "#view")
    with page.expect_response(lambda answer: "level=0.25" in answer.url) as asked:
        page.locator("#level").fill("50")
    assert "noise=gaussian" in asked.value.url
    assert f"/v1/models/{photo}/denoise" in asked.value.url
    assert "level 0.25" in restored(page, expect)
    assert roughness(pixels(page, "#view")) < roughness(first), "a larger level is smoothed more"
    page.click("#level-auto")
    expect(page.locator("#level-hint")).to_contain_text("Found")
    assert "level=" not in found.requests[-1]


def test_a_brushed_region_is_filled_in(room: Room, expect: Expect, photo: str) -> None:
    """What lies under the brush changes; every other pixel stays as it was sent."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    radio(page, "Fill in").check()
    expect(page.locator("#run")).to_be_disabled()
    box = page.locator("#view").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=5)
    page.mouse.up()
    mask = picture(saved_by(page, "#mask-save")[1])[..., 0]
    assert set(np.unique(mask)) == {0, 255}
    assert 0.005 < (mask == 0).mean() < 0.1
    page.click("#run")
    restored(page, expect)
    sent, answer = picture((EXAMPLES / "astronaut.png").read_bytes()), picture(saved_by(page, "#save-png")[1])
    assert np.array_equal(answer[mask == 255], sent[mask == 255])
    assert (answer[mask == 0] != sent[mask == 0]).mean() > 0.9
    radio(page, "Eraser").check()
    page.click("#brush-clear")
    expect(page.locator("#run")).to_be_disabled()


def test_a_picture_is_enlarged(room: Room, expect: Expect, photo: str) -> None:
    """Twice as high and wide; the download is the service's answer."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    radio(page, "Enlarge").check()
    restored(page, expect)
    name, content = saved_by(page, "#save-png")
    assert name == "photograph-enlarged.png"
    assert picture(content).shape == (512, 512, 3)


def test_samples_stand_side_by_side(room: Room, expect: Expect, photo: str) -> None:
    """Four draws, all different; one that is chosen takes the place of the answer, and its call names its seed."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    page.click("#draw-samples")
    expect(page.locator("#samples button")).to_have_count(4)
    expect(page.locator("#busy")).to_be_hidden()
    shown = [pixels(page, f"#samples button:nth-child({k}) canvas") for k in range(1, 5)]
    assert all((shown[0] != other).any() for other in shown[1:])
    page.click("#samples button:nth-child(3)")
    expect(page.locator("#tag-after")).to_have_text("Sample")
    assert "seed=3" in snippet(page, "#restore-call", "curl")
    page.click("#samples button:nth-child(3)")
    expect(page.locator("#tag-after")).to_have_text("Restored")


def test_uncertainty_is_a_heat_map(room: Room, expect: Expect, photo: str) -> None:
    """The map stands in place of the answer, with its scale; pressed again, the answer is back."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    page.locator("#divide").fill("0")
    answer = pixels(page, "#view")
    page.click("#uncertainty")
    expect(page.locator("#uncertainty")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#legend-top")).to_contain_text(re.compile(r"±0\.\d+"))
    assert (pixels(page, "#view") != answer).mean() > 0.3
    page.click("#uncertainty")
    expect(page.locator("#legend")).to_be_hidden()
    assert np.array_equal(pixels(page, "#view"), answer)


def test_refined_work_streams_in(room: Room, expect: Expect) -> None:
    """Steps and their images come before the answer, which is better than the fast one: another picture."""
    page = room("restore").page
    take(page, expect, "noisy.png")
    fast = pixels(page, "#view")
    page.evaluate(
        "() => { window.said = new Set(); new MutationObserver(() => window.said.add("
        "document.querySelector('#restore-status').textContent)).observe(document.querySelector('#restore-status'), "
        "{ childList: true }); }"
    )
    with page.expect_response(lambda answer: "quality=refined" in answer.url and "preview=true" in answer.url) as asked:
        radio(page, "Refined").check()
    restored(page, expect)
    assert asked.value.headers["content-type"].startswith("application/x-ndjson")
    steps = [text for text in page.evaluate("() => [...window.said]") if re.fullmatch(r"step \d+ of \d+", text)]
    assert len(steps) > 2
    assert (pixels(page, "#view") != fast).any()


def test_work_can_be_stopped(room: Room, expect: Expect, photo: str, tmp_path: Path) -> None:
    """Stop ends the request; the page stays usable."""
    assert photo
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)).save(tmp_path / "large.png")
    page = room("restore").page
    radio(page, "Refined").check()
    page.set_input_files("#file", tmp_path / "large.png")
    expect(page.locator("#stop")).to_be_visible()
    page.click("#stop")
    expect(page.locator("#restore-status")).to_have_text("stopped")
    radio(page, "Fast").check()
    page.click("#stop")
    take(page, expect, "photograph.png")


def test_a_tiff_of_16_bits_keeps_them(room: Room, expect: Expect, photo: str) -> None:
    """The service draws its preview; the 16-bit download is a TIFF of 16 bits, the PNG one of 16."""
    assert photo
    page = room("restore").page
    with page.expect_response(lambda answer: "/preview" in answer.url) as asked:
        take(page, expect, "moon.tif")
    assert asked.value.headers["content-type"] == "image/png"
    expect(page.locator("#file-name")).to_contain_text("shown by the service")
    name, content = saved_by(page, "#save-deep")
    deep = tifffile.imread(io.BytesIO(content))
    assert (name, deep.dtype, deep.shape) == ("moon-restored.tiff", np.uint16, (192, 192))
    assert np.array_equal(picture(saved_by(page, "#save-png")[1]), deep)
    page.click("details.more summary")
    with page.expect_response(lambda answer: "/preview" in answer.url and "scale=0,40000" in answer.url):
        page.fill("#scale", "0,40000")
        page.keyboard.press("Tab")
    restored(page, expect)


def test_8_bits_can_be_saved_as_16(room: Room, expect: Expect, photo: str, url: str) -> None:
    """The PNG that the page writes holds the numbers of the model, rounded to 16 bits."""
    page = room("restore").page
    take(page, expect, "photograph.png")
    deep = imagecodecs.png_decode(saved_by(page, "#save-deep")[1])  # of which Pillow reads 8 bits
    headers = {"accept": "application/x-npy"}
    content = (EXAMPLES / "astronaut.png").read_bytes()
    answer = httpx.post(f"{url}/v1/models/{photo}/denoise", headers=headers, files={"file": content}, timeout=60)
    numbers = np.load(io.BytesIO(answer.content))[0].transpose(1, 2, 0)
    assert (deep.dtype, deep.shape) == (np.uint16, (256, 256, 3))
    assert np.abs(deep - 65535.0 * numbers.clip(0, 1)).max() <= 0.51


DROP = """([name, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type: "image/png" }));
  for (const kind of ["dragover", "drop"]) {
    const event = new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true });
    document.querySelector("#drop").dispatchEvent(event);
  }
}"""


def test_files_can_be_dropped(room: Room, expect: Expect) -> None:
    """A dropped file is restored as an opened one is."""
    page = room("restore").page
    expect(page.locator("#restore-model")).not_to_be_empty()
    content = base64.b64encode((EXAMPLES / "noisy.png").read_bytes()).decode()
    page.evaluate(DROP, ["dropped.png", content])
    expect(page.locator("#file-name")).to_contain_text("dropped.png, 28")
    restored(page, expect)


def draw_seven(page: Any) -> list[int]:
    """Draw a seven with the mouse; returns how long the answers took, in milliseconds."""
    box = page.locator("#draw canvas").first.bounding_box()

    def at(x: float, y: float) -> tuple[float, float]:
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    times = []
    page.mouse.move(*at(0.28, 0.25))
    page.mouse.down()
    for place in ((0.5, 0.25), (0.72, 0.25), (0.66, 0.4), (0.58, 0.55), (0.5, 0.7), (0.46, 0.82)):
        page.mouse.move(*at(*place), steps=4)
        page.wait_for_timeout(120)
        times.append(int(page.locator("#draw [data-out=ms]").get_attribute("data-ms") or -1))
    page.mouse.up()
    return times


def test_a_stroke_shows_its_answer_at_once(room: Room, expect: Expect) -> None:
    """The reconstruction of a stroke is there within 150 ms, the score follows, and a seven is a likely image."""
    page = room("explore").page
    expect(page.locator("#wall canvas")).to_be_visible()
    page.wait_for_load_state("networkidle")
    times = draw_seven(page)
    expect(page.locator("#draw [data-out=percentile]")).to_have_text(re.compile(r"\d+ %"))
    assert 0 < median(times) < STROKE_MS, times
    print(f"stroke: {median(times):.0f} ms, {times}")  # noqa: T201  # `make browser-test` shows it
    drawn, seen = (pixels(page, f"#draw figure:nth-child({k}) canvas")[..., 0].astype(float) for k in (1, 2))
    assert drawn.shape == seen.shape == (28, 28)
    assert np.corrcoef(drawn.ravel(), seen.ravel())[0, 1] > 0.6
    expect(page.locator("#draw [data-out=elbo]")).to_contain_text("nats")
    page.click("#draw [data-do=clear]")
    expect(page.locator("#draw [data-out=percentile]")).not_to_contain_text("%")


def test_the_map_follows_the_pointer(room: Room, expect: Expect, url: str) -> None:
    """The image under the pointer is what the API decodes there; a drawing has its place on the map."""
    page = room("explore").page
    expect(page.locator("#map .point")).to_be_visible()
    box = page.locator("#map canvas.sheet").bounding_box()
    with page.expect_response(lambda answer: "/decode" in answer.url):
        page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.75 * box["height"])
    expect(page.locator("#map [data-out=z]")).to_have_text("-0.84, -0.67")
    page.wait_for_timeout(300)
    model = page.locator("#map select").input_value()
    z = [-0.842, -0.674]
    answer = httpx.post(f"{url}/v1/models/{model}/decode", json={"latents": [z]}, headers={"accept": "image/png"})
    seen = pixels(page, "#map figure.small canvas")[..., 0].astype(int)
    assert np.abs(seen - picture(answer.content)).max() <= 3, "the pointer lies within a pixel of this point"
    page.locator("#map canvas.sheet").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#map [data-out=z]")).not_to_have_text("-0.84, -0.67")
    expect(page.locator("#map .place")).to_be_hidden()
    page.click("#draw [data-do=example]")
    expect(page.locator("#map .place")).to_be_visible()


def test_any_latent_has_a_slider(room: Room, expect: Expect) -> None:
    """Ten at a time, to the last; a moved one changes the image, and the drawing can be where they begin."""
    page = room("explore").page
    sliders = page.locator("#latents .sliders input")
    expect(sliders).to_have_count(10)
    before = pixels(page, "#latents canvas")
    for _ in range(3):
        page.click("#latents [data-do=after]")
    expect(page.locator("#latents [data-out=range]")).to_have_text("30 to 39 of 40")
    expect(page.locator("#latents [data-do=after]")).to_be_disabled()
    with page.expect_response(lambda answer: "/decode" in answer.url):
        sliders.nth(9).fill("3.5")
    page.wait_for_timeout(300)
    assert (pixels(page, "#latents canvas") != before).any()
    assert '3.5]], "fingerprint"' in snippet(page, "#latents", "Python")
    page.click("#latents [data-do=drawing]")
    expect(page.locator("#latents [data-problem]")).to_contain_text("Draw something above first")
    page.click("#draw [data-do=example]")
    with page.expect_response(lambda answer: "/mnist/encode" in answer.url):
        page.click("#latents [data-do=drawing]")
    expect(page.locator("#latents [data-problem]")).to_be_empty()
    page.click("#latents [data-do=zero]")
    expect(page.locator("#latents .sliders output").first).to_have_text("0.00")
    page.locator("#latents select").select_option("mnist-ladder")
    expect(page.locator("#latents [data-out=range]")).to_have_text("0 to 9 of 2776")


def test_a_walk_goes_from_image_to_image(room: Room, expect: Expect) -> None:
    """Its first and last steps resemble the ends; ends may be samples, files and the drawing."""
    page = room("explore").page
    expect(page.locator("#walk .strip")).to_have_attribute("width", "448")
    page.set_input_files("#walk input[type=file][data-end='0']", EXAMPLES / "digit.png")
    page.click("#draw [data-do=example]")
    with page.expect_response(lambda answer: "/interpolate" in answer.url):
        page.click("#walk [data-do=sample][data-end='1']")
    page.wait_for_timeout(300)
    strip = pixels(page, "#walk .strip")[..., 0].astype(float)
    digit = picture((EXAMPLES / "digit.png").read_bytes()).astype(float)
    assert np.corrcoef(strip[:, :28].ravel(), digit.ravel())[0, 1] > 0.8
    end = pixels(page, "#walk figure:nth-child(3) canvas")[..., 0].astype(float)
    assert np.corrcoef(strip[:, -28:].ravel(), end.ravel())[0, 1] > 0.8
    page.locator("#walk input[type=range]").fill("15")
    assert np.array_equal(pixels(page, "#walk .between canvas")[..., 0], strip[:, -28:])
    with page.expect_response(lambda answer: "/interpolate" in answer.url):
        page.click("#walk [data-do=drawing][data-end='1']")


def test_the_wall_has_seed_and_temperature(room: Room, expect: Expect, url: str) -> None:
    """It is the sheet that the API draws for its seed, its number and its temperature."""
    page = room("explore").page
    expect(page.locator("#wall canvas")).to_have_attribute("width", "168")
    with page.expect_response(lambda answer: "/sample" in answer.url and "temperature=0.5" in answer.url):
        page.locator("#wall [data-in=temperature]").fill("50")
    with page.expect_response(lambda answer: "count=16" in answer.url):
        page.locator("#wall [data-in=count]").select_option("16")
    with page.expect_response(lambda answer: "seed=11" in answer.url):
        page.locator("#wall [data-in=seed]").fill("11")
    page.wait_for_timeout(300)
    answer = httpx.post(f"{url}/v1/sample?count=16&seed=11&temperature=0.5", headers={"accept": "image/png"})
    assert np.array_equal(pixels(page, "#wall canvas")[..., 0], picture(answer.content))
    with page.expect_response(lambda answer: "/sample" in answer.url):
        page.click("#wall [data-do=shuffle]")
    expect(page.locator("#wall [data-in=seed]")).not_to_have_value("11")


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_calls_give_the_same_answers(room: Room, expect: Expect, photo: str, language: str, tmp_path: Path) -> None:
    """What every panel prints runs as it stands and gives the picture that the panel shows."""
    assert photo
    page = room("restore").page
    take(page, expect, "photograph.png")
    shutil.copy(EXAMPLES / "astronaut.png", tmp_path / "photograph.png")
    run(snippet(page, "#restore-call", language), language, tmp_path)
    assert (tmp_path / "restored.png").read_bytes() == saved_by(page, "#save-png")[1]
    page.get_by_role("link", name="Explore").click()
    expect(page.locator("#walk .strip")).to_have_attribute("width", "448")
    page.click("#draw [data-do=example]")
    expect(page.locator("#draw [data-out=percentile]")).to_have_text(re.compile(r"\d+ %"))
    page.wait_for_timeout(500)
    for panel, name, canvas in (
        ("#wall", "samples", "#wall canvas"),
        ("#latents", "image", "#latents canvas"),
        ("#map", "image", "#map figure.small canvas"),
    ):
        run(snippet(page, panel, language), language, tmp_path)
        got = picture((tmp_path / f"{name}.png").read_bytes())
        assert np.array_equal(got, pixels(page, canvas)[..., 0]), panel
    run(snippet(page, "#draw", language), language, tmp_path)
    run(snippet(page, "#walk", language), language, tmp_path)
    assert picture((tmp_path / "walk.png").read_bytes()).shape == (112, 112)
    page.get_by_role("link", name="Operate").click()
    expect(page.locator("#models section").first).to_be_visible()
    for place in ("#may-call", "#metrics-call", "#models-call"):
        run(snippet(page, place, language), language, tmp_path)


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_a_call_quotes_any_name_of_a_file(room: Room, expect: Expect, language: str, tmp_path: Path) -> None:
    """Shells, curl and both languages have characters of their own."""
    page = room("restore").page
    file = tmp_path / 'it\'s; a "scan", $HOME \\ 2.png'
    shutil.copy(EXAMPLES / "noisy.png", file)
    page.set_input_files("#file", file)
    restored(page, expect)
    run(snippet(page, "#restore-call", language), language, tmp_path)
    assert (tmp_path / "restored.png").read_bytes() == saved_by(page, "#save-png")[1]


def test_the_copy_button_copies(room: Room, expect: Expect, url: str) -> None:
    """The clipboard holds the call."""
    found = room("explore", permissions=["clipboard-read", "clipboard-write"])
    page = found.page
    expect(page.locator("#wall canvas")).to_have_attribute("width", "168")
    code = snippet(page, "#wall", "curl")
    page.locator("#wall details.call").get_by_role("button", name="Copy").click()
    expect(page.locator("#wall details.call [role=status]")).to_have_text("copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    assert url in code


def test_operators_see_models_load_and_refusals(room: Room, expect: Expect, url: str) -> None:
    """Models with cards, counts and rates that grow with the load, and a refusal with its reason."""
    page = room("operate").page
    models = httpx.get(f"{url}/v1/models").json()["models"]
    expect(page.locator("#models section")).to_have_count(len(models))
    expect(page.locator("#may")).to_contain_text("needs no key")
    card = page.locator("[aria-label='Model mnist'] details.card")
    card.locator("summary").click()
    expect(card.locator("h4").first).to_be_visible()
    expect(card.locator("canvas")).to_have_attribute("width", re.compile(r"^(?!300$)\d+$"))
    assert httpx.post(f"{url}/v1/models/mnist/encode", content=b"nothing").status_code == 415
    assert httpx.post(f"{url}/v1/models/mnist/sample?size=3").status_code == 422
    refused = page.locator("#refused tr", has_text="invalid_option")
    expect(refused).to_contain_text("mnist sample")
    expect(refused).to_contain_text("An option is unknown")
    for _ in range(30):
        httpx.post(f"{url}/v1/models/mnist/sample?count=1&seed=1")
    expect(page.locator("#gauge-rate")).not_to_have_text("0.0")
    expect(page.locator("#rates tr", has_text="sample").first).to_contain_text("mnist")
    expect(page.locator("#gauges polyline")).to_have_count(3)


def test_models_are_loaded_and_unloaded(room: Room, expect: Expect, url: str) -> None:
    """The buttons do it on the service, and say in how many workers; the states follow."""
    page = room("operate").page
    model = page.locator("[aria-label='Model mnist-ladder']")
    page.get_by_role("button", name="Unload mnist-ladder version 1").click()
    expect(page.locator("#control-status")).to_contain_text("done in 1 of 1")
    expect(model.locator(".badge")).to_have_text("unloaded")
    assert httpx.get(f"{url}/v1/models/mnist-ladder").json()["versions"] == []
    page.get_by_role("button", name="Load mnist-ladder version 1").click()
    expect(model.locator(".badge")).to_have_text("ready")
    assert httpx.get(f"{url}/v1/models/mnist-ladder").json()["versions"] == ["1"]


def test_metrics_may_be_elsewhere(opened: Open, expect: Expect, small_models: Path) -> None:
    """With a port of their own for metrics, the page says that it cannot see them, and asks no more."""
    settings = {"VAE_OPS_PORT": "0"}
    with started(VAE_MODELS=str(small_models), **settings) as (_, url), opened(f"{url}/#operate") as found:
        expect(found.page.locator("#metrics-problem")).to_contain_text("VAE_OPS_PORT")
        expect(found.page.locator("#may")).to_contain_text("VAE_MODEL_CONTROL")
        expect(found.page.get_by_role("button", name="Unload mnist-2d version 1")).to_be_disabled()
        found.page.wait_for_timeout(5000)
        assert found.refused == ["404 metrics"] * len(found.refused)
        assert len(found.refused) <= 2
        assert found.faults == []


def test_a_key_is_asked_for_once_and_kept_in_memory(opened: Open, expect: Expect, locked: str) -> None:
    """A wrong one is refused with its reason; the right one works in every room, and is gone after a reload."""
    with opened(f"{locked}/#explore") as found:
        page = found.page
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        page.fill("#key", "guessed-0123456789")
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_contain_text("the API key is not known")
        page.fill("#key", INFER)
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#wall canvas")).to_have_attribute("width", "168")
        assert 'Authorization: Bearer $KEY"' in snippet(page, "#wall", "curl")
        assert INFER not in page.content()
        page.get_by_role("link", name="Operate").click()
        expect(page.locator("#may")).to_contain_text("The key alice")
        expect(page.locator("#may")).to_contain_text("this needs the right `control`, which the API key alice")
        expect(page.get_by_role("button", name="Unload mnist-2d version 1")).to_be_disabled()
        kept = page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]
        assert found.faults == []
        page.reload()
        expect(dialog).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#problem")).to_contain_text("an API key is needed")
        page.get_by_role("button", name="Try again").click()
        page.fill("#key", CONTROL)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Unload mnist-2d version 1")).to_be_enabled()
        page.get_by_role("button", name="Forget key").click()
        expect(dialog).to_be_visible()


def test_a_right_that_is_missing_is_told(opened: Open, expect: Expect, locked: str) -> None:
    """A key without `infer` explores nothing, and the page says why."""
    with opened(f"{locked}/#explore") as found:
        found.page.fill("#key", "reader-0123456789abcdef")
        found.page.keyboard.press("Enter")
        expect(found.page.locator("#wall [data-problem]")).to_contain_text("403 forbidden")
        expect(found.page.locator("#wall [data-problem]")).to_contain_text("this needs the right `infer`")
        assert found.faults == []


def test_errors_show_what_the_api_said(opened: Open, expect: Expect, url: str, tmp_path: Path) -> None:
    """A file that is no picture, and pixels beyond the limit, with the code, the fix and the request's id."""
    (tmp_path / "letter.tif").write_bytes(b"II*\0" + bytes(40))
    (tmp_path / "notes.png").write_text("no picture")
    with opened(url) as found:
        page = found.page
        expect(page.locator("#restore-model")).not_to_be_empty()
        for name in ("letter.tif", "notes.png"):
            page.set_input_files("#file", tmp_path / name)
            expect(page.locator("#restore-problem")).to_contain_text("400 unreadable_body")
            expect(page.locator("#restore-problem small")).to_contain_text("request")
        page.click("[data-example='noisy.png']")
        restored(page, expect)
        expect(page.locator("#restore-problem")).to_be_empty()
        page.click("details.more summary")
        page.fill("#scale", "9,1")
        page.keyboard.press("Tab")
        expect(page.locator("#restore-problem")).to_contain_text("422 invalid_option")
        assert found.faults == []


def test_a_service_that_is_gone_is_told(opened: Open, expect: Expect, small_models: Path) -> None:
    """Each room says that nothing answers and where; once it is back, the page works again."""
    with started(VAE_MODELS=str(small_models)) as (process, url), opened(f"{url}/#explore") as found:
        page = found.page
        expect(page.locator("#wall canvas")).to_have_attribute("width", "168")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        page.click("#wall [data-do=shuffle]")
        expect(page.locator("#wall [data-problem]")).to_contain_text("The service does not answer")
        expect(page.locator("#wall [data-problem]")).to_contain_text(url)
        page.get_by_role("link", name="Operate").click()
        expect(page.locator("#problem")).to_contain_text("The service does not answer")
        page.get_by_role("link", name="Restore").click()
        page.click("[data-example='photograph.png']")
        expect(page.locator("#restore-problem")).to_contain_text("The service does not answer")
        assert found.faults == []


def test_the_keyboard_is_enough(room: Room, expect: Expect) -> None:
    """From the first Tab: skip link, rooms, an example, a task, the brush, the divider; then drawing and the map."""
    page = room("").page
    expect(page.locator("#restore-model")).not_to_be_empty()

    def focused() -> str:
        return str(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))

    def tab_to(name: str) -> None:
        for _ in range(80):
            if focused() == name:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never comes to {name}")

    page.keyboard.press("Tab")
    assert focused() == "Skip to content"
    page.keyboard.press("Enter")
    assert focused() == "main"
    tab_to("Digit")
    page.keyboard.press("Enter")
    restored(page, expect)
    tab_to("divide")
    page.keyboard.press("Home")
    expect(page.locator("#divide")).to_have_value("0")
    tab_to("file")
    page.keyboard.press("Tab")
    for _ in range(80):
        if page.evaluate("() => document.activeElement.name") == "task":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert radio(page, "Fill in").is_checked()
    page.keyboard.press("Shift+Tab")
    tab_to("view")
    page.keyboard.down("Space")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.keyboard.up("Space")
    mask = picture(saved_by(page, "#mask-save")[1])[..., 0]
    painted = np.flatnonzero((mask == 0).any(0))
    assert len(painted) > 2 * np.flatnonzero((mask == 0).any(1)).size, "a line to the right"
    expect(page.locator("#run")).to_be_enabled()
    tab_to("run")
    with page.expect_response(lambda answer: "/inpaint" in answer.url):
        page.keyboard.press("Enter")
    restored(page, expect)
    page.get_by_role("link", name="Explore").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#wall canvas")).to_have_attribute("width", "168")
    page.locator("#draw canvas").first.focus()
    page.keyboard.press("Space")
    for key in ["ArrowUp"] * 6 + ["ArrowRight"] * 4:
        page.keyboard.press(key)
    page.keyboard.press("Space")
    expect(page.locator("#draw [data-out=percentile]")).to_have_text(re.compile(r"\d+ %"))
    assert pixels(page, "#draw canvas")[8:14, 13:15].max() == 255
    page.keyboard.press("Delete")
    expect(page.locator("#draw [data-out=percentile]")).not_to_contain_text("%")


@pytest.mark.parametrize("name", ["restore", "explore", "operate"])
def test_a_phone_is_wide_enough(room: Room, expect: Expect, name: str) -> None:
    """At 360 pixels nothing runs out of the side, and touch draws and compares."""
    page = room(name, **PHONE).page
    expect(page.locator(f"#{name} h1")).to_be_visible()
    if name == "restore":
        take(page, expect, "noisy.png")
        page.touchscreen.tap(*centre(page, "#view"))
    if name == "explore":
        expect(page.locator("#walk .strip")).to_have_attribute("width", "448")
        page.touchscreen.tap(*centre(page, "#draw canvas"))
        expect(page.locator("#draw [data-out=percentile]")).to_have_text(re.compile(r"\d+ %"))
    if name == "operate":
        expect(page.locator("#models section").first).to_be_visible()
    wide = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide == [360, 360]


def centre(page: Any, selector: str) -> tuple[float, float]:
    place = page.locator(selector).first
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["restore", "explore", "operate"])
def test_axe_finds_nothing(room: Room, expect: Expect, name: str, scheme: str) -> None:
    """axe-core's rules, best practices among them, in each room with its calls and cards open."""
    page = room(name, color_scheme=scheme).page
    if name == "restore":
        take(page, expect, "noisy.png")
        page.click("#uncertainty")
        expect(page.locator("#legend")).to_be_visible()
        page.click("details.more summary")
        assert findings(page) == []
        radio(page, "Fill in").check()
        expect(page.locator("#brush-group")).to_be_visible()
    if name == "explore":
        expect(page.locator("#walk .strip")).to_have_attribute("width", "448")
        page.click("#draw [data-do=example]")
        expect(page.locator("#draw [data-out=percentile]")).to_have_text(re.compile(r"\d+ %"))
    if name == "operate":
        page.locator("[aria-label='Model mnist'] details.card summary").click()
        expect(page.locator("[aria-label='Model mnist'] .markdown h4").first).to_be_visible()
    for summary in page.locator(f"#{name} details.call:not([hidden]) summary").all():
        summary.click()
    assert findings(page) == []


def test_axe_finds_nothing_in_the_dialog_and_in_problems(opened: Open, expect: Expect, locked: str) -> None:
    """Nor where a key is asked for, and where a problem is shown."""
    with opened(locked) as found:
        expect(found.page.get_by_role("dialog")).to_be_visible()
        assert findings(found.page) == []
        found.page.get_by_role("button", name="Cancel").click()
        expect(found.page.locator("#problem .problem")).to_be_visible()
        assert findings(found.page) == []


def findings(page: Any) -> list[str]:
    """What axe-core finds wrong, one line a rule."""
    results = import_module("axe_playwright_python.sync_playwright").Axe().run(page)
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes']][:3]}"
        for one in results.response["violations"]
    ]


def test_wishes_of_the_person_are_followed(room: Room, expect: Expect) -> None:
    """Dark and light, and no motion where none is wanted."""
    grounds = []
    for scheme in ("light", "dark"):
        page = room("restore", color_scheme=scheme, reduced_motion="reduce").page
        expect(page.locator("#restore-model")).not_to_be_empty()
        grounds.append(page.evaluate("() => getComputedStyle(document.documentElement).backgroundColor"))
        motion = "() => getComputedStyle(document.querySelector('#busy span')).animationName"
        assert page.evaluate(motion) == "none"
    light, dark = (sum(map(int, re.findall(r"\d+", ground))) for ground in grounds)
    assert light > 700
    assert dark < 100


def test_below_a_path_the_page_works(opened: Open, expect: Expect, small_models: Path) -> None:
    """With and without the slash; all calls stay below the path."""
    settings = {"VAE_ROOT_PATH": "/apps/vae"}
    with started(VAE_MODELS=str(small_models), **settings) as (_, url), opened(f"{url}/apps/vae#explore") as found:
        expect(found.page.locator("#wall canvas")).to_have_attribute("width", "168")
        assert found.page.url == f"{url}/apps/vae/#explore"
        below = {request.removeprefix(url).startswith("/apps/vae") for request in found.requests}
        assert below == {True}
        assert f"{url}/apps/vae/v1/models" in snippet(found.page, "#wall", "curl")
        assert found.refused == found.faults == []


def test_pictures_of_the_page(room: Room, expect: Expect, photo: str, url: str, tmp_path: Path) -> None:
    """Four pictures for the README, each small; BROWSER_PICTURES names the folder that keeps them."""
    assert photo
    folder = Path(PICTURES) if PICTURES else tmp_path
    page = room("restore", color_scheme="light", viewport={"width": 1280, "height": 900}).page
    take(page, expect, "photograph.png")
    shoot(page, folder / "page-restore.png")
    page = room("restore", color_scheme="dark", viewport={"width": 1280, "height": 1240}).page
    take(page, expect, "photograph.png")
    page.click("#draw-samples")
    expect(page.locator("#samples button")).to_have_count(4)
    expect(page.locator("#busy")).to_be_hidden()
    page.click("#zoom-in")
    page.click("#uncertainty")
    expect(page.locator("#legend")).to_be_visible()
    page.locator("#divide").fill("30")
    shoot(page, folder / "page-uncertainty.png")
    page = room("explore", color_scheme="light", viewport={"width": 1280, "height": 1240}).page
    expect(page.locator("#walk .strip")).to_have_attribute("width", "448")
    draw_seven(page)
    expect(page.locator("#draw [data-out=percentile]")).to_have_text(re.compile(r"\d+ %"))
    expect(page.locator("#map .place")).to_be_visible()
    shoot(page, folder / "page-explore.png")
    page = room("operate", color_scheme="dark", viewport={"width": 1280, "height": 1120}).page
    expect(page.locator("#models section").first).to_be_visible()
    refused = "options=1", "count=0"
    for k in range(12):
        for _ in range(20 - abs(6 - k) * 3):
            httpx.post(f"{url}/v1/sample?count=4&seed=1")
        httpx.post(f"{url}/v1/sample?{refused[k % 2]}")
        page.wait_for_timeout(1000)
    shoot(page, folder / "page-operate.png")


def shoot(page: Any, path: Path) -> None:
    """Keep a picture of what the window shows, in 256 colours: dithered, unless that is too large."""
    page.mouse.move(5, 5)
    page.wait_for_timeout(400)
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    palette = image.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    for dither in (Image.Dither.FLOYDSTEINBERG, Image.Dither.NONE):
        image.quantize(palette=palette, dither=dither).save(path, optimize=True)
        if path.stat().st_size < MOST_PICTURE_BYTES:
            break
    assert 20_000 < path.stat().st_size < MOST_PICTURE_BYTES
