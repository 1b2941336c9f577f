"""Sign the shipped bundles with a fresh development key: python -m tools.sign_models

The private key is never written to disk, so it cannot be lost or stolen. To remake the bundles means to make a new key
pair; the package ships the public key.
"""

from pathlib import Path

from edge_runtime.bundles.folder import sign_bundle
from edge_runtime.bundles.manifest import MANIFEST
from edge_runtime.bundles.signing import generate, key_id

TOP = Path(__file__).parent.parent


def main() -> None:
    private, public = generate()
    for manifest in sorted(TOP.glob(f"models/*/{MANIFEST}")):
        bundle = sign_bundle(manifest.parent, private)
        print(f"signed {bundle.manifest.name} {bundle.manifest.version} in {manifest.parent.name}")
    target = TOP / "edge_runtime" / "keys" / "development.pub"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(public)
    print(f"key {key_id(public)}")


if __name__ == "__main__":
    main()
