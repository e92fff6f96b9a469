#!/bin/sh
# Several machines by MPI: ranks on the hosts of a file, one name a line. mlpint lies at the same path on all of them.
#   HOSTS=hosts.txt RANKS=4 examples/launch/mpirun.sh mlpint train --layers 64 --data-parallel 2
# MPICH's mpirun takes -f, Open MPI's --hostfile.
set -e
: "${RANKS:?the number of ranks}" "${HOSTS:?a file with the hosts, one a line}"
if mpirun --version | grep -q "Open MPI"; then
  exec mpirun -n "$RANKS" --hostfile "$HOSTS" -x OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$@"
fi
exec mpirun -n "$RANKS" -f "$HOSTS" -genv OMP_NUM_THREADS "${OMP_NUM_THREADS:-1}" "$@"
