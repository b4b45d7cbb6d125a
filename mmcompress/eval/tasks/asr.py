"""Speech recognition: word error rate on the clean reading of a book's opening, or on sentences that espeak-ng speaks."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from mmcompress.eval.tasks.base import Question, Sample, Scene, Task, folder_of, normalise, rng_of
from mmcompress.media import load_audio

RATE = 16000
PROMPT = "Transcribe the speech."
READING = (  # seconds of two_cities.wav, cut in its pauses, and the book's words (Charles Dickens, 1859, public domain)
    (
        (0.0, 13.1),
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was "
        "the epoch of belief, it was the epoch of incredulity,",
    ),
    (
        (13.1, 28.7),
        "it was the season of Light, it was the season of Darkness, it was the spring of hope, it was the winter of despair, "
        "we had everything before us, we had nothing before us, we were all going direct to Heaven, we were all going direct "
        "the other way",
    ),
    (
        (28.7, 44.37),
        "in short, the period was so far like the present period, that some of its noisiest authorities insisted on its being "
        "received, for good or for evil, in the superlative degree of comparison only.",
    ),
)
SENTENCES = (
    "The little boat came back to the harbour before the storm.",
    "She put the letter on the table and closed the window.",
    "We will meet at the station on Thursday morning.",
    "The old man told a long story about the river.",
    "Please bring seven apples and a loaf of bread.",
    "The train to the city leaves in twenty minutes.",
    "His brother plays the piano in the evening.",
    "A black cat was sleeping under the kitchen chair.",
    "The teacher asked a question and nobody answered.",
    "It rained all night and the garden was green again.",
)
VOICES = ("en", "en-us", "en-gb-scotland")


class AsrWer(Task):
    """Clips of at most 30 s, each with its words; the score is 1 - word error rate, at least 0. There is no train split.

    speech: "reading" (a clean recording, three clips) or "generated" (ten sentences, spoken by the program espeak-ng).
    data: the folder speech_samples, for the reading. FileNotFoundError where the recording or the program is absent.
    """

    name = "asr_wer"
    kind = "audio"
    setting = "speech"
    sampling_rate = RATE
    chance = 0.0
    needs = "the recording two_cities.wav in ../shared/data/speech_samples (or data=), and mmcompress[audio,eval]"

    def __init__(self, speech: str = "reading", data: str | Path | None = None) -> None:
        if speech not in ("reading", "generated"):
            raise ValueError(f"speech must be one of ['reading', 'generated'], got {speech!r}")
        self.speech, self.data = speech, data

    def length(self, split: str) -> int:
        """Three clips or ten sentences. Raises ValueError for the train split."""
        if split != "test":
            raise ValueError(f"split must be 'test' for the task asr_wer, on which nothing is trained, got {split!r}")
        return len(READING if self.speech == "reading" else SENTENCES)

    def scene(self, split: str, seed: int, index: int) -> Scene:
        """A clip with its transcript; the seed orders the sentences and draws their voices."""
        n = self.length(split)
        if self.speech == "reading":
            (start, end), words = READING[index]
            wave = load_audio(folder_of(self, "speech_samples", self.data, "two_cities.wav") / "two_cities.wav", RATE)
            wave = wave[round(start * RATE) : round(end * RATE)]
        else:
            words = SENTENCES[rng_of(seed, 15).permutation(n)[index]]
            wave = spoken(words, str(rng_of(seed, 16, index).choice(VOICES)))
        return Scene(wave, [Question(PROMPT, words, "transcript")])

    def score(self, sample: Sample, text: str) -> float:
        """1 - word error rate, at least 0; case and punctuation do not count. Raises ImportError without jiwer."""
        try:
            import jiwer
        except ImportError as e:
            raise ImportError("the task asr_wer needs jiwer: pip install mmcompress[eval]") from e
        return max(0.0, 1 - min(float(jiwer.wer(normalise(a), normalise(text))) for a in sample.answers))


def spoken(words: str, voice: str) -> np.ndarray:
    """The words as espeak-ng says them, mono float32 at 16 kHz. Raises FileNotFoundError where the program is absent."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise FileNotFoundError("generated speech of the task asr_wer needs the program espeak-ng; it is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speech.wav"
        subprocess.run([program, "-w", str(file), "-v", voice, "-s", "160", words], capture_output=True, check=True)
        return load_audio(file, RATE)
