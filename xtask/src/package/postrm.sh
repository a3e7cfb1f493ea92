#!/bin/sh
# Configurations and keys in /etc/tunnel are the administrator's: not even purge removes them.
set -e

if [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload || true
fi
if [ "$1" = remove ] || [ "$1" = purge ]; then
    rm -rf /run/tunnel /run/tunnel-gateway
fi
if [ "$1" = purge ]; then
    # Enabled by the administrator; there is nothing to enable any more.
    rm -f /etc/systemd/system/*.wants/tunnel-agent.service /etc/systemd/system/*.wants/tunnel-gateway.service
    rmdir --ignore-fail-on-non-empty /etc/tunnel 2>/dev/null || true
    if getent passwd tunnel >/dev/null && command -v userdel >/dev/null; then
        userdel tunnel || true
    fi
fi
exit 0
