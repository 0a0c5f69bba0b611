"""Conversations with media: their schema, file formats, decoding, dataset and sampling."""
# ruff: noqa: F401 (the names of the package)

from anygpt.data.dataset import BadSample, ConversationDataset, DataSource, LoadedSample
from anygpt.data.formats.reading import FORMATS, read_samples
from anygpt.data.sampling import UpdateSampler
from anygpt.data.schema import ContentPart, MediaRoot, Message, Sample, parse_sample
from anygpt.media.files import Audio, MediaLimits, Video, read_audio, read_image
from anygpt.media.types import read_media
from anygpt.media.videos import read_video
from anygpt.media.writing import write_audio, write_image, write_video
