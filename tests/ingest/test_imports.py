"""What the command line imports at its top stays light."""

import subprocess
import sys
from pathlib import Path


def test_values_of_ingest_import_nothing_heavy() -> None:
    code = (
        "import sys, ingest.errors, ingest.manifest, ingest.record, ingest.split, ingest.embedded\n"
        "heavy = {'torch', 'mlflow', 'kafka', 'dvc', 'great_expectations', 'pandas', 'pyarrow', 'pygit2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
