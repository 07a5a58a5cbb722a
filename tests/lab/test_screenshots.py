"""Reports in a real browser: they fit a phone, stack their panels there, and follow the reader's light or dark theme."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fabricated_runs import fabricate

from layerwise.lab.report import contenders, load_runs, write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
PROBE = """<script>
const shown = kind => [...document.querySelectorAll(`figure .${kind}`)].filter(e => e.offsetWidth > 0).length;
const right = e => e.getBoundingClientRect().right;
const outside = [...document.querySelectorAll("figure svg")].filter(e => right(e) > innerWidth + 1).length;
document.title = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth, wide: shown("wide"),
  phone: shown("phone"), outside});
</script>"""


def one(folder: Path) -> None:
    fabricate(folder / "a", "lanton", with_function_space=True, steps=100, blocks=2)


def single_step(folder: Path) -> None:
    fabricate(folder / "a", "lanton", with_function_space=True, steps=5, blocks=2)


def forty(folder: Path) -> None:
    for i in range(40):
        name = ("adamw", "lanton", "d-muon", "scion")[i % 4]
        lr = 0.001 * 2 ** (i // 4)
        fabricate(folder / f"r{i}", name, final=3.2 + 0.01 * i, lr=lr, with_layers=False, steps=60)


def chromium(*words: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def probe(page: Path, width: int) -> dict[str, int]:
    """What the browser says of the page in a window of this width; in a frame, as a window has a least width of its own."""
    copy = page.with_name("probed.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        'onload = () => { document.body.innerHTML = document.querySelector("iframe").contentDocument.title }</script>'
    )
    dom = chromium(
        "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri()
    )
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
