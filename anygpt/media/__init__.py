"""Images, clips and sounds: reading, writing, resampling."""
