import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are so small that a second thread takes longer
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
REAL = ROOT.parent / "shared" / "real"  # real samples; tests that want them skip where they are missing


@pytest.fixture
def real():
    if not REAL.exists():
        pytest.skip("no real samples here")
    return REAL
