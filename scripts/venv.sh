# Sourced by scripts/demo, scripts/test and scripts/check: goes to the project's root and puts .venv/bin first in PATH,
# having made .venv with everything that constraints.txt pins where there is none (or an unfinished one).
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -e .venv/ready || pyproject.toml -nt .venv/ready || constraints.txt -nt .venv/ready ]]; then
  python=$(command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer, found $("$python" -V)" >&2; exit 1; }
  echo "Setting up .venv with $("$python" -V); this takes a minute or two." >&2
  "$python" -m venv .venv
  # PyTorch alone and first: whichever build of the pinned version is at hand is then kept.
  .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch 1>&2
  .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' 1>&2
  touch .venv/ready
fi
export PATH="$PWD/.venv/bin:$PATH"
