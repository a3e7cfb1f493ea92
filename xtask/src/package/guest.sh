# What is done in the virtual machine: a gateway and an agent as units, a captured service under load, an upgrade, a downgrade, the
# removal. Lines that begin with "guest: " are what the host shows.
set -uo pipefail
say() { echo "guest: $*"; }
fail() {
    say "FAILED: $*"
    systemctl --no-pager status tunnel-agent tunnel-gateway legacy
    journalctl --no-pager --lines=60
    tail -n 20 /run/legacy.log
    sleep 2
    exit 1
}
# Until a command succeeds.
until_() {
    local what=$1 end=$((SECONDS + 120))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "$what"
        sleep 0.5
    done
    say "$what"
}
# So many more requests of the captured service are answered, and none has failed.
answered() {
    local before end=$((SECONDS + 120))
    before=$(grep -c ok /run/legacy.log)
    until [ $(($(grep -c ok /run/legacy.log) - before)) -ge "$1" ]; do
        [ $SECONDS -lt $end ] || fail "the captured service is not answered: $2"
        sleep 0.5
    done
    if grep -v ok /run/legacy.log; then fail "a request failed: $2"; fi
    say "$2"
}

answers() { tail -n 1 /run/legacy.log | grep -q ok; }
# Another daemon of the unit takes the place of the one that runs.
take_over() {
    local before
    before=$(systemctl show -P MainPID tunnel-agent)
    sh -c 'echo $$ >/sys/fs/cgroup/system.slice/tunnel-agent.service/cgroup.procs
        NOTIFY_SOCKET=/run/systemd/notify exec setsid tunnel run --config /etc/tunnel/agent.toml --takeover' </dev/null >/run/takeover.log 2>&1 &
    until_ "systemd knows the daemon that has taken over" sh -c "[ \$(systemctl show -P MainPID tunnel-agent) != $before ]"
}

say "booted: Linux $(uname -r), systemd $(systemctl --version | head -n 1)"
dpkg --install /now.deb >/dev/null || fail "dpkg --install"
say "installed: $(tunnel --version)"
[ "$(systemctl is-active tunnel-agent tunnel-gateway | sort -u)" = inactive ] || fail "the installation has started a unit"
tunnel doctor | tail -n 30 || fail "tunnel doctor"

ip link set lo up
ip address add 10.9.0.1/32 dev lo
ip address add 10.200.0.10/32 dev lo
mkdir -p /srv/www && echo hello >/srv/www/index.html
busybox httpd -p 10.200.0.10:80 -h /srv/www || fail "the server"
cd /etc/tunnel
tunnel pki init . >/dev/null
tunnel pki issue --dir . --id spiffe://example.org/node --name node >/dev/null
tunnel pki issue --dir . --id spiffe://example.org/gateway --name gateway --ip 10.9.0.1 >/dev/null
chown tunnel gateway-key.pem
cat >gateway.toml <<'EOF'
[identity]
cert = "gateway.pem"
key = "gateway-key.pem"
ca = "ca.pem"
[admin]
socket = "/run/tunnel-gateway/admin.sock"
[[listener]]
address = "10.9.0.1:15008"
handshake_timeout = "60s"
[[policy]]
identity = ["spiffe://example.org/node"]
target = ["10.200.0.0/24:80"]
[[route]]
to = "direct"
EOF
cat >agent.toml <<'EOF'
[identity]
cert = "node.pem"
key = "node-key.pem"
ca = "ca.pem"
[[capture]]
unit = "legacy.service"
[[route]]
to = [{ upstream = "gateway" }]
[[upstream]]
name = "gateway"
endpoints = ["10.9.0.1:15008"]
verify = ["spiffe://example.org/gateway"]
# Without KVM a handshake takes seconds.
connect_timeout = "60s"
response_timeout = "60s"
EOF
cat >/etc/systemd/system/legacy.service <<'EOF'
[Service]
ExecStart=/bin/sh -c 'while :; do if curl -sf --max-time 60 http://10.200.0.10/ >/dev/null; then echo ok; else echo "FAILED with $?"; fi >>/run/legacy.log; sleep 0.05; done'
EOF
systemctl daemon-reload
systemctl start tunnel-gateway || fail "tunnel-gateway does not start"
say "tunnel-gateway is $(systemctl is-active tunnel-gateway), as $(ps -o user= -p "$(systemctl show -P MainPID tunnel-gateway)" 2>/dev/null || stat -c %U "/proc/$(systemctl show -P MainPID tunnel-gateway)")"
systemctl start tunnel-agent || fail "tunnel-agent does not start"
say "tunnel-agent is $(systemctl is-active tunnel-agent), CapBnd $(grep CapBnd "/proc/$(systemctl show -P MainPID tunnel-agent)/status" | cut -f 2)"
systemctl start legacy
until_ "the first request is answered" grep -q ok /run/legacy.log
# What counts is what comes now.
: >/run/legacy.log
answered 5 "legacy.service is answered"
until_ "its flows are the agent's" sh -c 'tunnel flows --config /etc/tunnel/agent.toml --json >/dev/null && tunnel status --config /etc/tunnel/agent.toml --json | grep -q legacy.service'
journalctl -u tunnel-agent --no-pager | grep -q 'flow ended' || fail "the agent has carried nothing"
say "the agent has carried them"
systemctl reload tunnel-agent || fail "reload"
answered 3 "reloaded"

dpkg --install /next.deb >/dev/null 2>&1 || fail "upgrade"
answered 3 "the next version is installed: the daemons run on"
take_over
answered 5 "the next version has taken over under load: no request has failed"
systemctl restart tunnel-gateway || fail "restart of the gateway"
answered 5 "the gateway is restarted under load: no request has failed"

dpkg --install /now.deb >/dev/null 2>&1 || fail "downgrade"
take_over
answered 5 "downgraded, taken over under load: no request has failed"

# Captured connections are refused meanwhile, and nothing else.
systemctl restart tunnel-agent || fail "restart of the agent"
until_ "restarted: answered again" answers
grep -v -e ok -e 'FAILED with 7$' /run/legacy.log && fail "a request failed in another way than refused"
kill -KILL "$(systemctl show -P MainPID tunnel-agent)"
sleep 5
until_ "killed: systemd has started it again, and requests are answered" answers
: >/run/legacy.log

dpkg --remove tunnel >/dev/null 2>&1 || fail "removal"
find /sys/fs/bpf -name 'tunnel*' | grep . && fail "a capture is left"
answered 3 "removed: the service is captured no more"
rm -r /etc/tunnel/*
dpkg --purge tunnel >/dev/null 2>&1 || fail "purge"
for path in /etc/tunnel /run/tunnel /run/tunnel-gateway /usr/bin/tunnel /usr/share/doc/tunnel; do
    [ ! -e $path ] || fail "$path is left"
done
getent passwd tunnel && fail "the user is left"
say "purged"
say "done"
