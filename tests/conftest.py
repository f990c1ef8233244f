import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
REAL = ROOT.parent / "shared" / "real"  # real samples; tests that want them skip where they are missing


@pytest.fixture
def real():
    if not REAL.exists():
        pytest.skip("no real samples here")
    return REAL
