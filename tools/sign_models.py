"""Sign the shipped bundles with a fresh development key: python -m tools.sign_models

The private half is never written anywhere, so there is none to keep or to lose: whoever remakes the bundles
makes a new pair, and the package ships the public half.
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
