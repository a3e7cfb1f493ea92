#!/bin/sh
# Units are stopped when the package is removed, not when it is replaced. Captures outlive a daemon, and without the program nobody
# could end them: they end here.
set -e

if [ "$1" = remove ]; then
    if [ -d /run/systemd/system ]; then
        for unit in tunnel-agent.service tunnel-gateway.service; do
            deb-systemd-invoke stop "$unit" || true
        done
    fi
    if [ -f /etc/tunnel/agent.toml ]; then
        tunnel detach --config /etc/tunnel/agent.toml || true
    fi
fi
exit 0
