"""Media that are right but unlike what encoders of test suites make, and what is said of those that are not read."""

from __future__ import annotations

import re
import struct
from fractions import Fraction

import av
import numpy as np
import odd_media
import pytest
from PIL import Image
from test_media import encode

from anygpt.data import read_audio, read_image, read_video
from anygpt.errors import InputError
from anygpt.media.types import MEDIA, read_media

# -- pictures


def as_pillow_has_it(path) -> np.ndarray:
    """Pillow's own conversion, transparency on white."""
    with Image.open(path) as image:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def test_pictures_of_every_mode_and_format_are_what_pillow_makes_of_them(tmp_path):
    """But for what has more than 8 bits, of which Pillow cuts off all above 255: there the whole range is scaled."""
    seen = set()
    for what, path in odd_media.pictures(tmp_path):
        try:
            with Image.open(path) as image:
                mode, deep = image.mode, image.mode == "F" or image.mode.startswith("I")
                values, clear = np.asarray(image), image.info.get("transparency")
        except OSError:  # Pillow writes some that it cannot read
            with pytest.raises(InputError, match="cannot be read as an image"):
                read_image(path)
            continue
        found = np.asarray(read_image(path))
        if deep:
            grey = np.round(values.astype(np.float64) * (255 / (1 if mode == "F" else 65535)))
            expected = np.repeat(grey[..., None], 3, axis=-1)
            if clear is not None:
                expected[values == clear] = 255
        else:
            expected = as_pillow_has_it(path)
        np.testing.assert_array_equal(found, expected, err_msg=what)
        seen.add((mode, path.suffix))
    assert len(seen) > 40 and {mode for mode, _ in seen} >= {"1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16", "F"}


def test_a_tiff_of_twelve_bits_has_a_white_of_its_own(tmp_path):
    """Its values end at 4095: as 16 bits it would be nearly black."""
    values = np.array([[0, 4095, 2048, 1024]], np.uint16)
    bits = np.unpackbits(values.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 4:]
    data = np.packbits(bits).tobytes()
    tags = ((256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "a.tiff").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)
    assert np.asarray(read_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 255, 128, 64]


def test_a_header_that_two_formats_could_claim_goes_to_pillows_choice(tmp_path):
    """An icon's first bytes are those of a TGA without colour map, too."""
    Image.fromarray(odd_media.noise(16, 16, 3)).save(tmp_path / "a.ico", sizes=[(16, 16)])
    (tmp_path / "a.ico").rename(tmp_path / "a.tga")
    with Image.open(tmp_path / "a.tga") as image:
        assert image.format == "ICO"
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tga")), as_pillow_has_it(tmp_path / "a.tga"))


@pytest.mark.parametrize("kind", MEDIA)
def test_formats_that_are_not_read_are_named_with_what_reads_them(tmp_path, kind):
    page = b"<!DOCTYPE html><html>404</html>"
    contents = {
        "HEIC": odd_media.heic(),
        "SVG": b'<?xml version="1.0"?>\n<svg/>',
        "MIDI": b"MThd\0\0\0\6",
        "an HTML": page,
        "AC-3": b"\x0bw" + bytes(range(200)),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n",
        "NUT": b"nut/multimedia container\0" + bytes(200),
    }
    for name, content in contents.items():
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(InputError, match=f"a.jpg is {name}.*, which is not read here: .*") as caught:
            read_media(kind, tmp_path / "a.jpg")
        assert " at 0x" not in str(caught.value)


def test_no_message_names_an_object(tmp_path):
    """Of a format that nothing knows, of one that Pillow knows and we do not read."""
    (tmp_path / "a").write_bytes(odd_media.noise(500).tobytes())
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="its format is not known"):
        read_video(tmp_path / "a.jpg")
    for name, message in (("a", "its format is not known"), ("a.eps", "is Encapsulated Postscript, which is not read")):
        with pytest.raises(InputError, match=message) as caught:
            read_image(tmp_path / name)
        assert not re.search(r"<_io|0x[0-9a-f]{4}", str(caught.value))


# -- sounds


@pytest.mark.parametrize(
    ("data", "riff"),
    [
        (0x7FFFF000, 0x7FFFF024),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0, 0),
        (0x80000000, 0x80000024),
        (0xFFFFFFFF - 36, 0xFFFFFFFF),
    ],
)
def test_wav_from_a_pipe_is_whole(tmp_path, data, riff):
    samples = odd_media.noise(48_000).astype(np.int16) * 100
    (tmp_path / "a.wav").write_bytes(odd_media.wav(samples, data, riff))
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav").waveform[0], samples / np.float32(32768))
    (tmp_path / "a.wav").write_bytes(odd_media.wav(samples, 2 * len(samples) + 40_000))
    with pytest.raises(InputError, match="truncated"):
        read_audio(tmp_path / "a.wav")


def test_aiff_from_a_pipe_is_whole(tmp_path):
    samples = odd_media.noise(48_000).astype(np.int16) * 100
    for stated in (48_000, 0x7F000000 // 2):
        (tmp_path / "a.aiff").write_bytes(odd_media.aiff(samples, stated))
        np.testing.assert_array_equal(read_audio(tmp_path / "a.aiff").waveform[0], samples / np.float32(32768))
    (tmp_path / "a.aiff").write_bytes(odd_media.aiff(samples, 96_000))
    with pytest.raises(InputError, match="truncated"):
        read_audio(tmp_path / "a.aiff")


def test_caf_from_a_pipe_is_whole(tmp_path):
    """Its data may state no size, -1."""
    samples = np.arange(48_000, dtype=np.int16)
    path = odd_media.sound(tmp_path / "a.caf", samples[None] / 32767, "mono")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"data" + struct.pack(">q", 4 + 2 * 48_000), b"data" + struct.pack(">q", -1)))
    assert path.read_bytes() != content
    assert read_audio(path).waveform.shape == (1, 48_000)
    path.write_bytes(content[:-100])
    with pytest.raises(InputError, match="truncated"):
        read_audio(path)


@pytest.mark.parametrize(("suffix", "codec"), [(".wv", "wavpack"), (".tta", "tta")])
def test_sounds_without_loss_are_the_same(tmp_path, suffix, codec):
    samples = odd_media.noise(48_000).astype(np.int16)
    with av.open(str(tmp_path / f"a{suffix}"), "w") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono", format="s16p" if codec == "wavpack" else "s16")
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    np.testing.assert_array_equal(read_audio(tmp_path / f"a{suffix}").waveform[0], samples / np.float32(32768))


def test_ogg_without_an_end_of_stream_is_whole(tmp_path):
    for ends in (True, False):
        (tmp_path / "a.opus").write_bytes(odd_media.opus(3, ends))
        assert abs(read_audio(tmp_path / "a.opus").waveform.shape[1] - 3 * 48_000) < 1000


def test_a_sound_shorter_than_the_clip_beside_it_is_whole(tmp_path):
    """Matroska states the length of the longest stream alone."""
    encode(tmp_path / "a.mkv", np.zeros((50, 32, 32, 3), np.uint8), np.zeros(16_000, np.int16))
    assert 16_000 <= read_audio(tmp_path / "a.mkv").waveform.shape[1] < 18_100
    assert len(read_video(tmp_path / "a.mkv").frames) == 50


@pytest.mark.parametrize("layout", ["5.1", "5.1(side)", "7.1", "quad", "3.0"])
def test_speech_in_the_centre_stays(tmp_path, layout):
    """FFmpeg's downmix: fronts 3 dB below the centre, surrounds 6 dB, nothing of the low-frequency channel."""
    names = {"3.0": "LRC", "quad": "LRBB"}.get(layout, "LRCEBBBB"[: 6 if layout.startswith("5") else 8])
    weights = np.array([{"L": 0.5**0.5, "R": 0.5**0.5, "C": 1, "E": 0, "B": 0.5}[name] for name in names])
    channels = np.random.default_rng(0).uniform(-0.9, 0.9, (len(names), 800))
    audio = read_audio(odd_media.sound(tmp_path / "a.wav", channels, layout))
    np.testing.assert_allclose(audio.mono(), weights @ channels / weights.sum(), atol=1e-3)
    np.testing.assert_array_equal(MEDIA["audio"].to_target(audio)[0], audio.mono())


# -- clips


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_frames_of_a_variable_rate_are_chosen_by_time(tmp_path, suffix):
    """A second of ten frames, then four seconds of one each."""
    times = [*range(0, 1000, 100), 1000, 2000, 3000, 4000]
    path = odd_media.clip(tmp_path / f"a{suffix}", times)
    for whole in (False, True):  # from keyframes on, and in order
        video = read_video(path, fps=1, whole=whole)
        assert np.round(video.frames.mean((1, 2, 3)) / 8).tolist() in ([0, 10, 11, 12], [0, 10, 11, 12, 13])
        video = read_video(path, 5, whole=whole)
        assert np.round(video.frames.mean((1, 2, 3)) / 8).tolist() == [0, 10, 11, 12, 13]
        assert 4 <= len(video.frames) / video.fps <= 5.1
    lengths = [len(video.frames) / video.fps for video in (read_video(path), read_video(path, 3))]
    assert lengths[0] == pytest.approx(lengths[1])


def test_pixels_are_square(tmp_path):
    path = odd_media.clip(tmp_path / "a.mp4", [0, 100, 200], sar=Fraction(64, 45))
    for frames in (read_video(path).frames, read_video(path, 2).frames):
        assert frames.shape[1:] == (64, 137, 3)
