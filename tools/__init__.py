"""Scripts that remake the shipped bundles; nothing here is installed or imported by the runtime."""
