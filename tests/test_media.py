"""Media files, sound and broken ones, into arrays and back."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from anygpt.data import (
    MediaLimits,
    read_audio,
    read_image,
    read_media,
    read_video,
    write_audio,
    write_image,
    write_video,
)
from anygpt.errors import InputError
from anygpt.media import videos
from anygpt.media.types import media_type_of

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def grey_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames told apart by their brightness: frame i is 8 · i all over."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 8, height * width * 3).reshape(count, height, width, 3)


def frame_numbers(frames: np.ndarray) -> list[int]:
    return np.round(frames.mean(axis=(1, 2, 3)) / 8).astype(int).tolist()


def encode(
    path: Path, frames: np.ndarray | None, sound: np.ndarray | None, rotation: int = 0, codec=None, **options
) -> Path:
    """A file with a picture stream (10 a second) and a sound track (16 kHz), either of which may be missing."""
    with av.open(str(path), "w", **options) as container:
        if frames is not None:
            video = container.add_stream("libx264", rate=10, options=codec or {})
            video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
            video.set_display_rotation(rotation)
        if sound is not None:
            audio = container.add_stream("flac" if path.suffix == ".flac" else "aac", rate=16000, layout="mono")
        for frame in frames if frames is not None else ():
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if frames is not None:
            container.mux(video.encode())
        if sound is not None:
            block = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
            block.rate = 16000
            container.mux([*audio.encode(block), *audio.encode()])
    return path


def tone(samples: int, rate: int = 16000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate).astype(np.float32)


# -- images ----------------------------------------------------------------------------------------------


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 16), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    image.paste(BLUE, (0, 0, 16, 16))  # left half, on top once turned
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = read_image(tmp_path / "a.jpg")
    assert (turned.mode, turned.size) == ("RGB", (16, 32))
    np.testing.assert_allclose(turned.getpixel((8, 4)), BLUE, atol=8)
    np.testing.assert_allclose(turned.getpixel((8, 28)), RED, atol=8)


def test_transparency_is_put_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "clear.png", transparency=1)
    palette.save(tmp_path / "opaque.png")
    for name, colour in {"rgba": WHITE, "la": WHITE, "clear": WHITE, "opaque": RED}.items():
        assert read_image(tmp_path / f"{name}.png").getpixel((1, 1)) == colour, name


@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 65535), (np.float32, 1.0), (np.int32, 65535), (bool, 1)])
def test_deep_and_shallow_greys_use_the_whole_range(tmp_path, dtype, white):
    values = np.array([[0, white]], dtype=dtype)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.asarray(read_image(tmp_path / "a.tiff")).tolist() == [[[0] * 3, [255] * 3]]


def test_images_whose_white_is_unknown_are_refused(tmp_path):
    for values in (
        np.array([[0, 300.0]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[-1, 0]], np.int32),
    ):
        Image.fromarray(values).save(tmp_path / "a.tiff")
        with pytest.raises(InputError, match="white is not known"):
            read_image(tmp_path / "a.tiff")


def test_cmyk_and_an_animations_first_frame(tmp_path):
    Image.new("CMYK", (4, 4)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").getpixel((0, 0)) == WHITE
    Image.new("RGB", (4, 4), RED).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), BLUE)]
    )
    assert read_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


# -- videos ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])  # MP4 states its number of frames, Matroska does not
def test_frames_are_evenly_spaced_and_the_length_is_kept(tmp_path, suffix):
    path = encode(tmp_path / f"a{suffix}", grey_frames(21), None)
    assert frame_numbers(read_video(path).frames) == list(range(21))
    expected = {1: [10], 2: [0, 20], 4: [0, 7, 13, 20], 5: [0, 5, 10, 15, 20]}
    for count, numbers in expected.items():
        video = read_video(path, num_frames=count)
        assert frame_numbers(video.frames) == numbers
        assert len(video.frames) / video.fps == pytest.approx(2.1)
    longer = read_video(path, num_frames=41)
    assert frame_numbers(longer.frames) == [(i + 1) // 2 for i in range(41)]
    assert (longer.frames.shape, longer.frames.dtype) == ((41, 32, 48, 3), np.uint8)


def test_a_wrong_frame_count_in_the_header_is_found_out(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", grey_frames(21), None)
    for count in (100, 5):
        header = videos.Header(32 * 48, [Fraction(i, 10) for i in range(count)], Fraction(count, 10))
        monkeypatch.setattr(videos, "_video_header", lambda path, limits, header=header: header)
        assert frame_numbers(read_video(path, num_frames=3).frames) == [0, 10, 20]
        assert frame_numbers(read_video(path).frames) == list(range(21))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch, suffix):
    """A keyframe every ten frames, frames between that depend on later ones: the same pictures as decoded in order."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
    path = encode(tmp_path / f"a{suffix}", frames, None, codec={"g": "10", "bf": "2", "x264-params": "scenecut=0"})
    every = read_video(path)
    assert len(every.frames) == 60
    decoded = []

    def counted(*arguments):
        for frame in from_keyframe(*arguments):
            decoded.append(frame.pts)
            yield frame

    from_keyframe = videos._frames_from_keyframe
    monkeypatch.setattr(videos, "_frames_from_keyframe", counted)
    for count, wanted in ((1, [29]), (3, [0, 30, 59]), (7, [0, 10, 20, 30, 39, 49, 59])):
        decoded.clear()
        video = read_video(path, num_frames=count)
        assert np.array_equal(video.frames, every.frames[wanted])
        assert len(video.frames) / video.fps == pytest.approx(6)
        if suffix in (".mp4", ".mkv"):
            assert 0 < len(decoded) <= 12 * count
    monkeypatch.setattr(videos, "_seek_frames", lambda *_: pytest.fail("whole means in order"))
    assert len(read_video(path, num_frames=1, whole=True).frames) == 1


def test_so_many_frames_a_second(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_frames(21), None)
    for rate, numbers in {5: range(0, 20, 2), 10: range(21), 20: [i // 2 for i in range(42)], 0.1: [0]}.items():
        video = read_video(path, fps=rate)
        assert (frame_numbers(video.frames), video.fps) == (list(numbers), rate)
    images = [Image.fromarray(frame) for frame in grey_frames(3)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 300, 100])
    assert frame_numbers(read_video(tmp_path / "a.gif", fps=10).frames) == [0, 1, 1, 1, 2]
    with pytest.raises(InputError, match="more than max_bytes"):
        read_video(path, fps=1e9)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path, rotation):
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 255  # bright at the top left
    path = encode(tmp_path / "a.mp4", frames, None, rotation=rotation)
    shown = read_video(path).frames
    expected = np.rot90(frames[0], rotation // 90)
    assert shown.shape[1:] == expected.shape
    assert np.abs(shown[0].astype(int) - expected).mean() < 8


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".avif"])
def test_animations(tmp_path, suffix):
    images = [Image.fromarray(frame) for frame in grey_frames(5)]
    images[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=images[1:], duration=200)
    video = read_video(tmp_path / f"a{suffix}")
    assert (frame_numbers(video.frames), video.fps) == ([0, 1, 2, 3, 4], pytest.approx(5))
    assert frame_numbers(read_video(tmp_path / f"a{suffix}", num_frames=3).frames) == [0, 2, 4]
    with pytest.raises(InputError, match="more than max_seconds"):
        read_video(tmp_path / f"a{suffix}", limits=MediaLimits(max_seconds=0.9))
    if suffix in (".webp", ".png"):
        turned = Image.Exif()
        turned[0x0112] = 6
        images[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=images[1:], exif=turned)
        assert read_video(tmp_path / f"a{suffix}").frames.shape == (5, 48, 32, 3)


@pytest.mark.parametrize("size", [(32, 48), (31, 47), (1, 1)])
def test_write_video_and_read_it_back(tmp_path, size):
    frames = grey_frames(9, *size)
    write_video(tmp_path / "new" / "a.mp4", frames, fps=29.97)
    video = read_video(tmp_path / "new" / "a.mp4")
    assert video.frames.shape == (9, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert frame_numbers(video.frames) == list(range(9))
    assert video.fps == pytest.approx(29.97)
    with av.open(str(tmp_path / "new" / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


# -- sounds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_wav_round_trip_is_exact(tmp_path, channels):
    samples = np.random.default_rng(0).integers(-32768, 32768, (channels, 4800)).astype(np.float32) / 32768
    write_audio(tmp_path / "a.wav", samples if channels == 2 else samples[0], 48000)
    audio = read_audio(tmp_path / "a.wav")
    assert (audio.waveform.dtype, audio.sampling_rate) == (np.float32, 48000)
    np.testing.assert_array_equal(audio.waveform, samples)


def test_8_bit_wav_flac_and_the_sound_of_a_video(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes([0, 128, 255] * 100))
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav").waveform[0, :3], [-1, 0, 127 / 128])
    sound = (tone(16000) * 32767).astype(np.int16)
    flac = read_audio(encode(tmp_path / "a.flac", None, sound))
    np.testing.assert_allclose(flac.waveform[0], sound / 32768, atol=1e-6)
    track = read_audio(encode(tmp_path / "a.mp4", grey_frames(10), sound))
    assert track.sampling_rate == 16000 and abs(track.waveform.shape[1] - 16000) <= 2048
    spectrum = np.abs(np.fft.rfft(track.waveform[0, :16000]))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize(
    ("suffix", "codec", "kind"),
    [
        *[("wav", f"pcm_{x}", y) for x, y in (("u8", "u8"), ("s16le", "s16"), ("s24le", "s32"), ("s32le", "s32"))],
        *[("wav", f"pcm_{x}le", y) for x, y in (("f32", "flt"), ("f64", "dbl"))],
        ("flac", "flac", "s16"),
        ("aiff", "pcm_s16be", "s16"),
        ("mp4", "aac", "fltp"),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_samples_are_what_ffmpeg_converts_them_to(tmp_path, suffix, codec, kind, layout):
    path = tmp_path / f"a.{suffix}"
    assert media_type_of(path).name == ("video" if suffix == "mp4" else "audio")
    noise = np.random.default_rng(0).uniform(-1, 1, (1 + (layout == "stereo"), 4800)).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000, layout=layout, format=kind)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout=layout)
        frame.rate = 16000
        resampler = av.AudioResampler(kind, layout, 16000, frame_size=stream.codec_context.frame_size or None)
        for part in (frame, None):
            for converted in resampler.resample(part):
                container.mux(stream.encode(converted))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp")
        expected = [y.to_ndarray() for x in container.decode(audio=0) for y in resampler.resample(x)]
    expected = np.concatenate(expected, axis=1)
    assert np.abs(expected).max() < 2
    np.testing.assert_array_equal(read_audio(path).waveform, expected / max(1, np.abs(expected).max()))


@pytest.mark.parametrize(("codec", "suffix"), [("aac", "m4a"), ("pcm_s16le", "wav"), ("pcm_s64le", "wav")])
def test_eight_channels_and_64_bits(tmp_path, codec, suffix):
    path, noise = (
        tmp_path / f"a.{suffix}",
        np.random.default_rng(0).uniform(-0.5, 0.5, (1024 * 4, 8)).astype(np.float32),
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000, layout="7.1")
        frame = av.AudioFrame.from_ndarray(noise.reshape(1, -1), format="flt", layout="7.1")
        frame.rate = 16000
        to_codec = av.AudioResampler(stream.format, "7.1", 16000, frame_size=stream.codec_context.frame_size or None)
        for part in (frame, None):
            for converted in to_codec.resample(part):
                container.mux(stream.encode(converted))
        container.mux(stream.encode())
    sound = read_audio(path)
    assert sound.waveform.shape[0] == 8 and sound.sampling_rate == 16000
    if codec != "aac":  # which loses some
        np.testing.assert_allclose(sound.waveform, noise.T, atol=1e-4)


def float_wav(path: Path, samples: np.ndarray) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="flt", layout="mono")
        frame.rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])
    return path


def test_float_samples_have_the_range_that_is_evident(tmp_path):
    """Nothing is clipped: a little beyond 1 is divided by the peak, integers' ranges by theirs, others are refused."""
    for samples, top in (
        ([0.25, 1.5, -1.5], 1.5),
        ([0.5, 16384, -16384], 2**15),
        ([1, -8e6], 2**23),
        ([2e9, 1], 2**31),
    ):
        loud = read_audio(float_wav(tmp_path / "loud.wav", np.array(samples)))
        np.testing.assert_allclose(loud.waveform[0], np.float32(samples) / top, rtol=1e-6)
    for peak in (4.0, 127.0, 1e10):
        with pytest.raises(InputError, match="their range is not known"):
            read_audio(float_wav(tmp_path / "bad.wav", np.array([0, peak])))
    for bad in (np.nan, np.inf):
        with pytest.raises(InputError, match="NaN or infinite"):
            read_audio(float_wav(tmp_path / "bad.wav", np.array([0, bad])))


# -- what cannot be read ---------------------------------------------------------------------------------

READERS = {"image": read_image, "video": read_video, "audio": read_audio}


@pytest.mark.parametrize("kind", READERS)
def test_files_that_are_not_media(tmp_path, kind):
    (tmp_path / "empty").touch()
    (tmp_path / "text.jpg").write_text("not a medium\n" * 50)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.wav").write_text("ffconcat version 1.0\nfile text.jpg\n")
    with pytest.raises(InputError, match="does not exist"):
        READERS[kind](tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a file"):
        READERS[kind](tmp_path)
    with pytest.raises(InputError, match="it is empty"):
        READERS[kind](tmp_path / "empty")
    with pytest.raises(InputError, match=r"text.jpg cannot be read as"):
        READERS[kind](tmp_path / "text.jpg")
    for name in ("list.mp4", "concat.wav"):
        with pytest.raises(InputError, match=f"{name} is a playlist, which is not read here"):
            READERS[kind](tmp_path / name)


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    short = path.with_name(f"short{path.suffix}")
    short.write_bytes(content[: int(len(content) * share)])
    return short


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files(tmp_path, share):
    for suffix in (".jpg", ".png", ".webp", ".tiff"):
        Image.fromarray(noise(64, 64, 3)).save(tmp_path / f"a{suffix}")
        with pytest.raises(InputError, match="cannot be read as an image"):
            read_image(cut(tmp_path / f"a{suffix}", share))
    write_video(tmp_path / "a.mp4", noise(20, 64, 64, 3), 10)
    index_first = encode(tmp_path / "b.mp4", noise(20, 64, 64, 3), None, options={"movflags": "+faststart"})
    for path in (tmp_path / "a.mp4", index_first):
        with pytest.raises(InputError, match="cannot be read as a video"):
            read_video(cut(path, share))
    write_audio(tmp_path / "a.wav", tone(16000), 16000)
    flac = encode(tmp_path / "a.flac", None, (tone(64000) * 32767).astype(np.int16))
    for path in (tmp_path / "a.wav", flac):
        with pytest.raises(InputError, match="cannot be read as audio"):
            read_audio(cut(path, share))


def test_the_stream_that_is_asked_for_must_be_there(tmp_path):
    write_audio(tmp_path / "a.wav", tone(1600), 16000)
    write_video(tmp_path / "a.mp4", grey_frames(3), 10)
    write_image(tmp_path / "a.jpg", Image.new("RGB", (8, 8)))
    write_image(tmp_path / "a.png", Image.new("RGB", (8, 8)))
    with pytest.raises(InputError, match="no video stream"):
        read_video(tmp_path / "a.wav")
    with pytest.raises(InputError, match="no audio stream"):
        read_audio(tmp_path / "a.mp4")
    for name in ("a.jpg", "a.png"):
        with pytest.raises(InputError, match="cannot be read as a video"):
            read_video(tmp_path / name)


def test_an_unknown_codec_is_said_to_be_unknown(tmp_path):
    path = encode(tmp_path / "a.mp4", grey_frames(3), None)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(InputError, match="codec is not known"):
        read_video(path)


def test_limits_are_checked_before_decoding(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", Image.new("RGB", (100, 100)))
    write_video(tmp_path / "a.mp4", grey_frames(20), 10)
    write_audio(tmp_path / "a.wav", tone(32000), 16000)
    for kind, name, limit, amount in (
        ("image", "a.png", "max_pixels", 9999),
        ("image", "a.png", "max_bytes", 29999),
        ("video", "a.mp4", "max_pixels", 32 * 48 - 1),
        ("video", "a.mp4", "max_frames", 19),
        ("video", "a.mp4", "max_seconds", 1.9),
        ("video", "a.mp4", "max_bytes", 20 * 32 * 48 * 3 - 1),
        ("audio", "a.wav", "max_seconds", 1.9),
        ("audio", "a.wav", "max_bytes", 127_999),
    ):
        with pytest.raises(InputError, match=f"{name} has .* more than {limit}"):
            read_media(kind, tmp_path / name, limits=MediaLimits(**{limit: amount}))
        read_media(kind, tmp_path / name, limits=MediaLimits(**{limit: amount + 1}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a limit that is raised is not pre-empted by Pillow's
    assert read_media("image", tmp_path / "a.png").size == (100, 100)
    fits = MediaLimits(max_bytes=2 * 32 * 48 * 3)
    assert len(read_video(tmp_path / "a.mp4", 2, fits).frames) == 2


def test_arguments_are_checked(tmp_path):
    for arguments in ({"fps": 0}, {"fps": float("nan")}, {"fps": 2, "num_frames": 2}):
        with pytest.raises(InputError, match="fps"):
            read_video(tmp_path, **arguments)
    with pytest.raises(InputError, match="media type 'text'"):
        read_media("text", tmp_path)
    with pytest.raises(InputError, match="num_frames is 0"):
        read_video(tmp_path, num_frames=0)
    with pytest.raises(InputError, match="names no image format"):
        write_image(tmp_path / "a.xyz", Image.new("RGB", (4, 4)))
    with pytest.raises(InputError, match=r"must be uint8 \(F, H, W, 3\)"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 4, 4, 3), np.float32), 10)
    with pytest.raises(InputError, match="fps is nan"):
        write_video(tmp_path / "a.mp4", grey_frames(2), float("nan"))
    with pytest.raises(InputError, match="must be finite"):
        write_audio(tmp_path / "a.wav", np.array([np.nan]), 16000)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    write_audio(tmp_path / "a.wav", tone(100), 16000)
    before = (tmp_path / "a.wav").read_bytes()
    monkeypatch.setattr(wave.Wave_write, "writeframes", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_audio(tmp_path / "a.wav", tone(200), 16000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == before
