"""Targets of the decoders, above all the log-mel, against formulas written out in numpy; and resampling."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.audio_utils import mel_filter_bank

from anygpt.decoders import AudioTargets, ImageTargets, VideoTargets, target_processor_from_dict
from anygpt.errors import InputError
from anygpt.media.audio import resample, to_mono


def tone(frequency: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(samples) * 0.2 + 0.05).astype(np.float32)


def naive_log_mel(waveform: np.ndarray) -> np.ndarray:
    """AudioLDM's log-mel `(frames, 64)` of a 16 kHz waveform, as HiFi-GAN's and librosa's formulas have it."""
    x = np.pad(waveform.astype(np.float64), 432, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(1024), np.arange(513)) / 1024)
    magnitude = np.abs(np.stack([(hann * x[i : i + 1024]) @ fourier for i in range(0, len(x) - 1023, 160)]))

    def mel_to_hz(mel):  # Slaney: linear to 1 kHz (15 mel), then 27 steps to each factor of 6.4
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    edges = mel_to_hz(np.linspace(0, 15 + 27 * np.log(8000 / 1000) / np.log(6.4), 66))
    bank = np.zeros((513, 64))
    for m in range(64):
        low, middle, high = edges[m : m + 3]
        for k in range(513):
            f = k * 16000 / 1024
            bank[k, m] = max(0, min((f - low) / (middle - low), (high - f) / (high - middle))) * 2 / (high - low)
    return np.log(np.maximum(magnitude @ bank, 1e-5))


@pytest.mark.parametrize("samples", [6400, 5000, 9000])
def test_log_mel_is_the_reference(samples):
    waveform = noise(samples)
    ours = AudioTargets(num_frames=40)([(waveform, 16000)])
    assert ours.shape == (1, 1, 40, 64) and ours.dtype == torch.float32
    cut = waveform[:6400].astype(np.float64)
    cut = (cut - cut.mean()) / np.abs(cut - cut.mean()).max() * 0.5
    expected = naive_log_mel(np.pad(cut, (0, 6400 - len(cut))))
    np.testing.assert_allclose(ours[0, 0], expected, atol=2e-4)


def test_log_mel_without_normalisation_is_torch_stft_with_audioldms_settings():
    waveform = noise(6400)
    ours = AudioTargets(num_frames=40, normalize=False)([(waveform, 16000)])
    padded = torch.nn.functional.pad(torch.from_numpy(waveform)[None], (432, 432), mode="reflect")[0]
    stft = torch.stft(padded, 1024, 160, 1024, torch.hann_window(1024), center=False, return_complex=True).abs()
    bank = mel_filter_bank(513, 64, 0, 8000, 16000, norm="slaney", mel_scale="slaney", dtype=np.float32)
    expected = (torch.from_numpy(bank).T @ stft).clamp(min=1e-5).log().T
    torch.testing.assert_close(ours[0, 0], expected, atol=1e-3, rtol=0)


@pytest.mark.slow  # librosa compiles as it starts
def test_log_mel_is_librosas():
    librosa = pytest.importorskip("librosa")
    waveform = noise(6400) + tone(700, 16000, seconds=0.4)
    mel = librosa.feature.melspectrogram(
        y=np.pad(waveform, 432, mode="reflect"),
        sr=16000,
        n_fft=1024,
        hop_length=160,
        window="hann",
        center=False,
        power=1.0,
        n_mels=64,
        fmin=0,
        fmax=8000,
        htk=False,
        norm="slaney",
    )
    ours = AudioTargets(num_frames=40, normalize=False)([(waveform, 16000)])
    assert ours.shape == (1, 1, 40, 64)
    np.testing.assert_allclose(ours[0, 0], np.log(np.maximum(mel, 1e-5)).T, atol=1e-3, rtol=0)


def test_normalisation_is_a_switch():
    waveform = noise(6400)
    louder = 0.3 * waveform + 0.2
    normalised, plain = AudioTargets(num_frames=40), AudioTargets(num_frames=40, normalize=False)
    torch.testing.assert_close(normalised([(waveform, 16000)]), normalised([(louder, 16000)]), atol=1e-3, rtol=0)
    assert (plain([(waveform, 16000)]) - plain([(louder, 16000)])).abs().max() > 0.5


def test_silence_is_the_floor():
    mel = AudioTargets(num_frames=20)([(np.zeros(100, np.float32), 16000)])
    torch.testing.assert_close(mel, torch.full((1, 1, 20, 64), float(np.log(1e-5))))


def test_a_tone_is_where_it_was_whatever_the_rate_and_channels():
    targets = AudioTargets(num_frames=40)
    expected = targets([(tone(1000, 16000), 16000)])
    for rate in (8000, 22050, 44100, 48000):
        stereo = np.stack([tone(1000, rate), tone(1000, rate)])
        mel = targets([(stereo, rate)])
        assert (mel[0, 0, 5:-5].argmax(-1) == expected[0, 0, 5:-5].argmax(-1)).all()
        torch.testing.assert_close(mel[0, 0, 5:-5, :25], expected[0, 0, 5:-5, :25], atol=0.2, rtol=0)


def test_a_batch_has_one_length():
    mel = AudioTargets(num_frames=40)([(noise(100), 16000), (noise(99999), 44100)])
    assert mel.shape == (2, 1, 40, 64) and mel.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (noise(100), "audio 1 is a ndarray"),
        ((np.zeros(0, np.float32), 16000), "audio 1 is float32"),
        ((np.zeros(100, np.int16), 16000), "audio 1 is int16"),
        ((np.full(100, np.nan, np.float32), 16000), "audio 1 is float32"),
        ((noise(100), 0), "not 0"),
        ((noise(100).reshape(1, 1, 100), 16000), r"\(1, 1, 100\)"),
    ],
)
def test_bad_audio_is_said(bad, message):
    with pytest.raises(InputError, match=message):
        AudioTargets(num_frames=10)([(noise(100), 16000), bad])


# ---- resampling

RATES = [(44100, 16000), (48000, 16000), (8000, 16000), (16000, 44100), (22050, 16000), (44101, 16000), (11127, 8000)]


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampling_keeps_tones_in_place(source, target):
    for frequency in (100, 440, 3000, 0.9 * min(source, target) / 2):
        resampled = resample(tone(frequency, source), source, target)
        expected = tone(frequency, target, seconds=1)[: len(resampled)]
        assert resampled.dtype == np.float32 and len(resampled) == -(-int(source * 0.5) * target // source)
        inner = slice(target // 20, -target // 20)  # a tone that starts at once is not band-limited
        np.testing.assert_allclose(resampled[inner], expected[inner], atol=1e-3)


@pytest.mark.parametrize("frequency", [8050, 8200, 9000, 12000, 15900, 20000])
def test_nothing_above_the_new_nyquist_comes_back(frequency):
    resampled = resample(tone(frequency, 44100), 44100, 16000)
    assert np.abs(resampled[800:-800]).max() < 0.5 * 10 ** (-60 / 20)


def test_stereo_at_48_khz():
    kept, gone = [440, 3000, 7400], [8100, 9000, 15999, 23000]
    left = sum(tone(f, 48000, seconds=1) / 8 for f in kept + gone)
    right = sum(tone(f, 48000, seconds=1) / 8 for f in gone)
    both = resample(np.stack([left, right]), 48000, 16000)
    assert both.shape == (2, 16000)
    # Half a second from the middle, whole periods of the tones: a line is 2 Hz, amplitude 1/16.
    lines = np.abs(np.fft.rfft(both[:, 4000:12000])) / 4000
    assert np.flatnonzero(lines[0] > 1e-4).tolist() == [f // 2 for f in kept]
    np.testing.assert_allclose(lines[0, [f // 2 for f in kept]], 1 / 16, rtol=1e-3)
    assert lines[1].max() < 1e-6
    np.testing.assert_allclose(resample(to_mono(np.stack([left, right])), 48000, 16000), both.mean(0), atol=1e-6)


def test_resampling_channels_impulses_and_nothing():
    stereo = np.stack([noise(1000), noise(1000, seed=1)])
    both = resample(stereo, 44100, 16000)
    assert both.shape == (2, 363)
    np.testing.assert_array_equal(both[1], resample(stereo[1], 44100, 16000))
    assert resample(stereo, 16000, 16000) is stereo
    # an impulse at the end does not wrap around to the start
    impulse = np.zeros(4410, np.float32)
    impulse[-1] = 1
    early = resample(impulse, 44100, 16000)
    assert np.abs(early[:400]).max() < 1e-4 and np.abs(early).argmax() == len(early) - 1
    constant = resample(np.ones(44100, np.float32), 44100, 16000)
    np.testing.assert_allclose(constant[800:-800], 1, atol=1e-4)
    with pytest.raises(InputError, match="not -1"):
        resample(stereo, 16000, -1)


def test_to_mono():
    stereo = np.stack([noise(10), noise(10, seed=1)])
    np.testing.assert_allclose(to_mono(stereo), (stereo[0] + stereo[1]) / 2)
    assert to_mono(stereo).dtype == np.float32 and (to_mono(stereo[0]) == stereo[0]).all()
    with pytest.raises(InputError, match="channels, samples"):
        to_mono(stereo[None])


# ---- images and videos


def test_images_are_covered_and_cropped_in_the_middle():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    (pixels,) = ImageTargets(height=8, width=8)([Image.fromarray(wide)])
    torch.testing.assert_close(pixels, torch.ones(3, 8, 8))
    tall = ImageTargets(height=4, width=8)([Image.fromarray(wide)])
    assert tall.shape == (1, 3, 4, 8) and tall.dtype == torch.float32
    exact = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    (pixels,) = ImageTargets(height=8, width=6)([Image.fromarray(exact)])
    torch.testing.assert_close(pixels, torch.from_numpy(exact).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_images_of_any_mode(mode):
    pixels = ImageTargets(height=8, width=8)([Image.new("RGB", (9, 9), "white").convert(mode)])
    torch.testing.assert_close(pixels, torch.ones(1, 3, 8, 8), atol=0.02, rtol=0)


def test_transparency_is_laid_on_white():
    pixels = ImageTargets(height=4, width=4)([Image.new("RGBA", (4, 4), (255, 0, 0, 0))])
    torch.testing.assert_close(pixels, torch.ones(1, 3, 4, 4))


def test_video_frames_are_taken_evenly_and_repeated():
    video = np.repeat(np.arange(9, dtype=np.uint8), 4 * 4 * 3).reshape(9, 4, 4, 3)

    def frames(length, count):
        targets = VideoTargets(height=4, width=4, num_frames=count)([video[:length]])
        assert targets.shape == (1, 3, count, 4, 4)
        return ((targets[0, 0, :, 0, 0] + 1) * 127.5).round().int().tolist()

    assert frames(9, 5) == [0, 2, 4, 6, 8]
    assert frames(9, 9) == list(range(9))
    assert frames(2, 4) == [0, 0, 1, 1]
    assert frames(1, 3) == [0, 0, 0]


@pytest.mark.parametrize(
    "video", [np.zeros((2, 4, 4, 4), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8), "x"]
)
def test_bad_videos_are_said(video):
    with pytest.raises(InputError, match=r"video 0 is .*expected a uint8 array"):
        VideoTargets(height=4, width=4, num_frames=2)([video])


def test_bad_images_and_no_media_are_said():
    with pytest.raises(InputError, match="image 0 is a ndarray"):
        ImageTargets(height=4, width=4)([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(InputError, match="at least one image"):
        ImageTargets(height=4, width=4)([])


@pytest.mark.parametrize(
    "targets", [ImageTargets(8, 16), VideoTargets(8, 16, 4), AudioTargets(num_frames=4, fmax=4000.0)]
)
def test_configurations_survive_json(targets):
    assert target_processor_from_dict(json.loads(json.dumps(targets.to_dict()))) == targets
