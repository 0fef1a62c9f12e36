"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
VECTORS = ROOT / "tests" / "vectors"
YAMLS = ROOT / "yamls"
