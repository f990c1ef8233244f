"""What must hold for the start of the programs: it takes hardly longer than that of PyTorch."""
import subprocess
import sys

import pytest

from conftest import ROOT, run_program


def test_the_programs_start_without_torchvision_and_without_pytorchs_compiler():
    program = ("import sys, train, eval\n"
               "print([name for name in ('torchvision', 'torch._dynamo') if name in sys.modules])")
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["vlpose", "eval", "train", "uda"])
def test_a_file_data_py_beside_a_users_script_is_named_with_what_to_do(tmp_path, module):
    (tmp_path / "data.py").write_text("mine = 7")
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.append({str(ROOT)!r}); import {module}")
    ended = run_program(script)
    assert ended.returncode == 1
    assert (f"expected {ROOT / 'data.py'} as the module 'data', found {tmp_path / 'data.py'}; "
            "rename that file, or begin the script with sys.path.insert(0, ") in ended.stderr
    script.write_text(script.read_text().replace("append(", "insert(0, "))
    assert run_program(script).returncode == 0
