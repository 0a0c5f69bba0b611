"""The README's table of supported parts is what the tests run through, and they run through every family."""

from __future__ import annotations

from pathlib import Path

from support_matrix import table
from tiny_parts import ENCODERS

from anygpt.encoders import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support matrix -->\n", "\n<!-- end of support matrix -->"


def test_readme_has_the_printed_table():
    printed = table()
    readme = (ROOT / "README.md").read_text()
    assert BEGIN in readme and END in readme
    assert readme.split(BEGIN)[1].split(END)[0].strip() == printed, "run: python tests/support_matrix.py"


def test_every_family_is_tested():
    tested = {encoder.config().model_type for encoder in ENCODERS} | {"anygpt_video_encoder"}
    # names under which a whole model's checkpoint is read for its media half; Qwen2-VL's is in test_parity_vlm.py
    whole = {"clip", "siglip", "siglip2", "clap", "anygpt_qwen2_vl_patches"}
    assert set(FAMILIES) - whole == tested - whole
