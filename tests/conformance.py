"""What an S3 store does, as one document: the store contract test by test, and what the probe finds.

    AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... \\
      python -m tests.conformance http://127.0.0.1:8333 BUCKET [--against tests/data/conformance/NAME.json]

The last line is the JSON document; with `--against`, another outcome than the recorded one ends with 1.
Whatever is written lies under random prefixes of the bucket and is left there. A throwaway Ceph gateway
for it comes from Debian's packages: tests/ceph_gateway.sh.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from storage.object_store import StorageConfig
from storage.probe import probe_store
from storage.s3_store import S3Store

ROOT = Path(__file__).parents[1]
CONTRACT = "tests/integration/test_given_store.py"
_PASSING = ("uri", "clock_skew_s")


def capabilities(store: S3Store) -> dict[str, Any]:
    """What the probe says of a store, without what differs from run to run."""
    found = dataclasses.asdict(probe_store(store, allow_single_writer=True))
    return {name: value for name, value in found.items() if name not in _PASSING}


def contract(endpoint: str, bucket: str) -> dict[str, str]:
    """Run the contract's tests; return the outcome of each by its name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", CONTRACT, "-q", "-p", "no:cacheprovider"]
        subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "NIGHTJAR_TEST_ENDPOINT": endpoint, "NIGHTJAR_TEST_BUCKET": bucket},
            stdout=sys.stderr,
            check=False,
        )
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {_name(case): _outcome(case) for case in cases}


def _name(case: ElementTree.Element) -> str:
    return re.sub(r"\\[ux][0-9a-f]+", "?", case.attrib["name"]).removeprefix("test_")


def _outcome(case: ElementTree.Element) -> str:
    return "passed" if len(case) == 0 else case[0].tag


def main() -> int:
    """Run both against one store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("endpoint")
    parser.add_argument("bucket")
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    config = StorageConfig(endpoint_url=args.endpoint)
    store = S3Store(f"s3://{args.bucket}/conformance", config)
    document = {
        "probe": capabilities(store),
        "contract": contract(args.endpoint, args.bucket),
    }
    print(json.dumps(document, sort_keys=True))
    if args.against is None:
        return 0
    recorded = json.loads(args.against.read_text())
    return int(document != {key: recorded[key] for key in document})


if __name__ == "__main__":
    sys.exit(main())
