#!/usr/bin/env bash
# Installs Debian's mosquitto and its clients if they are missing and this user is permitted to; otherwise prints the command.
set -u
PATH=$PATH:/usr/sbin
command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null && exit 0
install="apt-get install -y --no-install-recommends mosquitto mosquitto-clients"
as_root=""
if [[ $(id -u) != 0 ]]; then
  if sudo -n true 2>/dev/null; then
    as_root="sudo -n"
  else
    echo "The MQTT broker is missing; to include the cloud part, run: sudo $install"
    exit 0
  fi
fi
echo "installing the MQTT broker (mosquitto)"
export DEBIAN_FRONTEND=noninteractive
{ $as_root apt-get update -qq && $as_root $install -qq; } >/dev/null 2>&1 ||
  echo "mosquitto could not be installed; to include the cloud part, run: sudo $install"
exit 0
