"""What must hold for the start of the programs: it takes hardly longer than that of PyTorch."""
import subprocess
import sys

from conftest import ROOT


def test_the_programs_start_without_torchvision_and_without_pytorchs_compiler():
    program = ("import sys, train, eval\n"
               "print([name for name in ('torchvision', 'torch._dynamo') if name in sys.modules])")
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
