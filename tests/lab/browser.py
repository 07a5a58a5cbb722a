"""Pages as Debian's Chromium shows them, in a window of a given width, light or dark."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]  # [height, width, 3], from 0 to 1

CHROMIUM = shutil.which("chromium")
#: The tallest page that is seen as a whole, in pixels.
TALLEST = 15_000
_DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
_FRAME = """<body style="margin:0;background:#f0f"><iframe id="page" src="{source}" style="width:{width}px;height:500px;
border:0;display:block"></iframe><script>
onload = () => {{
  const frame = document.getElementById("page"), root = frame.contentDocument.documentElement;
  frame.style.height = Math.min(root.scrollHeight, {tallest}) + "px";
}}</script></body>"""


def chromium(*words: str) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def picture(page: Path, width: int, *, dark: bool = False) -> Picture:
    """The whole page; in a frame, as a window has a least width of its own."""
    from matplotlib.image import imread

    frame, file = page.with_name("frame.html"), page.with_name("frame.png")
    frame.write_text(_FRAME.format(source=page.name, width=width, tallest=TALLEST))
    chromium(
        "--allow-file-access-from-files",
        "--virtual-time-budget=20000",
        f"--screenshot={file}",
        f"--window-size={max(width, 600)},{TALLEST}",
        *(_DARK if dark else ()),
        frame.as_uri(),
    )
    seen = imread(file)[:, :width, :3]
    below = np.abs(seen[:, 0] - (1.0, 0.0, 1.0)).max(axis=-1) < 0.01  # the frame ends there
    return np.asarray(seen[: int(below.argmax())] if below.any() else seen, dtype=np.float32)


def shrunk(full: Picture, factor: int) -> Picture:
    """Each pixel the mean of factor x factor."""
    height, width = (size // factor * factor for size in full.shape[:2])
    blocks = full[:height, :width].reshape(height // factor, factor, width // factor, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3)), dtype=np.float32)
