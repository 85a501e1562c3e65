#!/bin/bash
# Two hosts that have nothing in common but a cable: network and mount namespaces of their own.
#
#     unshare -Urnm bash two_hosts.sh FOLDER COMMAND…
#
# COMMAND is run on both, with 0 or 1 behind it; what one writes below FOLDER the other never
# sees. They reach each other as 10.77.0.1 and 10.77.0.2.
set -e
folder=$1
shift
mount -t tmpfs none /run
for i in 0 1; do ip netns add "host$i"; done
ip link add cable0 netns host0 type veth peer name cable1 netns host1
for i in 0 1; do
    ip -n "host$i" address add "10.77.0.$((i + 1))/24" dev "cable$i"
    ip -n "host$i" link set "cable$i" up
    ip -n "host$i" link set lo up
done
for i in 0 1; do
    ip netns exec "host$i" unshare -m \
        sh -c 'mount -t tmpfs none "$0"; exec "$@"' "$folder" "$@" "$i" &
    pids[i]=$!
done
status=0
for i in 0 1; do wait "${pids[i]}" || status=1; done
exit $status
