import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """golden("todre") -> list of cases: the parameters of each and, under the arrays' names, torch tensors."""

    def load(name, kind=None):
        with np.load(GOLDEN / f"{name}_dev.npz", allow_pickle=False) as z:
            cases = json.loads(str(z["meta"]))
            for i, case in enumerate(cases):
                prefix = f"{case.get('id', f'{i:02d}')}."
                case |= {key[len(prefix) :]: torch.from_numpy(z[key]) for key in z.files if key.startswith(prefix)}
        return [c for c in cases if kind in (None, c["kind"])]

    return load
