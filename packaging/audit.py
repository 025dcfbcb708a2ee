"""Look up the locked versions in a database of vulnerabilities: ``python packaging/audit.py [LOCK] [ADDRESS]``.

Prints what is known of each, and ends with 1 if there is something. Ends with 0 and says so if the database does not
answer. The database is OSV, https://google.github.io/osv.dev/post-v1-querybatch; it gets the names and versions, once.
"""

import json
import re
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path

LOCK = Path(__file__).parent / "requirements.lock"
ADDRESS = "https://api.osv.dev/v1/querybatch"
TIMEOUT_SECONDS = 10


def locked(lock: Path) -> list[tuple[str, str]]:
    """Return names and versions of a lock file."""
    return re.findall(r"^([a-z0-9-]+)==([^\s;]+)", lock.read_text(encoding="utf-8"), re.MULTILINE)


def vulnerabilities(pins: list[tuple[str, str]], address: str) -> list[str]:
    """Return one line for each version with known vulnerabilities.

    Raises:
        OSError, HTTPException: the database cannot be reached.
        ValueError, KeyError, TypeError: something else answered, such as the login page of a network.
    """
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in pins]
    request = urllib.request.Request(  # noqa: S310 - https, or what the caller named
        address, json.dumps({"queries": queries}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310
        results = json.load(response)["results"]
    return [
        f"{name} {version}: {', '.join(one['id'] for one in result['vulns'])}"
        for (name, version), result in zip(pins, results, strict=True)
        if result.get("vulns")
    ]


def main(lock: str = str(LOCK), address: str = ADDRESS) -> None:
    """Print what is known, and end with 1 if there is something."""
    pins = locked(Path(lock))
    try:
        found = vulnerabilities(pins, address)
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        print(f"vulnerabilities not checked: the database does not answer ({error!r})", file=sys.stderr)
        return
    print(f"{len(found)} of {len(pins)} locked versions have known vulnerabilities", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
