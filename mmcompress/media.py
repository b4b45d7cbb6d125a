"""Pictures, clips and recordings from files. A file that is missing or broken is an OSError or ValueError of one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def load_image(path: str | Path) -> Image.Image:
    """The picture in RGB, turned upright as its EXIF orientation says; what is transparent shows white, 16 bits become 8.

    Raises FileNotFoundError or, for what is no picture of 8 or 16 bits a channel, ValueError.
    """
    from PIL import Image, ImageOps

    _existing(path, "image")
    try:
        with Image.open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"image has too many pixels to be safe, got {str(path)!r}") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for some broken PNG files
        raise ValueError(f"image must be a picture that Pillow can read, got {str(path)!r}") from error


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):  # Pillow would cut off what is above 255
        import numpy as np

        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"a channel must have 8 or 16 bits, got mode {image.mode}")
        image = Image.fromarray((values / 257 + 0.5).astype("uint8"))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def load_video(path: str | Path, num_frames: int = 8) -> tuple[np.ndarray, list[int], float]:
    """At most `num_frames` evenly spaced frames [T, H, W, 3] in RGB, their numbers in the clip, and its frames per second."""
    _existing(path, "video")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("reading a video needs OpenCV: pip install 'mmcompress[video]'") from error
    import numpy as np

    capture = cv2.VideoCapture(str(path))
    total = 0
    while capture.grab():  # the frame count of a header is not to be trusted: count what can be decoded
        total += 1
    fps = capture.get(cv2.CAP_PROP_FPS) or 24.0
    capture.release()
    if not total:
        raise ValueError(f"video must be a clip that OpenCV can read, got {str(path)!r}")
    n = min(num_frames, total)
    numbers = [(2 * i + 1) * total // (2 * n) for i in range(n)]
    capture, frames = cv2.VideoCapture(str(path)), []
    for i in range(numbers[-1] + 1):  # a clip in memory would take gigabytes a minute
        capture.grab()
        if i in numbers:
            frames.append(capture.retrieve()[1][..., ::-1])
    capture.release()
    return np.stack(frames), numbers, float(fps)


def load_audio(path: str | Path, sampling_rate: int) -> np.ndarray:
    """The recording as mono float32 [samples] at `sampling_rate` Hz."""
    _existing(path, "audio")
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading a recording needs soundfile: pip install 'mmcompress[audio]'") from error
    try:
        wave, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"audio must be a recording that soundfile can read, got {str(path)!r}") from error
    wave = wave.mean(1)
    if not len(wave):
        raise ValueError(f"audio must hold at least one sample, got {str(path)!r}")
    return wave if rate == sampling_rate else _resample(wave, rate, sampling_rate)


def _resample(wave: Any, rate: int, target: int) -> Any:
    try:
        from torchaudio.functional import resample
    except ImportError as error:
        raise ImportError(
            f"a recording at {rate} Hz for a model that hears {target} Hz needs torchaudio: pip install 'mmcompress[audio]'"
        ) from error
    import torch

    return resample(torch.from_numpy(wave), rate, target).numpy()


def _existing(path: str | Path, name: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} must be an existing file, got {str(path)!r}")
