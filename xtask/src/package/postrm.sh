#!/bin/sh
# Configurations and keys in /etc/tunnel are the administrator's: not even purge removes them.
set -e

if [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload || true
fi
if [ "$1" = remove ] || [ "$1" = purge ]; then
    # Sockets of what does not run any more. Those of daemons that are no units of this package stay.
    for socket in /run/tunnel/admin-agent.sock /run/tunnel-gateway/admin.sock; do rm -f "$socket"; done
    rmdir --ignore-fail-on-non-empty /run/tunnel /run/tunnel-gateway 2>/dev/null || true
fi
if [ "$1" = purge ]; then
    # Enabled by the administrator; there is nothing to enable any more.
    rm -f /etc/systemd/system/*.wants/tunnel-agent.service /etc/systemd/system/*.wants/tunnel-gateway.service
    rmdir --ignore-fail-on-non-empty /etc/tunnel 2>/dev/null || true
    # Whoever got its number next would own the keys that are left.
    if [ ! -e /etc/tunnel ] && getent passwd tunnel >/dev/null && command -v userdel >/dev/null; then
        userdel tunnel || true
    fi
fi
exit 0
