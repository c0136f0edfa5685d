"""Writes the default policy files: `python -m services.adminapi.includes --write DIR`.

Owns what is overwritten. Must not know which call belongs where. Invariant: a file that
a person may have put rules into is never changed, and each file is whole or as before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bulkhead.durable import write_file
from services.adminapi.core import policy_includes


def write(directory: Path) -> list[str]:
    """Write into a policy.d directory; one sentence per file. OSError."""
    told = []
    (directory / "include").mkdir(mode=0o755, parents=True, exist_ok=True)
    # Included files first: a top file without them would deny everything.
    for path, text in policy_includes.include_files().items():
        place = directory / path
        if place.exists():
            told.append(f"kept {place}: it may have rules")
        else:
            write_file(place, text.encode(), 0o644)
            told.append(f"wrote {place}")
    for path, text in policy_includes.generated_files().items():
        place = directory / path
        if place.exists() and not policy_includes.is_generated(place.read_text("utf-8")):
            told.append(f"kept {place}: somebody else made it")
        else:
            write_file(place, text.encode(), 0o644)
            told.append(f"wrote {place}")
    return told


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Write the default Admin API policy.")
    parser.add_argument("--write", type=Path, metavar="DIR", help="a policy.d directory")
    args = parser.parse_args()
    if args.write is None:
        for path, names in policy_includes.assignment().items():
            print(path)
            print("".join(f"    {name}\n" for name in names), end="")
        return 0
    try:
        for sentence in write(args.write):
            print(sentence)
    except (OSError, UnicodeDecodeError) as error:
        print(f"the files could not be written: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
