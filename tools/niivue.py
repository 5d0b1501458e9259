"""Take the 3D viewer of `cwdm report` from its npm package, as pinned in niivue.json beside it.

    python tools/niivue.py

To move to another version, change version, tarball, integrity (`npm view @niivue/niivue
dist.integrity`) and the SHA-256 of the file, run this and the tests, and see whether the licenses
in niivue.LICENSE.txt still are those of what the package brings.
"""

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from urllib.request import urlopen

FOLDER = Path(__file__).parents[1] / "cwdm" / "viewer"


def main() -> None:
    """Download, check, write."""
    pin = json.loads((FOLDER / "niivue.json").read_text())
    with urlopen(pin["tarball"], timeout=60) as response:
        package = response.read()
    found = "sha512-" + base64.b64encode(hashlib.sha512(package).digest()).decode()
    if found != pin["integrity"]:
        sys.exit(f"{pin['tarball']}: found {found}, expected {pin['integrity']}")
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        member = archive.extractfile(pin["file"])
        assert member is not None
        script = member.read()
    digest = hashlib.sha256(script).hexdigest()
    if digest != pin["sha256"]:
        sys.exit(f"{pin['file']}: found SHA-256 {digest}, expected {pin['sha256']}")
    path = FOLDER / Path(pin["file"]).name
    path.write_bytes(script)
    print(f"{path}: {pin['package']} {pin['version']}")


if __name__ == "__main__":
    main()
