"""A page that holds everything, pictures too, and needs no other file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}tr.axis td{font-weight:600;background:#f5f7fa}
figure{display:inline-block;margin:.4rem;text-align:center;font-size:.85rem}video,img{max-width:100%;border-radius:4px}
figure video{width:192px}small{color:#666}"""


def page(parts: Sequence[str], title: str = "simreal report") -> str:
    """The page as a string. parts: HTML."""
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>{''.join(parts)}"


def png(figure: plt.Figure) -> str:
    """A picture as the address of an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write(file: Path, text: str) -> None:
    """Write beside and rename."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(file)
