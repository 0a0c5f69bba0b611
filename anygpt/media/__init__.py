"""Images, video and audio: reading, writing, resampling."""
