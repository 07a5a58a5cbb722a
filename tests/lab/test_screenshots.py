"""Reports in a real browser: they fit a phone, stack their panels there, follow the reader's light or dark theme, and look
as they did when somebody last looked at them.

The pictures in `screenshots/` are whole pages at a third of their size. After a change that is meant, look at the new ones:

    python tests/lab/test_screenshots.py [NAME]...          # makes them anew
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from browser import CHROMIUM, Picture, chromium, picture, shrunk
from fabricated_runs import fabricate

from layerwise.lab.experiments.sweep.sweep_report import Curve, Panels, transfer_figure
from layerwise.lab.report import contenders, load_runs, style, write_report
from layerwise.lab.report.style import save_figure

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
PROBE = """<script>
const shown = kind => [...document.querySelectorAll(`figure .${kind}`)].filter(e => e.checkVisibility()).length;
const right = e => e.getBoundingClientRect().right;
const outside = [...document.querySelectorAll("figure svg")].filter(e => right(e) > innerWidth + 1).length;
document.title = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth, wide: shown("wide"),
  phone: shown("phone"), outside});
</script>"""


def one(folder: Path) -> None:
    fabricate(folder / "a", "lanton", with_function_space=True, steps=100, blocks=2)


def single_step(folder: Path) -> None:
    fabricate(folder / "a", "lanton", with_function_space=True, steps=5, blocks=2)


def four(folder: Path) -> None:
    for i, name in enumerate(("adamw", "lanton", "d-muon", "scion")):
        fabricate(folder / name, name, final=3.2 + 0.05 * i, steps=200, with_layers=name == "lanton")


def lora(folder: Path) -> None:
    fabricate(folder / "a", "lanton", adapters=True, with_function_space=True, steps=100)


def many_blocks(folder: Path) -> None:
    fabricate(folder / "a", "lanton", with_function_space=True, steps=200, blocks=12)


def forty(folder: Path) -> None:
    for i in range(40):
        name = ("adamw", "lanton", "d-muon", "scion")[i % 4]
        lr = 0.001 * 2 ** (i // 4)
        fabricate(folder / f"r{i}", name, final=3.2 + 0.01 * i, lr=lr, with_layers=False, steps=60)


def probe(page: Path, width: int) -> dict[str, int]:
    """What the browser says of the page in a window of this width; in a frame, as a window has a least width of its own."""
    copy = page.with_name("probed.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        'onload = () => { document.body.innerHTML = document.querySelector("iframe").contentDocument.title }</script>'
    )
    dom = chromium("--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri())
    found = re.search(r"\{.*\}", dom)
    assert found, dom[-500:]
    return dict(json.loads(found[0]))


def brightness(page: Path, *options: str) -> float:
    from matplotlib.image import imread

    picture = page.with_suffix(".png")
    chromium(f"--screenshot={picture}", "--window-size=1100,1600", *options, page.as_uri())
    return float(np.median(imread(picture)[..., :3]))


@pytest.mark.parametrize("runs", [one, single_step, forty])
def test_a_report_fits_wide_pages_and_phones_in_both_themes(tmp_path: Path, runs: object) -> None:
    runs(tmp_path / "runs")  # type: ignore[operator]
    page = write_report(contenders(load_runs([tmp_path / "runs"])), tmp_path)
    figures = page.read_text().count("<figure")
    folded = page.read_text().count("<details><summary>Gains and biases")
    wide, phone = probe(page, 1100), probe(page, 390)
    assert (wide["wide"], wide["phone"], wide["outside"]) == (figures - folded, 0, 0)
    assert (phone["wide"], phone["phone"], phone["outside"]) == (0, figures - folded, 0)
    assert wide["scroll"] <= wide["width"] == 1100
    assert phone["scroll"] <= phone["width"] == 390
    assert brightness(page) > 0.9
    assert brightness(page, "--force-dark-mode", "--blink-settings=preferredColorScheme=0") < 0.3


@pytest.fixture(autouse=True)
def _fonts() -> Iterator[None]:
    """Figures have matplotlib's own font, on every machine."""
    with patch.object(style, "_FONTS", ("DejaVu Sans",)):
        yield


def report_of(runs: Callable[[Path], None], folder: Path) -> Path:
    runs(folder / "runs")
    page = write_report(contenders(load_runs([folder / "runs"])), folder)
    text = re.sub(r"Written [^<]* by", "Written by", page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    return page


def transfer_of(folder: Path) -> Path:
    """A sweep's figure, as a page shows it: two methods at three widths, one rate diverges."""
    rates = [2.0**i * 1e-3 for i in range(7)]
    curves = [
        Curve(method, float(size), {lr: [3 + 0.2 * (math.log2(lr / best)) ** 2, 3.02] for lr in rates}, 8.0)
        for method, shift in (("standard", 2.0), ("flerm", 1.0))
        for size, best in ((64, 0.016), (128, 0.016 / shift), (256, 0.016 / shift**2))
    ]
    curves[0] = Curve("standard", 64.0, {**curves[0].losses, rates[-1]: [math.inf, 3.5]}, 8.0)
    panels = Panels("ResMLP", curves, "width", "Final loss")
    drawn = save_figure(lambda: transfer_figure([panels]), folder, "transfer")
    look = f"{style.theme_css()} body {{margin: 0; background: var(--cffffff)}} svg {{width: 100%; display: block}}"
    page = folder / "transfer.html"
    page.write_text(f"<!doctype html><style>{look}</style><body>{drawn}", encoding="utf-8")
    return page


PAGES: dict[str, Callable[[Path], Path]] = {
    "one": lambda folder: report_of(one, folder),
    "four": lambda folder: report_of(four, folder),
    "forty": lambda folder: report_of(forty, folder),
    "lora": lambda folder: report_of(lora, folder),
    "function-space": lambda folder: report_of(many_blocks, folder),
    "transfer": transfer_of,
}
REFERENCES = Path(__file__).parent / "screenshots"
#: Width of the window -> by how much its pictures are shrunk.
WIDTHS = {1100: 3, 390: 3}
#: The mean difference of two pictures, of 1: one of other fonts is a tenth of what a missing figure is.
MOST = 0.012


def seen(page: Path, width: int, dark: bool) -> Picture:
    return shrunk(picture(page, width, dark=dark), WIDTHS[width])


def reference(name: str, width: int, dark: bool) -> Path:
    return REFERENCES / f"{name}-{width}-{'dark' if dark else 'light'}.png"


def difference(one: Picture, other: Picture) -> float:
    """The mean difference of their pixels where both have some, and 1 where one of two pages goes on alone."""
    low, high = sorted((len(one), len(other)))
    return float((np.abs(one[:low] - other[:low]).mean() * low + (high - low)) / high)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_pages_look_as_they_did(tmp_path: Path, name: str, width: int, dark: bool) -> None:
    from matplotlib.image import imread

    now = seen(PAGES[name](tmp_path), width, dark)
    known = {path.name: imread(path)[..., :3] for path in REFERENCES.glob(f"*-{width}-*.png")}
    differences = {path: difference(now, picture) for path, picture in known.items()}
    own = reference(name, width, dark).name
    assert differences[own] < MOST
    assert all(found > 2 * MOST for path, found in differences.items() if path != own and name != "transfer")


def record(names: Sequence[str]) -> None:
    """Makes reference pictures anew, of few colours."""
    from PIL import Image

    REFERENCES.mkdir(exist_ok=True)
    for name in names:
        make = PAGES[name]
        with tempfile.TemporaryDirectory() as folder:
            page = make(Path(folder))
            for width in WIDTHS:
                for dark in (False, True):
                    whole = Image.fromarray((seen(page, width, dark) * 255).round().astype(np.uint8))
                    whole.quantize(48).save(reference(name, width, dark), optimize=True)


if __name__ == "__main__":
    with patch.object(style, "_FONTS", ("DejaVu Sans",)):
        record(sys.argv[1:] or list(PAGES))
