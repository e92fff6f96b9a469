#!/bin/sh
# Two nodes (or more) by torchrun: run it on each of them, with the number of the node and the first one's address.
#   NODE=0 NODES=2 FIRST=10.0.0.1 examples/launch/torchrun.sh --no-python mlpint train --layers 64
#   NODE=1 NODES=2 FIRST=10.0.0.1 examples/launch/torchrun.sh --no-python mlpint train --layers 64
# EACH: ranks a node, GPUs or cores; PORT: one that is free on the first node.
set -e
: "${NODE:?the number of this node, from 0}" "${NODES:?how many nodes there are}" "${FIRST:?the address of node 0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node "${EACH:-1}" \
  --master-addr "$FIRST" --master-port "${PORT:-29500}" "$@"
