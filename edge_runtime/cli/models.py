"""The commands that list, show, verify, pack and sign model bundles."""

import json
from pathlib import Path

import click

from edge_runtime.cli.options import SuggestingGroup, config_option, json_option, reports_errors
from edge_runtime.core.errors import EdgeRuntimeError


@click.group(cls=SuggestingGroup)
def models() -> None:
    """List, show, verify, pack and sign model bundles."""


@models.command("list")
@config_option
@json_option
@reports_errors
def models_list(config_path: Path | None, as_json: bool) -> None:
    """List the configured models.

    \b
    Examples:
      edge-runtime models list --json | jq .[].digest
    """
    from edge_runtime.bundles.folder import find_bundle, load_bundle
    from edge_runtime.config import load_config
    from edge_runtime.runtime import admission_of

    rows = []
    config = load_config(config_path)
    admission = admission_of(config)
    for name in config.models:
        bundle = load_bundle(find_bundle(name), admission.trust)
        manifest = bundle.manifest
        report = admission.quarantine.report_of(bundle.digest)
        rows.append(
            {
                "name": manifest.name,
                "version": manifest.version,
                "task": manifest.task,
                "engine": manifest.engine,
                "bytes": sum(entry.size for entry in manifest.files),
                "memory_mb": None if report is None else round(report.memory_bytes / 1e6, 1),
                "digest": bundle.digest,
                "signed_by": bundle.signed_by,
            }
        )
    if as_json:
        click.echo(json.dumps(rows))
        return
    from edge_runtime.cli.tables import print_models

    print_models(rows)


@models.command("show")
@click.argument("bundle")
@config_option
@json_option
@reports_errors
def models_show(bundle: str, config_path: Path | None, as_json: bool) -> None:
    """Show a bundle's manifest and costs.

    BUNDLE is a name or a path. Costs are what loading it takes, and what its batches take. The bundle is loaded, so its
    signature must hold.

    \b
    Examples:
      edge-runtime models show commands
    """
    import msgspec

    from edge_runtime.config import load_config
    from edge_runtime.loading.model import cost_of, load_model
    from edge_runtime.runtime import admission_of

    config = load_config(config_path)
    admission = admission_of(config)
    model = load_model(
        bundle,
        threads=config.threads,
        trust=admission.trust,
        max_batch=config.batch.max,
        quarantine=admission.quarantine,
    )
    tree = msgspec.to_builtins(model.manifest)
    tree["digest"] = model.digest
    tree["loaded"] = cost_of(model.info)
    model.engine.close()
    if as_json:
        click.echo(json.dumps(tree))
        return
    from edge_runtime.cli.tables import print_manifest

    print_manifest(tree)


@models.command("verify")
@click.argument("bundle")
@click.option(
    "--again", is_flag=True, help="Also repeat its first load in the sandbox, whatever its result was before."
)
@config_option
@json_option
@reports_errors
def models_verify(bundle: str, again: bool, config_path: Path | None, as_json: bool) -> None:
    """Check a bundle's signature and digests.

    BUNDLE is a name or a path. The exit code is 1 if the bundle must not be used.

    \b
    Examples:
      edge-runtime models verify commands
      edge-runtime models verify ./my-bundle --config edge.toml     # with the keys that edge.toml trusts
      edge-runtime models verify commands --again                  # end the quarantine after failed first loads
    """
    from edge_runtime.bundles.folder import find_bundle, load_bundle
    from edge_runtime.bundles.trust import read_trust
    from edge_runtime.config import load_config

    config = load_config(config_path)
    trust = read_trust(config.trust.keys, allow_unsigned=config.trust.unsigned)
    loaded = load_bundle(find_bundle(bundle), trust)
    manifest = loaded.manifest
    if again:
        from edge_runtime.runtime import admission_of

        quarantine = admission_of(config).quarantine
        quarantine.release(loaded.digest)
        quarantine.admit(loaded, threads=config.threads, max_batch=min(manifest.batch.max, config.batch.max))
    result = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": loaded.digest,
        "signed_by": loaded.signed_by,
        "ok": True,
    }
    signer = f"signed by {loaded.signed_by}" if loaded.signed_by else "not signed"
    line = f"ok: {manifest.name} {manifest.version} sha256:{loaded.digest}, {signer}"
    click.echo(json.dumps(result) if as_json else line)


@models.command("keygen")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
@reports_errors
def models_keygen(path: Path, as_json: bool) -> None:
    """Make a key pair.

    PATH signs bundles and stays with you; PATH.pub is for [trust] keys of your devices.

    \b
    Examples:
      edge-runtime models keygen my-key
    """
    import os

    from edge_runtime.bundles.signing import generate, key_id

    private, public = generate()
    public_path = path.with_name(path.name + ".pub")
    try:
        # O_EXCL: a key that is overwritten is lost, and with it every device that trusts it alone.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(private)
        with public_path.open("xb") as file:
            file.write(public)
    except OSError as error:
        raise EdgeRuntimeError(
            f"{error.filename} cannot be written ({error.strerror}); choose another name."
        ) from None
    result = {"private": str(path), "public": str(public_path), "key": key_id(public)}
    click.echo(
        json.dumps(result) if as_json else f"key {result['key']}: {path} (keep it secret) and {public_path}"
    )


@models.command("pack")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Private key to sign with, as keygen wrote it.")
@json_option
@reports_errors
def models_pack(source: Path, out: Path, key: Path | None, as_json: bool) -> None:
    """Make a bundle from a folder.

    SOURCE holds manifest.json (without files and format) and plain payloads; OUT is the bundle.

    \b
    Examples:
      edge-runtime models pack ./my-model ./my-bundle --key my-key
    """
    from edge_runtime.bundles.folder import pack_folder, sign_bundle

    bundle = pack_folder(source, out)
    if key is not None:
        bundle = sign_bundle(out, _private_key(key))
    manifest = bundle.manifest
    result = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": bundle.digest,
        "bytes": bundle.stored_bytes,
        "signed": key is not None,
    }
    state = "signed" if key is not None else "not signed"
    line = f"packed: {manifest.name} {manifest.version}, {bundle.stored_bytes:,} bytes, {state}"
    click.echo(json.dumps(result) if as_json else line)


def _private_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EdgeRuntimeError(
            f"{path} cannot be read ({error.strerror}); give the file keygen wrote."
        ) from None


@models.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key that keygen wrote.")
@json_option
@reports_errors
def models_sign(bundle: Path, key: Path, as_json: bool) -> None:
    """Sign a bundle.

    BUNDLE is its folder; earlier signatures are replaced.

    \b
    Examples:
      edge-runtime models sign ./my-bundle --key my-key
    """
    from edge_runtime.bundles.folder import sign_bundle

    loaded = sign_bundle(bundle, _private_key(key))
    result = {"name": loaded.manifest.name, "version": loaded.manifest.version, "digest": loaded.digest}
    line = f"signed: {result['name']} {result['version']} sha256:{loaded.digest}"
    click.echo(json.dumps(result) if as_json else line)
