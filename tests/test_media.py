"""Pictures and clips from files: what is turned, transparent, deep or long, and what is refused."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mmcompress.media import load_image, load_video


def test_a_picture_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (20, 10), "white")
    picture.putpixel((0, 0), (0, 0, 0))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (10, 20) and upright.getpixel((9, 0)) == (0, 0, 0)


def test_what_is_transparent_shows_white(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255]]], dtype="uint8"), "RGBA").save(tmp_path / "text.png")
    shown = load_image(tmp_path / "text.png")
    assert shown.mode == "RGB" and [shown.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (0,) * 3]


def test_sixteen_bits_become_eight(tmp_path):
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype="uint16")).save(tmp_path / "deep.png")
    deep = load_image(tmp_path / "deep.png")
    assert [deep.getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]
    Image.fromarray(np.array([[0.0, 0.5]], dtype="float32")).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="image must be a picture"):
        load_image(tmp_path / "float.tiff")


@pytest.mark.parametrize(("length", "wanted"), [(1, [0]), (3, [0, 1, 2]), (40, [5, 15, 25, 35])])
def test_frames_are_those_of_their_numbers(tmp_path, length, wanted):
    path = str(tmp_path / "clip.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 32))
    for i in range(length):
        writer.write(np.full((32, 32, 3), 6 * i, dtype="uint8"))
    writer.release()
    frames, numbers, fps = load_video(path, num_frames=4)
    assert numbers == wanted and fps == 10 and frames.shape == (len(wanted), 32, 32, 3)
    assert np.abs(frames.mean((1, 2, 3)) - 6 * np.array(wanted)).max() < 2
