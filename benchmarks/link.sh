#!/bin/sh
# Run a command as two ranks at the two ends of a rate-limited link: one network namespace each, joined by
# a veth pair whose both ends send through a token bucket. Needs root and iproute2.
#
#     benchmarks/link.sh 1gbit python benchmarks/predicted.py --ranks 2
#
# The command finds RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME in its environment, as
# under torchrun; each rank is pinned to a core of its own. Answers with rank 0's exit status.
set -eu
if [ $# -lt 2 ]; then
    echo "usage: $0 RATE COMMAND..." >&2
    exit 2
fi
rate=$1
shift
name=zero$$
cores=$(nproc)
pids=

tidy() {
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for rank in 0 1; do ip netns delete "$name-$rank" 2>/dev/null || true; done
}
trap tidy EXIT
trap 'exit 130' INT TERM

for rank in 0 1; do ip netns add "$name-$rank"; done
ip link add v0 netns "$name-0" type veth peer name v1 netns "$name-1"
for rank in 0 1; do
    inside="ip -n $name-$rank"
    $inside address add "10.77.0.$((rank + 1))/24" dev "v$rank"
    $inside link set lo up
    $inside link set "v$rank" up
    ip netns exec "$name-$rank" \
        tc qdisc add dev "v$rank" root tbf rate "$rate" burst 256kb latency 50ms
done

start() {
    ip netns exec "$name-$rank" taskset -c "$((rank % cores))" env \
        RANK="$rank" LOCAL_RANK="$rank" WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29577 \
        GLOO_SOCKET_IFNAME="v$rank" OMP_NUM_THREADS=1 "$@"
}
rank=1
start "$@" &
pids=$!
rank=0
start "$@" &
first=$!
pids="$pids $first"
status=0
wait "$first" || status=$?
exit "$status"
