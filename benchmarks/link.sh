#!/bin/sh
# Run a command as several ranks behind rate-limited links, each in a network namespace of its own: two are joined
# by a veth pair, more by a bridge in a further namespace. Whatever enters a link, at either end, goes through a
# token bucket, so each rank sends and receives at most RATE. Needs iproute2, and root or a user namespace:
#
#     unshare -rnm sh -c 'mount -t tmpfs none /run && exec benchmarks/link.sh ...'
#
#     benchmarks/link.sh 1gbit python benchmarks/predicted.py --ranks 2
#     RANKS=4 benchmarks/link.sh 1gbit python benchmarks/overlap.py
#
# The command finds RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME in its environment, as
# under torchrun; ranks are pinned to one core each, in turn. Answers with rank 0's exit status.
set -eu
ranks=${RANKS:-2}
if [ $# -lt 2 ] || [ "$ranks" -lt 2 ] || [ "$ranks" -gt 250 ]; then
    echo "usage: [RANKS=2] $0 RATE COMMAND..." >&2
    exit 2
fi
rate=$1
shift
name=zero$$
cores=$(env -u OMP_NUM_THREADS nproc) # nproc heeds that variable
pids=
all=$(seq 0 $((ranks - 1)))

tidy() {
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for part in $all bridge; do ip netns delete "$name-$part" 2>/dev/null || true; done
}
trap tidy EXIT
trap 'exit 130' INT TERM

# limit PART DEVICE: bring the device up in that namespace, and limit what it sends
limit() {
    ip -n "$name-$1" link set "$2" up
    ip netns exec "$name-$1" tc qdisc add dev "$2" root tbf rate "$rate" burst 256kb latency 50ms
}

for rank in $all; do ip netns add "$name-$rank"; done
if [ "$ranks" = 2 ]; then
    ip link add v0 netns "$name-0" type veth peer name v1 netns "$name-1"
else
    ip netns add "$name-bridge"
    ip -n "$name-bridge" link add bridge type bridge
    ip -n "$name-bridge" link set bridge up
    for rank in $all; do
        ip link add "v$rank" netns "$name-$rank" type veth peer name "p$rank" netns "$name-bridge"
        ip -n "$name-bridge" link set "p$rank" master bridge
        limit bridge "p$rank"
    done
fi
for rank in $all; do
    ip -n "$name-$rank" address add "10.77.0.$((rank + 1))/24" dev "v$rank"
    ip -n "$name-$rank" link set lo up
    limit "$rank" "v$rank"
done

start() {
    exec ip netns exec "$name-$rank" taskset -c "$((rank % cores))" env \
        RANK="$rank" LOCAL_RANK="$rank" WORLD_SIZE="$ranks" MASTER_ADDR=10.77.0.1 MASTER_PORT=29577 \
        GLOO_SOCKET_IFNAME="v$rank" OMP_NUM_THREADS=1 "$@"
}
for rank in $(seq "$((ranks - 1))" -1 0); do
    start "$@" &
    pids="$pids $!"
done
status=0
wait $! || status=$? # rank 0, started last
exit "$status"
