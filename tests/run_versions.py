"""Run the unit tests on several versions of Python, each in an environment of its own.

python tests/run_versions.py                       3.11, 3.12 and 3.13
python tests/run_versions.py 3.13 --oldest         with the oldest releases that may be installed
python tests/run_versions.py 3.12 -- -k partition  only some tests, see pytest --help

Needs uv (`pip install uv`), which finds or fetches each Python. The environments stay in
runs/versions/, so that another run takes the time of the tests alone.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.11", "3.12", "3.13")


def install(version: str, oldest: bool) -> Path:
    """Make the environment, or bring it up to date; return its Python."""
    folder = ROOT / "runs" / "versions" / (f"{version}-oldest" if oldest else version)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv = [sys.executable, "-m", "uv"]
    if not python.exists():
        subprocess.run([*uv, "venv", "--python", version, folder], check=True)
    needs = ["-r", ROOT / "requirements.txt", "--python", python]
    kind = "lowest-direct" if oldest else "highest"
    subprocess.run([*uv, "pip", "install", "--resolution", kind, *needs], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of Python")
    parser.add_argument("--oldest", action="store_true", help="the oldest releases allowed")
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    arguments, results = parser.parse_args(own[:cut]), {}
    for version in arguments.versions:
        command = [install(version, arguments.oldest), "-m", "pytest", "tests", "-q"]
        results[version] = subprocess.run([*command, *own[cut + 1 :]], cwd=ROOT).returncode
    print(
        *(f"Python {v}: {'failed' if code else 'passed'}" for v, code in results.items()), sep="\n"
    )
    return max(results.values())


if __name__ == "__main__":
    sys.exit(main())
