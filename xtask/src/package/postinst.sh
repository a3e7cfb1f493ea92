#!/bin/sh
# The user and the folders of the units. Nothing is started, enabled or restarted: a daemon that runs goes on with the version it is.
set -e

if [ "$1" = configure ]; then
    if command -v systemd-sysusers >/dev/null; then
        systemd-sysusers tunnel.conf
    fi
    if [ -d /run/systemd/system ]; then
        systemd-tmpfiles --create tunnel.conf
        systemctl --system daemon-reload
    fi
fi
exit 0
