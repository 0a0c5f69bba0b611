"""The README's table of supported parts is what the tests run through, and they run through every family."""

from __future__ import annotations

from support_matrix import BEGIN, END, README, table
from tiny_parts import ENCODERS

from anygpt.encoders import FAMILIES


def test_readme_has_the_table():
    readme = README.read_text()
    assert BEGIN in readme and END in readme
    assert readme.split(BEGIN)[1].split(END)[0].strip() == table(), "run: python tests/support_matrix.py"


def test_every_family_is_tested():
    tested = {encoder.config().model_type for encoder in ENCODERS} | {"anygpt_video_encoder"}
    assert set(FAMILIES) - tested == {"anygpt_qwen2_vl_patches"}  # which is in test_parity_vlm.py
