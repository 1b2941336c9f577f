"""Scripts that make bundles and measure them. The runtime neither installs nor imports anything from here."""
