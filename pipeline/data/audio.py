"""Speech from bytes to float32 at 16 kHz.

In: the bytes of a FLAC or WAV file. Out: ``(samples,)`` float32. soundfile decodes, without the interpreter's lock;
torchaudio's own loader would need FFmpeg.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile


class DecodeError(ValueError):
    """A file whose content can't be turned into a tensor; the message is the reason without the file's name."""


def decode_audio(content: bytes, start: int = 0, samples: int | None = None) -> np.ndarray:
    """Decode ``samples`` audio samples from ``start`` on, or all: float32 ``(samples,)`` in [-1, 1], channels averaged.

    Raises :class:`DecodeError` if the file is no audio or ends early.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            wanted = file.frames - start if samples is None else samples
            if start:
                file.seek(start)
            waveform = file.read(wanted, dtype="float32", always_2d=True)  # (samples, channels)
    except soundfile.LibsndfileError as error:
        # Its own text, for str(error) has the address of the buffer in it, and reasons must be repeatable.
        raise DecodeError(f"not decodable as audio: {error.error_string}") from error
    if len(waveform) != wanted:
        raise DecodeError(f"ends after {start + len(waveform)} of {start + wanted} audio samples")
    return waveform[:, 0] if waveform.shape[1] == 1 else waveform.mean(axis=1)


def normalise(waveform: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the clip, as wav2vec 2.0's large models are fed."""
    centred = waveform - waveform.mean(dtype=np.float64).astype(np.float32)
    variance = np.square(centred, dtype=np.float64).mean()
    return (centred / np.sqrt(variance + 1e-5)).astype(np.float32)
